"""What is left of an epoch that was interrupted, and how it is dealt to any number of ranks.

A *leg* of an epoch is what was read of it between two changes of the ranks or of the order of rows. The
first leg deals all rows as `deal` does. A further leg deals the rows that are left: each part is a stretch of
all rows, and all stretches have equally many of them, up to one. What a leg leaves is found by drawing its
order again, from the position of each part on: a checkpoint holds nothing but these positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Annotated, final

import msgspec

from hvd_train.data.bits import Bits
from hvd_train.data.deal import Span, rows_of
from hvd_train.data.format import FieldSpec
from hvd_train.data.picked import AnyRows, Picked
from hvd_train.data.readers.base import RowNumbers
from hvd_train.data.readers.permutation import cursor_of, order_of
from hvd_train.data.readers.stream import StreamReader
from hvd_train.data.rows import Rows
from hvd_train.data.screen import Screen
from hvd_train.errors import DataError
from hvd_train.io.stateful import Count

_DRAWN_AGAIN = 1 << 20
"""Rows of a stream whose numbers are held at a time."""


class Leg(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """One leg of an epoch, as a checkpoint holds it."""

    parts: Annotated[int, msgspec.Meta(ge=1)]
    """In how many parts the rows were dealt."""
    seed: int
    batch_size: Annotated[int, msgspec.Meta(ge=1)]
    positions: dict[str, Count]
    """The rows that were read of each part with rows, by the fingerprint of its reader."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of the rows from which an epoch is dealt."""

    spans: tuple[Span, ...]
    places: tuple[tuple[int, int], ...]
    """Of each span: the number of its first row among all rows, and of the one after its last."""
    bits: Bits | None = None
    """Which rows of the spans belong to it; None for all."""

    def rows(self, fields: Mapping[str, FieldSpec], screen: Screen | None = None) -> AnyRows:
        """To be read, with the marks of `screen` if there is one."""
        rows = Rows(self.spans, fields, screen=screen)
        return rows if self.bits is None else Picked(rows, self.bits)


@final
class Remainder:
    """The rows that are left of an epoch.

    Args:
        spans: of all rows for training.
        bits: which of them are left.
    """

    def __init__(self, spans: Sequence[Span], bits: Bits) -> None:
        self._spans = spans
        self._bits = bits
        self.num_rows = bits.count()

    def most_rows(self, parts: int) -> int:
        """Rows of the largest of so many parts."""
        return -(-self.num_rows // self._with_rows(parts))

    def part(self, index: int, parts: int) -> Part:
        """One of so many parts. They differ by at most one row, but for the last ones: those have no rows if
        there are not two for each, as a batch of one row cannot be trained on by all models."""
        with_rows = self._with_rows(parts)
        cuts = (self.num_rows * min(i, with_rows) // with_rows for i in (index, index + 1))
        start, stop = (self._bits.after(cut) for cut in cuts)
        spans = rows_of(self._spans, start, stop)
        stops = list(accumulate((span.num_rows for span in spans), initial=start))
        mine = Bits(stop - start)
        for first, last in mine.pieces():
            mine.write(first, self._bits.read(start + first, start + last))
        return Part(spans=spans, places=tuple(pairwise(stops)), bits=mine)

    def _with_rows(self, parts: int) -> int:
        return max(1, min(parts, self.num_rows // 2))


def first_parts(spans: Sequence[Span], dealt: Sequence[tuple[Span, ...]]) -> list[Part]:
    """The parts of the first leg of an epoch, as all rows were dealt."""
    of_shard: dict[str, list[tuple[Span, int]]] = {}
    for span, first in zip(spans, accumulate((s.num_rows for s in spans), initial=0), strict=False):
        of_shard.setdefault(span.shard, []).append((span, first))

    def place(span: Span) -> tuple[int, int]:
        (start,) = (
            first + span.start - whole.start
            for whole, first in of_shard[span.shard]
            if whole.start <= span.start and span.stop <= whole.stop
        )
        return start, start + span.num_rows

    return [Part(spans=part, places=tuple(map(place, part))) for part in dealt]


def undone(part: Part, leg: Leg, epoch: int, fields: Mapping[str, FieldSpec]) -> Bits | None:
    """Which rows of the spans of `part` the leg did not read; None if it did not read this part. Opens the
    files of a stream. Raises `DataError`."""
    rows = part.rows(fields)
    bits = Bits(sum(span.num_rows for span in part.spans))
    if not len(rows):
        return bits
    tail = _tail(rows, leg, epoch)
    if tail is None:
        return None
    for numbers in tail:
        bits.set(rows.numbers(numbers) if isinstance(rows, Picked) else numbers)
    return bits


def _tail(rows: AnyRows, leg: Leg, epoch: int) -> Iterator[RowNumbers] | None:
    cursor = cursor_of(rows, leg.seed)
    if cursor.fingerprint in leg.positions:
        return iter([order_of(rows, cursor, epoch)[leg.positions[cursor.fingerprint] :]])
    try:
        reader = StreamReader(rows, leg.seed)
    except DataError:  # its chunks do not allow it: it was no stream
        return None
    reader.close()
    position = leg.positions.get(reader.state_dict()["fingerprint"])
    if position is None:
        return None
    starts = range(position, len(rows), _DRAWN_AGAIN)
    return (reader.rows_at(epoch, start, min(start + _DRAWN_AGAIN, len(rows))) for start in starts)


def join(spans: Sequence[Span], parts: Sequence[Part], undone: Mapping[int, Bits]) -> Remainder:
    """What is left, from what was not read of each of the parts."""
    bits = Bits(sum(span.num_rows for span in spans))
    for index, mine in undone.items():
        done = 0
        for start, stop in parts[index].places:
            for first, last in bits.pieces(start, stop):
                bits.write(first, mine.read(done + first - start, done + last - start))
            done += stop - start
    return Remainder(spans, bits)
