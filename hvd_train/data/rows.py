"""Row ranges of several shards, addressed as one."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import final

import numpy as np
import numpy.typing as npt

from hvd_train.data.blocks import row_bytes, rows_per_block
from hvd_train.data.damage import Range, read_undamaged
from hvd_train.data.deal import Span, rows_of
from hvd_train.data.format import Array, FieldSpec, ShardInfo
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.header_labels import require_as_indexed
from hvd_train.data.layout import HELD_BYTES, Layout, repack_line
from hvd_train.data.numbering import Origins
from hvd_train.data.places import Places, places_of_fields
from hvd_train.data.screen import MARK, USABLE, Screen
from hvd_train.data.verify import Verifier
from hvd_train.errors import DataError, UnsupportedShard

# A rank may hold more shards than the system lets one process open.
_MAX_OPEN = 32

_MOST_HELD_BYTES = 2 * HELD_BYTES
"""Decoded rows that the open files hold together (see `Layout.held_rows`), if they are more than one."""

_DAMAGED_BYTES = 1 << 20
"""Of a dataset without chunks and checksums: left out together where they cannot be read."""

_MOST_DECODES = 4
"""In one pass over rows in order, of each chunk."""


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
        self._open: OrderedDict[str, ShardFile] = OrderedDict()
        self._infos = {info.path: info for info in known}
        self._identities: dict[str, tuple[int, int]] = {}
        self._verifiers: dict[tuple[str, str], Verifier] = {}

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all fields."""
        return sum(row_bytes(field) for field in self.fields.values())

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
                for name, out in part.items():
                    self._read(self.shard(path), name, ranges, out)
            else:
                self._read_screened(self.screen, path, ranges, part, marks)
            at += rows
            start += rows

    def _read_screened(
        self, screen: Screen, path: str, ranges: Sequence[Range], part: Mapping[str, Array], marks: Array
    ) -> None:
        marks.fill(USABLE)
        for name, out in part.items():
            shard = self.shard(path)
            if self.verify:
                self._verifier(shard, name)
            try:
                self._read(shard, name, ranges, out)
            except UnsupportedShard:
                raise
            except DataError:
                if not screen.skips_damage:
                    raise
                self._leave_out_damaged(screen, path, name, ranges, out, marks)
        screen.mark(path, ranges, part, marks)

    def _leave_out_damaged(
        self, screen: Screen, path: str, name: str, ranges: Sequence[Range], out: Array, marks: Array
    ) -> None:
        # From a file that is opened anew: the handle of a network file system may be stale.
        self._open.pop(path).close()
        shard, at = self.shard(path), 0
        for start, stop in ranges:
            end = at + stop - start
            unit = self._damaged_together(shard, name)
            for (first, last), error in read_undamaged(
                lambda rows, into: self._read(shard, name, [rows], into), (start, stop), out[at:end], unit
            ):
                screen.leave_out(
                    path, (first, last), str(error), marks[at + first - start : at + last - start]
                )
            at = end

    def _damaged_together(self, shard: ShardFile, name: str) -> int:
        """Rows of a checksummed block, else of a chunk, else of 1 MiB."""
        info = shard.info
        if self.verify and info.checksum_rows:
            return info.checksum_rows
        if info.layouts[name].chunk:
            return info.layouts[name].band_rows
        return rows_per_block(info.fields[name], _DAMAGED_BYTES)

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

    def _read(self, shard: ShardFile, name: str, ranges: Sequence[tuple[int, int]], out: Array) -> None:
        if not self.verify:
            shard.read_into(name, ranges, out)
            return
        self._verifier(shard, name).read_into(shard, ranges, out)

    def _verifier(self, shard: ShardFile, name: str) -> Verifier:
        key = (shard.info.path, name)
        if key not in self._verifiers:
            self._verifiers[key] = Verifier(shard, name)
        return self._verifiers[key]

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
        return list(dict.fromkeys(self._places.file_of(span.shard)[0] for span in self.spans))

    def layouts(self) -> Iterator[tuple[str, Mapping[str, Layout]]]:
        """The path of every shard, and how its datasets are stored. Opens every file that is not known."""
        for span in {span.shard: span for span in self.spans}.values():
            yield span.shard, self.info(span).layouts

    def require_in_order(self) -> None:
        """Raises `DataError` if reading these rows in order, a batch at a time, would decode a chunk many
        times. Opens every file."""
        for path, layouts in self.layouts():
            for name, layout in layouts.items():
                if layout.decodes > _MOST_DECODES:
                    raise DataError(
                        f"{path}: dataset `{name}` is compressed in {layout.in_words()}. To read its rows in "
                        f"order, each chunk has to be decoded {layout.decodes} times; expected at most "
                        f"{_MOST_DECODES}. Write the file in smaller chunks: "
                        f"`{repack_line(path, name, layouts)}`."
                    )

    def close(self) -> None:
        """Closes all files; a later read opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def shard(self, path: str) -> ShardFile:
        """The open file of a shard. It stays theirs, and may be closed by the next call."""
        shard = self._open.pop(path, None)
        if shard is None:
            shard = self._open_shard(path)
            while self._open and (len(self._open) >= _MAX_OPEN or self._held_bytes(shard) > _MOST_HELD_BYTES):
                self._open.popitem(last=False)[1].close()
        self._open[path] = shard
        return shard

    def _held_bytes(self, shard: ShardFile) -> int:
        """Of decoded rows, at most: in `shard` and in the files that are open."""
        return sum(s.info.held_bytes for s in (shard, *self._open.values()))

    def _shard_file(self, path: str, places: Places) -> ShardFile:
        texts = any(field.dtype.startswith("S") for field in self.fields.values())
        return ShardFile(path, places, texts=texts, copy=self.copies.get(places.file_of(path)[0], ""))

    @cached_property
    def _places(self) -> Places:
        return places_of_fields(self.fields)

    def _open_shard(self, path: str) -> ShardFile:
        known = self._infos.get(path)
        if known is not None and known.indexed is not None and path not in self._identities:
            inputs, targets = known.indexed
            shard = self._shard_file(path, replace(self._places, inputs=inputs, targets=targets))
            try:
                require_as_indexed(shard, known)
            except DataError:
                shard.close()
                raise
        else:
            shard = self._shard_file(path, self._places)
        first = self._infos.setdefault(path, shard.info)
        identity = self._identities.setdefault(path, shard.identity)
        is_another = all(map(operator.ne, identity, shard.identity))
        if shard.info.fields != self.fields or not shard.info.continues(first) or is_another:
            shard.close()
            raise DataError(
                f"{path}: the file was replaced after the run began, or this host sees another one under its "
                "name. Restore the file that the run began with, or start a new run."
            )
        return shard
