"""Row ranges of several shards, addressed as one."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import final

import numpy as np
import numpy.typing as npt

from hvd_train.data.blocks import row_bytes
from hvd_train.data.damage import Range
from hvd_train.data.deal import Span, rows_of
from hvd_train.data.format import Array, FieldSpec, ShardInfo
from hvd_train.data.layout import HELD_BYTES, Layout, require_few_decodings
from hvd_train.data.numbering import Origins
from hvd_train.data.opened import Opener, OpenFile, OpenShard
from hvd_train.data.places import places_of_fields
from hvd_train.data.python.registry import made_of
from hvd_train.data.python.shard import PythonShard
from hvd_train.data.screen import MARK, USABLE, Screen
from hvd_train.data.verify import Verifier
from hvd_train.errors import DataError

# A rank may hold more shards than the system lets one process open.
_MAX_OPEN = 32

_MOST_HELD_BYTES = 2 * HELD_BYTES
"""Decoded rows that the open files hold together (see `Layout.held_rows`), if they are more than one."""


@final
class Rows:
    """The concatenation of `spans`, rows 0 to n - 1; every batch is {name: array [rows, *shape]}.

    Arrays have the dtypes of `fields`. Files are opened when they are first read. One thread at a time.
    Every method raises `DataError` where a shard cannot be read, or is not what was written.

    Args:
        screen: marks the rows that are left out; batches have the marks under `MARK`. None: no marks.
        known: the headers of shards that were read before: a file with another one is an error when it is
            opened.
    """

    mark = b""
    """Tells some rows of the spans from all of them; empty, as these are all."""

    def __init__(
        self,
        spans: Sequence[Span],
        fields: Mapping[str, FieldSpec],
        *,
        verify: bool = True,
        screen: Screen | None = None,
        known: Sequence[ShardInfo] = (),
        copies: Mapping[str, str] | None = None,
    ) -> None:
        self.spans = tuple(span for span in spans if span.num_rows > 0)
        self.fields = fields
        self.verify = verify
        """Whether rows are compared with the checksums of their file when they are first read. Off to
        measure what that costs, and for a summary of rows that are used later; may be changed between two
        reads."""
        self.screen = screen
        """What marks the rows; None for none."""
        self.copies = copies or {}
        """Copies of files, which are read in their place."""
        self._stops = list(accumulate(span.num_rows for span in self.spans))
        self._open: OrderedDict[str, OpenShard] = OrderedDict()
        self._infos = {info.path: info for info in known}
        self._opener = Opener(fields, self.copies, self._infos)
        self._verifiers: dict[str, dict[str, Verifier]] = {}

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all fields."""
        return sum(row_bytes(field) for field in self.fields.values())

    @property
    def are_made(self) -> bool:
        """Whether some of them are from Python datasets, which make a whole sample for a part of it."""
        return any(made_of(path) for path in {span.shard for span in self.spans})

    def empty(self, num_rows: int) -> dict[str, Array]:
        """Uninitialised arrays of `num_rows` rows."""
        try:
            batch = {n: np.empty((num_rows, *f.shape), np.dtype(f.dtype)) for n, f in self.fields.items()}
            if self.screen is not None:
                batch[MARK] = np.empty(num_rows, np.uint8)
            return batch
        except MemoryError:
            raise self.too_large(num_rows, num_rows * self.row_bytes) from None

    def too_large(self, num_rows: int, num_bytes: int) -> DataError:
        """That there is no memory for so many rows, to be raised."""
        return DataError(
            f"{self.spans[0].shard}: {num_rows} rows need {num_bytes} bytes of memory, which this "
            "process cannot allocate. Read them with data.reading = 'stream', or in smaller batches."
        )

    def read(self, start: int, stop: int) -> dict[str, Array]:
        """Rows `start` up to `stop`. Raises IndexError outside 0..n."""
        batch = self.empty(stop - start)
        self.read_into(batch, 0, start, stop)
        return batch

    def read_into(self, batch: Mapping[str, Array], at: int, start: int, stop: int) -> None:
        """Reads rows `start` up to `stop` into the arrays of `batch`, from their row `at` on."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows {start} to {stop} of {len(self)}")
        while start < stop:
            path, ranges = self._next(start, stop)
            rows = sum(end - first for first, end in ranges)
            part = {name: array[at : at + rows] for name, array in batch.items()}
            marks = part.pop(MARK, None)
            if self.screen is None or marks is None:
                self.shard(path).read_into(part, ranges, verify=self.verify)
            else:
                self._read_screened(self.screen, path, ranges, part, marks)
            at += rows
            start += rows

    def _read_screened(
        self, screen: Screen, path: str, ranges: Sequence[Range], part: Mapping[str, Array], marks: Array
    ) -> None:
        marks.fill(USABLE)
        shard = self.shard(path)
        if screen.skips_damage:
            for unread in shard.read_undamaged(part, ranges, verify=self.verify):
                first, last = unread.rows
                at = marks[unread.at : unread.at + last - first]
                screen.leave_out(path, unread.rows, str(unread.error), at)
        else:
            shard.read_into(part, ranges, verify=self.verify)
        screen.mark(path, ranges, part, marks)

    def _next(self, start: int, stop: int) -> tuple[str, list[tuple[int, int]]]:
        """The shard that row `start` is in, and its rows from there on up to `stop` or another shard."""
        index = bisect_right(self._stops, start)
        path, ranges = self.spans[index].shard, list[tuple[int, int]]()
        while start < stop and index < len(self.spans) and self.spans[index].shard == path:
            span, end = self.spans[index], min(stop, self._stops[index])
            first = span.stop - (self._stops[index] - start)
            if ranges and first < ranges[-1][1]:
                break
            ranges.append((first, first + end - start))
            start, index = end, index + 1
        return path, ranges

    def locate(self, start: int, stop: int) -> tuple[Span, ...]:
        """Where rows `start` up to `stop` are."""
        return rows_of(self.spans, start, stop)

    def origins(self, numbers: npt.NDArray[np.int64]) -> Origins:
        """Where each of the rows `numbers` is."""
        index = np.searchsorted(np.asarray(self._stops, np.int64), numbers, side="right")
        last = np.array([span.stop for span in self.spans], np.int64)[index]
        stops = np.asarray(self._stops, np.int64)[index]
        return Origins(self.spans, index, last - stops + numbers)

    def info(self, span: Span) -> ShardInfo:
        """The header of the shard that `span` is in."""
        known = self._infos.get(span.shard)
        return self.shard(span.shard).info if known is None else known

    def files(self) -> list[str]:
        """The files that the rows are in, each once."""
        places = places_of_fields(self.fields)
        return list(dict.fromkeys(places.file_of(span.shard)[0] for span in self.spans))

    def layouts(self) -> Iterator[tuple[str, Mapping[str, Layout]]]:
        """The path of every shard, and how its datasets are stored. Opens every file that is not known."""
        for span in {span.shard: span for span in self.spans}.values():
            yield span.shard, self.info(span).layouts

    def require_in_order(self) -> None:
        """Raises `DataError` if reading these rows in order, a batch at a time, would decode a chunk many
        times. Opens every file."""
        for path, layouts in self.layouts():
            require_few_decodings(path, layouts)

    def close(self) -> None:
        """Closes all files; a later read opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def shard(self, path: str) -> OpenShard:
        """The shard, open. It stays theirs, and may be closed by the next call."""
        shard = self._open.pop(path, None)
        if shard is None:
            shard = self._open_shard(path)
            while self._open and (len(self._open) >= _MAX_OPEN or self._held_bytes(shard) > _MOST_HELD_BYTES):
                self._open.popitem(last=False)[1].close()
        self._open[path] = shard
        return shard

    def _held_bytes(self, shard: OpenShard) -> int:
        """Of decoded rows, at most: in `shard` and in the files that are open."""
        return sum(s.info.held_bytes for s in (shard, *self._open.values()))

    def _open_shard(self, path: str) -> OpenShard:
        made = made_of(path)
        if made is None:
            return OpenFile(partial(self._opener.open, path), self._verifiers.setdefault(path, {}))
        spans = [(span.start, span.stop) for span in self.spans if span.shard == path]
        return PythonShard(made, places_of_fields(self.fields), spans)
