"""Packed and missing values of netCDF-4 files, by the attributes of the CF conventions.

Applied are `scale_factor` and `add_offset`, `_FillValue` and `missing_value` (one or several), `valid_range`,
`valid_min` and `valid_max`, and `_Unsigned`, by which netCDF has unsigned integers in signed types. The
default fill values of netCDF, which no attribute names, are not applied: such values may be meant.

Unpacked values have the type of the two factors, as in CF (section 8.1) and in xarray: float32, or float64 if
one of the factors is, or if the packed integers have 32 bits or more. Unlike there, integers of at most 16
bits become float32 whatever the factors are, if all of them stay different from each other. Values are
computed in float64 and rounded once. A factor of 1 with an offset of 0 changes neither values nor type, so
that the integers of classes stay integers.

Fill values and missing values are packed ones, as in CF. So are bounds, unless they have the type of the
factors and that is wider than the packed type, as the NetCDF User's Guide has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import h5py
import numpy as np

from hvd_train.data.format import Array
from hvd_train.data.hdf5.attributes import Attributes
from hvd_train.errors import UnsupportedShard
from hvd_train.io.text import listed

_SCALE, _OFFSET, _UNSIGNED = "scale_factor", "add_offset", "_Unsigned"
_MARKS = {"_FillValue": 1, "missing_value": 100}
"""With the most numbers that each may be."""
_BOUNDS = ("valid_range", "valid_min", "valid_max")
_NAMES = (_SCALE, _OFFSET, _UNSIGNED, *_MARKS, *_BOUNDS)
_OF_OTHERS = {
    *("scalefactor", "scaling_factor", "slope", "gain", "addoffset", "offset", "intercept"),
    *("fillvalue", "fill_value", "missingvalue", "nodata"),
}
"""In small letters: what other conventions (HDF-EOS5, NeXus, ODIM) call the same."""
_NOT_APPLIED = (
    "which are not applied: if values are stored in other units by them, write those that are meant"
)


@final
@dataclass(frozen=True, kw_only=True)
class Packing:
    """What the attributes of a dataset say of its values."""

    stored: np.dtype[Any]
    """Of the values in the file: of the size of their HDF5 type, from which the sign may differ."""

    dtype: np.dtype[Any]
    """Of the values that they stand for."""

    factors: Mapping[str, Any]
    """`scale_factor` and `add_offset`, as far as they are there; empty if values stand for themselves."""

    marks: tuple[Any, ...]
    """Stored values that mark missing ones."""

    lowest: Any
    highest: Any
    """Values outside are missing; None if there is no such bound."""

    bounds_unpacked: bool
    """Whether the bounds are of the unpacked values."""

    unsigned: bool
    """Whether the sign of `stored` is by `_Unsigned`."""

    kept: int | None
    """A value that is not missing, whatever the attributes say."""

    attributes: Attributes
    """For messages."""

    def unpack(self, stored: Array, first_row: int) -> Array:
        """The values that `stored` [rows, ...] stands for, NaN where missing; `stored` may be changed.

        Args:
            first_row: number of the first row.

        Raises `UnsupportedShard` for a missing value among integers that stay integers.
        """
        values: Array = stored.view(self.stored)
        missing = np.zeros(values.shape, bool)
        for mark in self.marks:
            missing |= values == mark
        if not self.bounds_unpacked:
            self._add_outside(values, missing)
        if self.kept is not None and not self.factors:
            missing &= values != self.kept
        if self.dtype.kind != "f":
            if missing.any():
                raise UnsupportedShard(self._refusal(values, missing, first_row))
            return values
        if self.factors:
            with np.errstate(over="ignore", invalid="ignore"):
                scaled = np.multiply(values, float(self.factors.get(_SCALE, 1)), dtype=np.float64)
                scaled += float(self.factors.get(_OFFSET, 0))
                values = scaled.astype(self.dtype)
        if self.bounds_unpacked:
            self._add_outside(values, missing)
        values[missing] = np.nan
        return values

    def _add_outside(self, values: Array, missing: Array) -> None:
        # As Python's numbers: of a wider type, they are rounded to that of the values.
        with np.errstate(over="ignore"):
            if self.lowest is not None:
                missing |= values < self.lowest.item()
            if self.highest is not None:
                missing |= values > self.highest.item()

    def _refusal(self, values: Array, missing: Array, first_row: int) -> str:
        at = tuple(int(indices[0]) for indices in np.nonzero(missing))
        names = [name for name in (*_MARKS, *_BOUNDS) if name in self.attributes]
        return (
            f"{self.attributes.path}: dataset `{self.attributes.name}` holds {values[at]} in row "
            f"{first_row + at[0]}, a missing value by its {' or '.join(names)}; expected none among "
            "integers, which cannot be NaN. Leave out such rows, or write floating-point numbers; if it "
            f"marks targets without a class, set data.ignore_index = {values[at]}; if it is a value like any "
            f"other, remove what marks it, {self.attributes.removal(names)}."
        )

    def __str__(self) -> str:
        """What is done to the values, as the end of a sentence; empty if nothing is."""
        missing = [f"{mark!s} is NaN" for mark in self.marks]
        kind = " unpacked" if self.bounds_unpacked else ""
        for side, bound in (("below", self.lowest), ("above", self.highest)):
            missing += [] if bound is None else [f"{side} {bound!s}{kind} is NaN"]
        if self.factors:
            terms = [f" {'*' if name == _SCALE else '+'} {value!s}" for name, value in self.factors.items()]
            return f"is unpacked by {' and '.join(self.factors)}: " + ", ".join(
                [f"{self.stored}{''.join(terms)}", *missing]
            )
        if self.dtype.kind == "f":
            return f"has missing values: {', '.join(missing)}" if missing else ""
        return f"is read as {self.stored} by {_UNSIGNED}" if self.unsigned else ""


def packing_of(
    dataset: h5py.Dataset, dtype: np.dtype[Any], path: str, name: str, kept: int | None = None
) -> Packing | None:
    """What the attributes of `dataset`, which has values of `dtype`, say of them; None if nothing.

    Args:
        path, name: of the file, and of the dataset in it.
        kept: a value that is not missing, whatever the attributes say.

    Raises `DataError` for an attribute that cannot be applied.
    """
    if not h5py.h5a.get_num_attrs(dataset.id):
        return None
    given = Attributes(dataset, path, name)
    if not any(attribute in given for attribute in _NAMES):
        return None
    is_unsigned = given.flag(_UNSIGNED) if dtype.kind in "iu" else None
    stored = dtype if is_unsigned is None else np.dtype(f"{'u' if is_unsigned else 'i'}{dtype.itemsize}")
    factors = _factors(given)
    marks = [
        _stored(number, dtype, stored)
        for attribute, most in _MARKS.items()
        for number in given.numbers(attribute, most=most)
    ]
    bounds = {attribute: given.numbers(attribute) for attribute in _BOUNDS[1:]}
    bounds[_BOUNDS[0]] = given.numbers(_BOUNDS[0], 2, 2)
    lowest, highest = _limits(given, bounds, dtype, stored)
    packing = Packing(
        stored=stored,
        dtype=_unpacked_type(stored, factors) if factors else stored,
        factors=factors,
        marks=tuple(dict.fromkeys(mark for mark in marks if mark is not None and mark == mark)),
        lowest=lowest,
        highest=highest,
        bounds_unpacked=_are_unpacked(bounds, factors, stored),
        unsigned=stored != dtype,
        kept=kept,
        attributes=given,
    )
    changes = factors or packing.marks or packing.unsigned or (lowest, highest) != (None, None)
    return packing if changes else None


def refuse_packing(dataset: h5py.Dataset, path: str, name: str) -> None:
    """Raises `UnsupportedShard` if attributes say that values of a table are packed or missing: of which of
    its columns is not said."""
    given = Attributes(dataset, path, name)
    if found := [attribute for attribute in _NAMES if attribute in given]:
        raise UnsupportedShard(
            f"{path}: dataset `{name}` is a table with the attributes {listed(found)}. Expected such "
            "attributes at datasets of numbers only: write the columns as datasets of their own, each with "
            "its attributes, or, if the values are stored as they are meant, remove them, "
            f"{given.removal(found)}."
        )


def require_same_packing(virtual: h5py.Dataset, source: h5py.Dataset, path: str, name: str) -> None:
    """Raises `UnsupportedShard` if attributes say something else of the values of `source`, `name` in the
    file `path`, than of those of the dataset `virtual`, which has values of it: only those of `virtual` are
    applied."""
    given = Attributes(source, path, name).texts(_NAMES)
    home = Attributes(virtual, virtual.file.filename, virtual.name.strip("/"))
    if not given or given == home.texts(_NAMES):
        return
    seen = listed([f"{attribute} = {text}" for attribute, text in given.items()])
    target = f"file[{home.name!r}].attrs"
    copies = "; ".join(f"{target}[{each!r}] = source[{name!r}].attrs[{each!r}]" for each in given)
    raise UnsupportedShard(
        f"{path}: dataset `{name}` has the attributes {seen}, but virtual dataset `{home.name}` of "
        f"{home.path}, which has its values, does not. Expected the same of every source, and of the virtual "
        "dataset, whose attributes are applied: write them, with h5py, from `source = "
        f"h5py.File({path!r})` to `file = h5py.File({home.path!r}, 'r+')`: `{copies}`."
    )


def unapplied(dataset: h5py.Dataset) -> str:
    """The attributes of `dataset` that may say that its values are packed or missing, but are not applied,
    as the end of a sentence; empty if there are none."""
    if not h5py.h5a.get_num_attrs(dataset.id):
        return ""
    found = [attribute for attribute in dataset.attrs if attribute.lower() in _OF_OTHERS]
    return f"has the attributes {listed(found)}, {_NOT_APPLIED}" if found else ""


def _factors(given: Attributes) -> dict[str, Any]:
    """The factors that change something."""
    found = {name: number for name in (_SCALE, _OFFSET) for number in given.numbers(name)}
    for name, number in found.items():
        if not np.isfinite(number) or (name == _SCALE and number == 0):
            raise given.error(name, number, "a finite number" + (" other than 0" if name == _SCALE else ""))
    return {} if found.get(_SCALE, 1) == 1 and found.get(_OFFSET, 0) == 0 else found


def _unpacked_type(stored: np.dtype[Any], factors: Mapping[str, Any]) -> np.dtype[Any]:
    single, double = np.dtype("f4"), np.dtype("f8")
    narrow = all(factor.dtype in (np.float16, single) for factor in factors.values())
    if stored.kind == "f":
        return single if narrow and stored.itemsize <= 4 else double
    if stored.itemsize > 2:
        return double
    scale, offset = float(factors.get(_SCALE, 1)), float(factors.get(_OFFSET, 0))
    limits = (np.iinfo(stored).min, np.iinfo(stored).max) if stored.kind in "iu" else (0, 1)
    largest = max(abs(limit * scale + offset) for limit in limits)
    fits = largest < np.finfo(single).max and np.spacing(np.float32(largest)) <= abs(scale)
    return single if narrow or fits else double


def _limits(
    given: Attributes, bounds: Mapping[str, Array], dtype: np.dtype[Any], stored: np.dtype[Any]
) -> tuple[Any, Any]:
    """The lowest and the highest value that is not missing; None where there is no bound."""
    for name, numbers in bounds.items():
        if np.isnan(numbers).any():
            raise given.error(name, numbers, "finite numbers")
    between, least, most = (bounds[name] for name in _BOUNDS)
    low, high = max((*between[:1], *least), default=None), min((*between[1:], *most), default=None)
    if stored != dtype:
        low, high = (
            bound if bound is None or bound.dtype != dtype else _stored(bound, dtype, stored)
            for bound in (low, high)
        )
    if low is not None and high is not None and low > high:
        name = _BOUNDS[0] if len(between) else _BOUNDS[1]
        raise given.error(
            name, f"{low}, with {high} as the upper bound", "a lower bound that is not above it"
        )
    return low, high


def _are_unpacked(bounds: Mapping[str, Array], factors: Mapping[str, Any], stored: np.dtype[Any]) -> bool:
    types = {numbers.dtype for numbers in bounds.values() if len(numbers)}
    if not factors or not types:
        return False
    wider = np.result_type(*(factor.dtype for factor in factors.values()))
    return types == {wider} and not np.can_cast(wider, stored)


def _stored(number: Any, dtype: np.dtype[Any], stored: np.dtype[Any]) -> Any:
    """A number as one of the stored values; None if it equals none of them. An integer of the HDF5 type,
    `dtype`, has the same bits there: netCDF has attributes of the type of the values, whatever their sign."""
    for kind in (dtype, stored):
        with np.errstate(over="ignore", invalid="ignore"):
            value = np.asarray(number).astype(kind)[()]
        if kind.kind == "f" or value == number:
            return value.view(stored)
    return None
