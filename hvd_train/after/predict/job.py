"""What one call of `hvd_train predict` is to do, opened on a rank."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hvd_train._version import __version__
from hvd_train.after.predict.options import Options
from hvd_train.after.predict.parts import Parts, require_new, rows_of_part
from hvd_train.after.predict.predictor import Predictor
from hvd_train.after.predict.tables import require_fit
from hvd_train.after.trained import Trained, open_trained
from hvd_train.comm.agree import together
from hvd_train.comm.base import Communicator
from hvd_train.data.deal import Span
from hvd_train.data.facts import digest
from hvd_train.data.python.registry import made_of
from hvd_train.data.rows import Rows
from hvd_train.data.selection import Selection, needed_to_predict
from hvd_train.run.layout import absolute_data
from hvd_train.run.shards import select_rows_together
from hvd_train.tasks.base import Task

_MOST_NAMES = 15_000
"""Characters; up to 4 bytes each in an attribute, of which HDF5 takes 64 KiB."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The model, the rows, and the parts that are to be made."""

    trained: Trained
    predictor: Predictor
    parts: Parts
    """Named by what this rank sees of the data; rank 0's names count."""
    warnings: tuple[str, ...]
    """What a user should know of the data, one line each."""

    def facts(self) -> dict[str, Any]:
        """What must be the same on every rank: the folders may be mounted elsewhere."""
        rows = {f"rows of {Path(s.shard).name} (shard {i})": s.num_rows for i, s in enumerate(self.spans)}
        return {
            "the model": _model_checksum(self.trained),
            "what is predicted": msgspec.json.encode(self.parts.fields).decode(),
            **rows,
        }

    @property
    def spans(self) -> Sequence[Span]:
        """The shards with their rows, in order."""
        return self.predictor.rows.spans

    def attributes(self, data: str) -> dict[str, str | int]:
        """What the file says of itself. `data`: as the user named it. `classes`: what the class numbers stand
        for in the data of the training, as a list in JSON, if they stand for something else and it fits."""
        names = msgspec.json.encode(self.trained.saved.sample.class_names).decode()
        return {
            "run": str(self.trained.folder.resolve()),
            "checkpoint": self.trained.checkpoint,
            "round": self.trained.saved.round,
            "data": absolute_data(data),
            "hvd_train": __version__,
            **({"classes": names} if 2 < len(names) < _MOST_NAMES else {}),
        }

    def place_of(self, row: int) -> str:
        """A row of the file, by its shard."""
        for span in self.spans:
            if row < span.num_rows:
                return f"row {span.start + row} of {span.shard}"
            row -= span.num_rows
        raise IndexError(f"row {row} after the last")


def open_job(options: Options, comm: Communicator, task: Task | None = None) -> Job:
    """Opens the run, the data and the task. Collective. Raises `UserError`.

    Args:
        task: the task that was trained, where the configuration does not name it.
    """
    trained = together(comm, lambda: _open_run(options, task))
    sample = trained.saved.sample
    names = (*needed_to_predict(sample), *((options.id,) if options.id else ()))
    selected = select_rows_together(options.data, sample, tuple(dict.fromkeys(names)), comm)
    return together(comm, lambda: _make_job(options, trained, selected))


def _open_run(options: Options, task: Task | None) -> Trained:
    require_new(Path(options.out))
    return open_trained(options.run, options.checkpoint, task)


def _make_job(options: Options, trained: Trained, selected: Selection) -> Job:
    out = Path(options.out)
    rows = Rows(selected.spans, selected.fields, known=selected.shards)
    rows.require_in_order()
    predictor = Predictor(
        trained=trained,
        rows=rows,
        copied=options.id,
        batch_size=options.batch_size or trained.config.evaluate.batch_size,
    )
    require_fit(out.suffix, predictor.fields)
    size = options.part_rows or rows_of_part(predictor.fields, len(rows), predictor.batch_size)
    parts = Parts(
        out=out,
        digest=_digest(predictor, size),
        fields=predictor.fields,
        num_rows=len(rows),
        rows=size,
    )
    return Job(trained=trained, predictor=predictor, parts=parts, warnings=selected.warnings)


def _digest(predictor: Predictor, part_rows: int) -> str:
    """Of all that the values of a part depend on, but for threads and versions of other programs."""
    trained, rows = predictor.trained, predictor.rows
    depends_on = {
        "hvd_train": __version__,
        "model": _model_checksum(trained),
        "sample": trained.saved.sample.to_json(),
        "task": _source(trained.task),
        "shards": [_shard(span, rows) for span in rows.spans],
        "copied": predictor.copied,
        "fields": list(predictor.fields.items()),
        "batch_size": predictor.batch_size,
        "part_rows": part_rows,
    }
    return digest(msgspec.json.encode(depends_on, order="deterministic"))


def _shard(span: Span, rows: Rows) -> list[Any]:
    """A shard by its place, and by the digest of its facts or, of a foreign file, its size and time; a Python
    dataset by what is known before its samples are read."""
    if made := made_of(span.shard):
        return [span.shard, span.start, span.stop, made.facts()]
    file = os.stat(span.shard)
    seen = rows.info(span).facts_digest or [file.st_size, file.st_mtime_ns]
    return [os.path.realpath(span.shard), span.start, span.stop, seen]


def _model_checksum(trained: Trained) -> str:
    return trained.saved.manifest.files[trained.file].xxh3_64


def _source(task: Task) -> list[str]:
    """The task's class, and a digest of the file that defines it."""
    try:
        file = inspect.getsourcefile(type(task))
        content = Path(file).read_bytes() if file else b""
    except (TypeError, OSError):  # of no file, as in a notebook
        content = b""
    return [type(task).__qualname__, digest(content)]
