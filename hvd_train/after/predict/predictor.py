"""The predictions of a task for ranges of rows. Not collective."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import final

import numpy as np
import torch
from torch import Tensor

from hvd_train.after.predict.parts import PartRows
from hvd_train.after.trained import Trained
from hvd_train.data.batches import batch_bounds
from hvd_train.data.format import Array, FieldSpec
from hvd_train.data.rows import Rows
from hvd_train.data.selection import needed_to_predict
from hvd_train.errors import TaskError, UserError
from hvd_train.liveness import mark
from hvd_train.tasks.base import Batch
from hvd_train.tasks.models import evaluating
from hvd_train.tasks.transforming import transform_of

_READ_BYTES = 4 << 20
"""Rows are read in blocks of so many bytes, or of one batch if that has more."""

_TRIED_ROWS = 2
"""Enough to tell the axis of the samples from the others."""

_TYPES = {
    t: t
    for t in (
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.float32, torch.float64),
    )
} | {torch.bfloat16: torch.float32}
"""By the type of a tensor that can be written: the one in which it is."""


@final
@dataclass(kw_only=True)
class Predictor:
    """Predicts row by row, in batches whose bounds depend on the rows and the batch size alone."""

    trained: Trained
    rows: Rows
    """Of the inputs, and of the dataset that is copied."""
    copied: str
    """The dataset that is copied; empty for none."""
    batch_size: int
    fields: dict[str, FieldSpec] = field(init=False)
    """One row of what is written: the dataset that is copied, then the predictions."""

    def __post_init__(self) -> None:
        """Predicts on the first rows to learn what the task gives. Raises `TaskError`."""
        tried = min(_TRIED_ROWS, len(self.rows))
        with evaluating(self.trained.model):
            found = self._outputs(self.rows.read(0, tried), 0)
        outputs = {name: _field(name, tensor, tried) for name, tensor in found.items()}
        if self.copied in outputs:
            raise TaskError(
                f"the task predicts `{self.copied}`, which is also the dataset of --id; expected different "
                "names. Leave --id out, or name another dataset."
            )
        kept = {self.copied: self.rows.fields[self.copied]} if self.copied else {}
        self.fields = {**kept, **outputs}

    def predict(self, start: int, stop: int) -> PartRows:
        """The rows `start` up to `stop`. Raises `DataError` and `TaskError`."""
        arrays: dict[str, Array] = {
            name: np.empty((stop - start, *field.shape), np.dtype(field.dtype))
            for name, field in self.fields.items()
        }
        with evaluating(self.trained.model):
            for begin, end in self._blocks(start, stop):
                block = self.rows.read(begin, end)
                if self.copied:
                    arrays[self.copied][begin - start : end - start] = block[self.copied]
                for first, last in batch_bounds(end - begin, self.batch_size):
                    batch = {name: array[first:last] for name, array in block.items()}
                    at = begin + first
                    self._store(self._outputs(batch, at), arrays, at - start, last - first)
                    mark()
        return self._with_nans(arrays, start)

    def _blocks(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Ranges of whole batches that are together `start` to `stop`; a single row that is left over is in
        the last batch, hence in the last range."""
        batches = batch_bounds(stop - start, self.batch_size)
        each = max(1, _READ_BYTES // max(1, self.batch_size * self.rows.row_bytes))
        firsts = [start + first for first, _ in batches[::each]]
        return list(pairwise([*firsts, stop]))

    def _outputs(self, arrays: Mapping[str, Array], at: int) -> dict[str, Tensor]:
        """What the task predicts for rows from `at` on. Raises `TaskError`."""
        sample, task = self.trained.saved.sample, self.trained.task
        where = f"rows {at} to {at + len(arrays[sample.inputs]) - 1}"
        try:
            batch = transform_of(task)({n: torch.from_numpy(arrays[n]) for n in needed_to_predict(sample)})
            found = task.predict(self.trained.model, batch)
        except UserError:
            raise
        except Exception as error:
            raise TaskError(self._explained(error, where)) from error
        if not isinstance(found, dict) or not found or not all(_is_named(*item) for item in found.items()):
            raise TaskError(
                f"predict of {type(task).__name__} returned {_described(found)} for {where}; expected a dict "
                "of tensors by name, at least one, with no slash in a name. Correct `predict`, or define it."
            )
        return found

    def _explained(self, error: Exception, where: str) -> str:
        sample, task = self.trained.saved.sample, type(self.trained.task).__name__
        missing = error.args[0] if isinstance(error, KeyError) and error.args else None
        known = needed_to_predict(sample)
        if missing in sample.fields and missing not in known:
            has = ", ".join(f"`{name}`" for name in known)
            return (
                f"transform or predict of {task} needs `{missing}`, but a batch to predict on has {has} "
                f"only: its targets may not be known. Use `{missing}` only "
                f'`if "{missing}" in batch`.\n{"".join(traceback.format_exception(error))}'
            )
        return f"{task} cannot predict {where}:\n{''.join(traceback.format_exception(error))}"

    def _store(self, found: Batch, arrays: Mapping[str, Array], at: int, count: int) -> None:
        expected = {name: spec for name, spec in self.fields.items() if name != self.copied}
        seen = {name: _field(name, tensor, count) for name, tensor in found.items()}
        if seen != expected:
            raise TaskError(
                f"predict of {type(self.trained.task).__name__} gave {_listed(expected)} for the first rows, "
                f"but {_listed(seen)} for a later batch; expected the same for every batch. Correct it."
            )
        for name, tensor in found.items():
            torch.from_numpy(arrays[name])[at : at + count] = tensor

    def _with_nans(self, arrays: Mapping[str, Array], start: int) -> PartRows:
        bad = np.zeros(len(next(iter(arrays.values()))), bool)
        for name, array in arrays.items():
            if name != self.copied and array.dtype.kind == "f":
                bad |= np.isnan(array).reshape(len(array), -1).any(axis=1)
        rows = np.flatnonzero(bad)
        return PartRows(
            arrays=arrays, nan_rows=len(rows), first_nan=start + int(rows[0]) if len(rows) else -1
        )


def _is_named(name: object, value: object) -> bool:
    return isinstance(name, str) and name.strip("./") == name != "" and "/" not in name and _is_tensor(value)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _field(name: str, tensor: Tensor, rows: int) -> FieldSpec:
    """One row of a prediction. Raises `TaskError` for what cannot be written."""
    dtype = _TYPES.get(tensor.dtype)
    if dtype is None or tensor.dim() == 0 or len(tensor) != rows:
        raise TaskError(
            f"predict gave `{name}` of {tensor.dtype} {list(tensor.shape)} for {rows} rows; expected "
            f"booleans, integers or floating-point numbers of shape [{rows}, ...]. Correct `predict`."
        )
    return FieldSpec(shape=tuple(tensor.shape[1:]), dtype=str(dtype).removeprefix("torch."))


def _listed(fields: Mapping[str, FieldSpec]) -> str:
    return ", ".join(f"`{name}` {field.dtype} {list(field.shape)}" for name, field in fields.items())


def _described(found: object) -> str:
    if isinstance(found, dict) and found:
        return "{" + ", ".join(f"{key!r}: {type(value).__name__}" for key, value in found.items()) + "}"
    return "an empty dict" if isinstance(found, dict) else type(found).__name__
