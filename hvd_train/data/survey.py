"""What the values of the datasets are, from some rows of them or from all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from hvd_train.data.blocks import row_bytes
from hvd_train.data.deal import Span
from hvd_train.data.format import FieldSpec, mask_name
from hvd_train.data.lengths import has_values, with_mask
from hvd_train.data.rows import Rows
from hvd_train.data.screen import Screen, usable
from hvd_train.data.values import Number, Values, join, values_of

SURVEY_BYTES = 1 << 20
"""Bytes of values that are read of each dataset."""

_PLACES = 16
"""Rows are read at up to this many places, so that sorted rows are seen from one end to the other."""

_MOST_FILES = 64
"""About so many files are opened for some rows: of more files fewer rows are read."""

_MOST_SAMPLES = 1000
"""Of Python datasets, about so many are read."""

_DECODED_BYTES = 16 << 20
"""Bytes that HDF5 may decode for it: a chunk of a file is read as a whole. At least one row is read."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is known of the values of one dataset."""

    name: str
    """The dataset."""

    field: FieldSpec

    values: Values
    """Of the rows that were read."""

    num_rows: int = 0
    """Rows that there are."""

    file: str = ""
    """The first file of which rows were read; empty if there is none."""

    not_finite_in: str = ""
    """The first file of which a value that was read is NaN or infinite; empty if there is none."""

    largest_in: str = ""
    """The file that has the finite value of the largest magnitude; empty if there is none."""

    @property
    def complete(self) -> bool:
        """Whether every row was read."""
        return self.values.rows == self.num_rows


Surveys = Mapping[str, Survey]
"""By the names of the datasets."""


def survey(
    spans: Sequence[Span],
    fields: Mapping[str, FieldSpec],
    *,
    fills: Mapping[str, Number] | None = None,
    num_bytes: int | None = SURVEY_BYTES,
    screen: Screen | None = None,
) -> dict[str, Survey]:
    """Reads some rows of `spans`, or all.

    Args:
        fields: the datasets. Those that only mark the values of others are left out.
        fills: values of some datasets that mark missing ones.
        num_bytes: about as many bytes are read of each dataset; None: every row.
        screen: marks rows that are left out.

    Checksums are not compared, unless a screen leaves out what is damaged: that is done when the rows are
    used. Not collective. Raises `DataError`.
    """
    found: dict[str, Survey] = {}
    fields = {name: field for name, field in fields.items() if has_values(field)}
    if Rows(spans, fields).are_made:
        # A sample is made as a whole, and may take long.
        most = _MOST_SAMPLES * sum(map(row_bytes, fields.values()))
        return _survey(spans, fields, fills or {}, num_bytes and min(num_bytes, most), screen)
    for name, field in fields.items():
        found |= _survey(spans, {name: field}, fills or {}, num_bytes, screen)
    return found


def join_surveys(surveys: Iterable[Surveys]) -> dict[str, Survey]:
    """The survey of all parts of a data set together, in their order; at least one part."""
    every = list(surveys)
    return {name: reduce(_join_two, [part[name] for part in every]) for name in every[0]}


def _join_two(a: Survey, b: Survey) -> Survey:
    larger = max((x for x in (a, b) if x.largest_in), key=lambda x: x.values.magnitude, default=a)
    return Survey(
        name=a.name,
        field=a.field,
        values=join((a.values, b.values)),
        num_rows=a.num_rows + b.num_rows,
        file=a.file or b.file,
        not_finite_in=a.not_finite_in or b.not_finite_in,
        largest_in=larger.largest_in,
    )


def _survey(
    spans: Sequence[Span],
    fields: Mapping[str, FieldSpec],
    fills: Mapping[str, Number],
    num_bytes: int | None,
    screen: Screen | None,
) -> dict[str, Survey]:
    """Of fields of which the same rows are read."""
    with_masks = {n: f for name, spec in fields.items() for n, f in with_mask(name, spec).items()}
    rows = Rows(spans, with_masks, verify=screen is not None, screen=screen)
    found = {
        name: Survey(name=name, field=spec, values=Values(), num_rows=len(rows))
        for name, spec in fields.items()
    }
    bytes_of_row = sum(map(row_bytes, fields.values()))
    try:
        for start, stop in (
            _places(rows, bytes_of_row, num_bytes) if num_bytes else _blocks(rows, bytes_of_row)
        ):
            for span in rows.locate(start, stop):
                block = usable(rows.read(start, start + span.num_rows))[0]
                start += span.num_rows
                for name, spec in fields.items():
                    values = values_of(block[name], fills.get(name), block.get(mask_name(name)))
                    found[name] = _join_two(found[name], _of_block(values, name, spec, span.shard))
    finally:
        rows.close()
    return found


def _of_block(values: Values, name: str, spec: FieldSpec, file: str) -> Survey:
    return Survey(
        name=name,
        field=spec,
        values=values,
        file=file,
        not_finite_in=file if values.nan + values.plus_inf + values.minus_inf else "",
        largest_in=file if values.finite else "",
    )


def _places(rows: Rows, bytes_of_row: int, num_bytes: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about `num_bytes` together, spread evenly over all rows."""
    num_files = len({span.shard for span in rows.spans})
    wanted = min(
        max(1, num_bytes // max(1, bytes_of_row)), len(rows) * _MOST_FILES // max(_MOST_FILES, num_files)
    )
    if wanted >= len(rows):
        yield 0, len(rows)
        return
    unit = rows.info(rows.spans[0]).chunk_rows or 1
    places = max(1, min(_PLACES, _DECODED_BYTES // max(1, unit * bytes_of_row), wanted))
    for i in range(places):
        start = len(rows) * i // places
        yield start, start + max(1, wanted // places)


def _blocks(rows: Rows, bytes_of_row: int) -> Iterator[tuple[int, int]]:
    """Row ranges that are all rows together, each as large as a chunk of its file or `SURVEY_BYTES`."""
    start = 0
    for span in rows.spans:
        stop = start + span.num_rows
        unit = rows.info(span).chunk_rows or 1
        step = max(1, max(1, SURVEY_BYTES // max(1, bytes_of_row)) // unit) * unit
        while start < stop:
            yield start, min(start + step, stop)
            start = min(start + step, stop)
