"""What the attributes of netCDF and the CF conventions say of the values of a dataset.

A value is raw * `scale_factor` + `add_offset`. One whose raw value is `_FillValue` or `missing_value`, or
outside of `valid_min`, `valid_max` or `valid_range`, is missing: not a number where values are floating-point
numbers, an error where they are not. With `_Unsigned` raw integers are unsigned. What netCDF fills a dataset
with by default is not missing unless `_FillValue` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np

from hvd_train.data.format import Array
from hvd_train.errors import DataError

_NUMBERS = {
    "scale_factor": 1,
    "add_offset": 1,
    "_FillValue": 1,
    "missing_value": None,
    "valid_min": 1,
    "valid_max": 1,
    "valid_range": 2,
}
"""The attributes, and how many numbers each has; None for any."""

_REMEDY = "Correct the attribute, or remove it."

Number = float | int


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How the raw values of one dataset become values."""

    raw: np.dtype[Any]
    """As they are stored, but for their sign."""

    dtype: np.dtype[Any]
    """As they are read."""

    scale: float = 1.0
    offset: float = 0.0
    missing: tuple[Number, ...] = ()
    low: Number | None = None
    high: Number | None = None

    words: str
    """What is done, for messages."""

    def unpack(self, raw: Array, out: Array) -> int | None:
        """Writes the values of `raw`, [rows, ...] as they are stored, into `out` of the same shape. Returns
        the first row with a missing value, where `out` cannot say it; None if there is none."""
        raw = raw.view(self.raw)
        gone = self._gone(raw)
        if (self.scale, self.offset) == (1, 0):
            out[...] = raw
        else:  # in float64, rounded once
            out[...] = raw * np.float64(self.scale) + np.float64(self.offset)
        if gone is None:
            return None
        if self.dtype.kind == "f":
            out[gone] = np.nan
            return None
        rows = np.flatnonzero(gone.reshape(len(raw), -1).any(axis=1))
        return int(rows[0]) if rows.size else None

    def _gone(self, raw: Array) -> Array | None:
        """Which values are missing, bool; None if none can be."""
        tests: list[Array] = [raw == value for value in self.missing]
        if self.low is not None:
            tests.append(raw < self.low)
        if self.high is not None:
            tests.append(raw > self.high)
        return np.logical_or.reduce(tests) if tests else None


def packing_of(dataset: h5py.Dataset, dtype: np.dtype[Any], where: str) -> Packing | None:
    """By the attributes of a dataset; None where they say nothing. Raises `DataError` for attributes that are
    not the numbers that they should be.

    Args:
        dtype: of the values as they are stored.
        where: the file and the dataset, for messages.
    """
    if not len(dataset.attrs):
        return None
    unsigned = dtype.kind == "i" and _is_true(dataset.attrs.get("_Unsigned"))
    found = {key: _numbers(dataset, key, n, where) for key, n in _NUMBERS.items() if key in dataset.attrs}
    if dtype.kind not in "iuf" or not (found or unsigned):
        return None
    raw = np.dtype(f"u{dtype.itemsize}") if unsigned else dtype
    scale, offset = float(found.get("scale_factor", (1,))[0]), float(found.get("add_offset", (0,))[0])
    if not np.isfinite([scale, offset]).all() or scale == 0:
        raise DataError(
            f"{where}: scale_factor is {scale:g} and add_offset {offset:g}; expected finite numbers, and a "
            f"factor other than 0. {_REMEDY}"
        )
    is_packed = "scale_factor" in found or "add_offset" in found
    as_read = _unpacked(raw, scale, offset) if is_packed else raw
    bounds = found.get("valid_range", (None, None))
    return Packing(
        raw=raw,
        dtype=as_read,
        scale=scale,
        offset=offset,
        missing=_missing(found, raw, unsigned=unsigned),
        low=found.get("valid_min", bounds[:1])[0],
        high=found.get("valid_max", bounds[1:])[0],
        words=_words(found, unsigned=unsigned, has_nan=as_read.kind == "f"),
    )


def _unpacked(raw: np.dtype[Any], scale: float, offset: float) -> np.dtype[Any]:
    """float32 where it tells neighbouring values apart, else float64."""
    if raw.kind == "f":
        return np.promote_types(raw, np.float32)
    limits = np.iinfo(raw)
    largest = abs(scale) * max(-limits.min, limits.max) + abs(offset)
    return np.dtype(np.float32 if largest * 2.0**-24 <= abs(scale) / 2 else np.float64)


def _missing(
    found: Mapping[str, tuple[Number, ...]], raw: np.dtype[Any], *, unsigned: bool
) -> tuple[Number, ...]:
    values = [*found.get("_FillValue", ()), *found.get("missing_value", ())]
    if unsigned:  # the attribute has the sign of what is stored
        values = [int(v) + (1 << 8 * raw.itemsize) if v < 0 else v for v in values]
    return tuple(v for v in dict.fromkeys(values) if v == v)  # a NaN is one already


def _numbers(dataset: h5py.Dataset, key: str, count: int | None, where: str) -> tuple[Number, ...]:
    try:
        values = np.asarray(dataset.attrs[key]).reshape(-1)
    except (OSError, TypeError, ValueError) as error:
        raise DataError(f"{where}: the attribute {key} cannot be read: {error}. {_REMEDY}") from None
    if values.dtype.kind not in "iuf" or not len(values) or count not in (None, len(values)):
        expected = {None: "numbers", 1: "a number", 2: "two numbers"}[count]
        seen = str(dataset.attrs[key])[:60]
        raise DataError(f"{where}: the attribute {key} is {seen!r}; expected {expected}. {_REMEDY}")
    return tuple(value.item() for value in values)


def _is_true(value: Any) -> bool:
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text.lower() == "true"


def _words(found: Mapping[str, tuple[Number, ...]], *, unsigned: bool, has_nan: bool) -> str:
    said = ["_Unsigned"] if unsigned else []
    said += [f"{key} {', '.join(f'{value:.6g}' for value in values)}" for key, values in found.items()]
    missing = has_nan and not found.keys() <= {"scale_factor", "add_offset"}
    return f"read by its attributes {', '.join(said)}{'; what is missing by them is NaN' if missing else ''}"
