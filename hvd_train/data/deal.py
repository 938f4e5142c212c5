"""Which rank reads which rows: pure functions of the row ranges and the world size."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import floor
from types import MappingProxyType

from hvd_train.errors import DataError

VALIDATION_BLOCKS = 64


@dataclass(frozen=True, order=True)
class Span:
    """Rows `start` up to, not including, `stop` of the shard with this path."""

    shard: str
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Rows in the span."""
        return self.stop - self.start


def deal(
    spans: Sequence[Span],
    world_size: int,
    within: int | None = None,
    units: Mapping[str, int] = MappingProxyType({}),
) -> list[tuple[Span, ...]]:
    """The rows of each rank: every row goes to exactly one rank.

    - As many shards as ranks: rank i reads shard i.
    - More shards than ranks: whole shards, the largest first, each to the rank with the fewest rows so
      far (longest processing time first). Rows per rank then differ by at most the largest shard.
    - Fewer: every shard gets one rank, and each further rank goes to the shard whose ranks have most
      rows. No allotment of ranks to shards has a smaller largest part; with p ranks, m shards and n rows
      that part is at most ceil(n / (p - m + 1)). Parts of one shard differ by at most one row.

    If ranks then differ by more than `within` rows, rows move from the fullest ranks to the emptiest until
    they do not.

    Ranks for which no row is left have an empty tuple. Spans of one shard count as one shard.

    Args:
        within: at least 1; None: no row moves.
        units: rows at whose multiples a shard is best cut, such as those of its chunks. Moving rows are cut
            off there if that is not further from where it should be than a quarter of `within`, and of what a
            rank has.
    """
    shards = _by_shard(spans)
    dealt = (_whole_shards if len(shards) > world_size else _cut_shards)(shards, world_size)
    return dealt if within is None else _level(spans, dealt, within, units)


def _by_shard(spans: Sequence[Span]) -> list[tuple[Span, ...]]:
    shards: dict[str, list[Span]] = {}
    for span in spans:
        if span.num_rows > 0:
            shards.setdefault(span.shard, []).append(span)
    return [tuple(shard) for shard in shards.values()]


def _num_rows(spans: Sequence[Span]) -> int:
    return sum(span.num_rows for span in spans)


def _whole_shards(shards: list[tuple[Span, ...]], world_size: int) -> list[tuple[Span, ...]]:
    taken: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for fewer, index in sorted((-_num_rows(shard), index) for index, shard in enumerate(shards)):
        load, rank = loads[0]
        taken[rank].append(index)
        heapq.heapreplace(loads, (load - fewer, rank))
    return [tuple(span for index in sorted(indices) for span in shards[index]) for indices in taken]


def _cut_shards(shards: list[tuple[Span, ...]], world_size: int) -> list[tuple[Span, ...]]:
    ranks = [1] * len(shards)
    # The shard whose parts are largest comes first. Its key is exact: rows / ranks as a float is
    # correctly rounded, hence the same everywhere, and ties go to the shard that comes first.
    heap = [(-float(_num_rows(shard)), index) for index, shard in enumerate(shards)]
    heapq.heapify(heap)
    for _ in range(world_size - len(shards)):
        if not heap or heap[0][0] >= -1:
            break
        index = heap[0][1]
        ranks[index] += 1
        heapq.heapreplace(heap, (-_num_rows(shards[index]) / ranks[index], index))
    parts = [part for shard, count in zip(shards, ranks, strict=True) for part in _cut(shard, count)]
    return parts + [()] * (world_size - len(parts))


def _cut(spans: tuple[Span, ...], parts: int) -> list[tuple[Span, ...]]:
    total = _num_rows(spans)
    bounds = [total * i // parts for i in range(parts + 1)]
    return [rows_of(spans, start, stop) for start, stop in pairwise(bounds)]


def _level(
    spans: Sequence[Span], dealt: Sequence[Sequence[Span]], within: int, units: Mapping[str, int]
) -> list[tuple[Span, ...]]:
    """Each move but a few brings one of two ranks to its equal share, or close to it, and cuts one span at
    most. After as many moves as ranks all are exact, so that they come to an end."""
    parts = [list(part) for part in dealt]
    loads = [_num_rows(part) for part in parts]
    share, extra = divmod(sum(loads), len(loads))
    moves = 0
    while max(loads) - min(loads) > within:
        full, empty = loads.index(max(loads)), loads.index(min(loads))
        rows = max(1, min(loads[full] - share, share + (extra > 0) - loads[empty]))
        most_off = min(within, share) // 4 if moves < len(loads) else 0
        moved = _take(parts[full], rows, most_off, units)
        parts[empty] += moved
        loads[full] -= _num_rows(moved)
        loads[empty] += _num_rows(moved)
        extra -= loads[empty] == share + 1
        moves += 1
    order = {span.shard: index for index, span in enumerate(spans)}
    return [_joined(sorted(part, key=lambda s: (order[s.shard], s.start))) for part in parts]


def _take(part: list[Span], rows: int, most_off: int, units: Mapping[str, int]) -> list[Span]:
    """Takes the last `rows` rows off, or up to `most_off` more or fewer if a span is then cut at a unit."""
    taken = []
    while rows > 0:
        span = part.pop()
        cut, unit = span.stop - rows, units.get(span.shard, 1)
        nearest = (cut + unit // 2) // unit * unit
        if span.start < nearest < span.stop and abs(nearest - cut) <= most_off:
            cut = nearest
        if cut > span.start:
            part.append(Span(span.shard, span.start, cut))
            taken.append(Span(span.shard, cut, span.stop))
            break
        taken.append(span)
        rows -= span.num_rows
    return taken


def _joined(spans: Sequence[Span]) -> tuple[Span, ...]:
    """The same rows without cuts between spans of which one ends where the next begins."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].shard == span.shard and joined[-1].stop == span.start:
            span = Span(span.shard, joined.pop().start, span.stop)
        joined.append(span)
    return tuple(joined)


def rows_of(spans: Sequence[Span], start: int, stop: int) -> tuple[Span, ...]:
    """Rows `start` up to `stop` of the concatenation of `spans`."""
    found = []
    offset = 0
    for span in spans:
        first, last = max(start - offset, 0), min(stop - offset, span.num_rows)
        if first < last:
            found.append(Span(span.shard, span.start + first, span.start + last))
        offset += span.num_rows
    return tuple(found)


def split_validation(spans: Sequence[Span], fraction: float) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """Cuts floor(fraction * rows) rows off for validation: (training spans, validation spans).

    Every span is divided into up to 64 stretches of equal length and gives the last rows of each, so
    that data sorted by class or in time is seen from one end to the other. The same rows for every world
    size. Raises `DataError` where one of the parts would be empty.
    """
    total = _num_rows(spans)
    if not 0 < floor(fraction * total) < total:
        raise DataError(
            f"data.validation = {fraction}: of {total} training rows that leaves {floor(fraction * total)} "
            "for validation. Expected at least 1 row in each part: choose another fraction, or give a path."
        )
    train: list[Span] = []
    validation: list[Span] = []
    offset = 0
    for span in spans:
        rows = span.num_rows
        stretches = min(rows, VALIDATION_BLOCKS)
        begin = 0
        for i in range(1, stretches + 1):
            last, end = rows * (i - 1) // stretches, rows * i // stretches
            # Cumulative rounding: the shares of all stretches add up to floor(fraction * total).
            share = floor(fraction * (offset + end)) - floor(fraction * (offset + last))
            if share:
                train.append(Span(span.shard, span.start + begin, span.start + end - share))
                validation.append(Span(span.shard, span.start + end - share, span.start + end))
                begin = end
        train.append(Span(span.shard, span.start + begin, span.stop))
        offset += rows
    return tuple(s for s in train if s.num_rows), tuple(validation)
