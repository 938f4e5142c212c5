"""Fields with rows of any length: their masks, and whether all rows are short enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from hvd_train.data.deal import Span
from hvd_train.data.format import FieldSpec, mask_name
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.places import places_of_fields


def with_mask(name: str, field: FieldSpec) -> dict[str, FieldSpec]:
    """The field, and if its rows are padded, the one that marks its values."""
    padding = field.padding
    if padding is None or padding.marks:
        return {name: field}
    marks = replace(padding, marks=True)
    mask = FieldSpec(
        shape=(padding.length,), dtype="bool", place=field.place or name, axis=field.axis, padding=marks
    )
    return {name: field, mask_name(name): mask}


def has_values(field: FieldSpec) -> bool:
    """Whether it is not one that marks the values of another one."""
    return field.padding is None or not field.padding.marks


def check_lengths(spans: Sequence[Span], fields: Mapping[str, FieldSpec]) -> None:
    """Raises `DataError` for a row of any length that is damaged, or longer than is allowed. Reads the bounds
    of all rows of `spans`, and no values. Not collective."""
    padded = {name: field for name, field in fields.items() if field.padding and has_values(field)}
    if not padded:
        return
    layout = places_of_fields(padded)
    for path, of_shard in groupby(spans, lambda span: span.shard):
        with ShardFile(path, layout) as shard:
            for span in of_shard:
                for name in padded:
                    shard.check_lengths(name, span.start, span.stop)
