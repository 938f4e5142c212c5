"""The model card: what a file holds, what it was made of and how it was checked, as TOML."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from typing import Any

import tomli_w
import torch
from torch import nn

from hvd_train._version import __version__
from hvd_train.after.export.product import Product
from hvd_train.after.export.publish import CARD_TITLE, Checked
from hvd_train.after.export.samples import Samples, run_part
from hvd_train.after.trained import Trained
from hvd_train.config_file import to_mapping
from hvd_train.data.deal import Span
from hvd_train.errors import DataError
from hvd_train.monitor.events import Evaluation, Start
from hvd_train.monitor.history import History
from hvd_train.run.layout import EVENTS_FILE
from hvd_train.tasks.models import describe

SCHEMA = 1
"""Of the card; later versions that only add keys keep it."""


def card(
    trained: Trained,
    model: nn.Module,
    product: Product,
    samples: Samples,
    checked: Checked,
    *,
    about: Mapping[str, str],
    versions: Mapping[str, str],
) -> str:
    """The text of the card.

    Args:
        about: the name and the format of the file.
        versions: of further packages that made it.
    """
    start, evaluation = _record(trained)
    here = {"hvd_train": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    values: dict[str, Any] = {
        "schema": SCHEMA,
        **about,
        "num_bytes": checked.num_bytes,
        "sha256": checked.sha256,
        "model": _model(trained, model),
        "inputs": [{"name": i.name, "dtype": i.dtype, "shape": list(i.shape)} for i in product.inputs],
        "outputs": _outputs(checked),
        "preprocessing": {
            "included": list(product.included),
            "left_out": [*product.left_out, *_padding(trained)],
        },
        "comparison": {
            "samples": samples.count,
            "data": samples.source,
            "largest_difference": checked.comparison.difference,
            "largest_output": checked.comparison.largest,
        },
        "metrics": _metrics(start, evaluation),
        "data": _data(trained),
        "versions": {"export": {**here, **versions}, "training": dict(start.versions) if start else {}},
        "configuration": to_mapping(trained.config),
    }
    return f"{CARD_TITLE}\n\n{tomli_w.dumps(values)}"


def _model(trained: Trained, model: nn.Module) -> dict[str, Any]:
    names = trained.saved.sample.class_names
    return {
        "run": str(trained.folder),
        "checkpoint": trained.checkpoint,
        "round": trained.saved.round,
        "task": trained.config.task,
        "model": describe(model),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        **({"classes": list(names)} if names else {}),
    }


def _padding(trained: Trained) -> list[str]:
    """What was done to rows of any length before they were samples, in words."""
    fields = trained.saved.sample.fields
    return [
        f"rows of `{name}` are padded with zeros to {field.padding.length} values"
        + (", and longer ones cut" if field.padding.truncate else "")
        for name, field in fields.items()
        if field.padding and not field.padding.marks
    ]


def _outputs(checked: Checked) -> list[dict[str, Any]]:
    outputs = checked.comparison.outputs
    named = ["outputs"] if len(outputs) == 1 else [f"outputs_{i}" for i in range(len(outputs))]
    return [
        {
            "name": name,
            "dtype": str(output.dtype).removeprefix("torch."),
            "shape": ["batch", *output.shape],
            "largest_difference": output.difference,
            "limit": checked.comparison.limit(output),
        }
        for name, output in zip(named, outputs, strict=True)
    ]


def _record(trained: Trained) -> tuple[Start | None, Evaluation | None]:
    """The last start of the run, and the evaluation of this round; None for what its log does not have."""
    history = History(trained.folder / EVENTS_FILE)
    try:
        history.update()
    except OSError:
        return None, None
    of_round = [e for e in history.evaluations if e.round == trained.saved.round]
    return history.start, of_round[-1] if of_round else None


def _metrics(start: Start | None, evaluation: Evaluation | None) -> dict[str, Any]:
    """Empty if the model of this round was not evaluated. Figures that are not finite are left out."""
    if evaluation is None:
        return {}
    figures = {name: value for name, value in evaluation.metrics.items() if _is_finite(value)}
    return {
        "watched": start.metric if start else "error",
        "epoch": evaluation.epoch,
        "samples_trained": evaluation.samples,
        "validation_samples": start.validation_samples if start else 0,
        "values": figures,
    }


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _data(trained: Trained) -> dict[str, Any]:
    """What the model was trained on."""
    values: dict[str, Any] = {
        "path": trained.config.data.path,
        "sample": _without_none(trained.saved.sample.to_json()),
    }
    try:
        part = run_part(trained.config)
    except DataError as error:
        return {**values, "not_found": str(error)}
    return {
        **values,
        "training_rows": sum(span.num_rows for span in part.train),
        "validation_rows": sum(span.num_rows for span in part.validation),
        "training_shards": _shards(part.train),
        "validation_shards": _shards(part.validation),
    }


def _shards(spans: tuple[Span, ...]) -> list[dict[str, Any]]:
    """The files, each once, with the rows that are used."""
    rows: dict[str, int] = {}
    for span in spans:
        rows[span.shard] = rows.get(span.shard, 0) + span.num_rows
    return [{"file": file, "rows": count} for file, count in rows.items()]


def _without_none(values: Any) -> Any:
    """Without None, which TOML lacks; tuples as lists."""
    if isinstance(values, Mapping):
        return {key: _without_none(value) for key, value in values.items() if value is not None}
    if isinstance(values, (list, tuple)):
        return [_without_none(value) for value in values]
    return values
