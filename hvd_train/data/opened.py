"""A shard that is open for reading: what `Rows` needs of one, and how one is read that is a file."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, final

from hvd_train.data.blocks import rows_per_block
from hvd_train.data.damage import Range, Unread, read_undamaged
from hvd_train.data.format import Array, FieldSpec, ShardInfo
from hvd_train.data.hdf5.file import ShardFile
from hvd_train.data.header_labels import require_as_indexed
from hvd_train.data.places import Places, places_of_fields
from hvd_train.data.verify import Verifier
from hvd_train.errors import DataError, UnsupportedShard

_DAMAGED_BYTES = 1 << 20
"""Of a dataset without chunks and checksums: left out together where they cannot be read."""


class OpenShard(Protocol):
    """The rows of one shard. Raises `DataError` where they cannot be read."""

    @property
    def info(self) -> ShardInfo:
        """Its header."""

    @property
    def file(self) -> ShardFile | None:
        """The file that the rows are in; None if they are in none."""

    def read_into(self, fields: Mapping[str, Array], ranges: Sequence[Range], *, verify: bool) -> None:
        """Reads rows: those of `ranges`, each not empty and after the one before, into the array of each
        field, [rows, *shape].

        Args:
            verify: compare them with the checksums of their file when they are first read.
        """

    def read_undamaged(
        self, fields: Mapping[str, Array], ranges: Sequence[Range], *, verify: bool
    ) -> Iterator[Unread]:
        """The same, of the rows that can be read. Yields those that cannot, some of them once a field; in
        the arrays they are 0."""

    def close(self) -> None:
        """May be called twice."""


@final
class Opener:
    """Opens the files of shards, each of which must stay the one that was opened first.

    Args:
        fields: what is read of them.
        copies: of files, which are opened in their place.
        known: the headers of shards that were read before; those that are read are added.
    """

    def __init__(
        self, fields: Mapping[str, FieldSpec], copies: Mapping[str, str], known: dict[str, ShardInfo]
    ) -> None:
        self._fields = fields
        self._copies = copies
        self._infos = known
        self._identities: dict[str, tuple[int, int]] = {}
        self._texts = any(field.dtype.startswith("S") for field in fields.values())
        self._places = places_of_fields(fields)

    def open(self, path: str) -> ShardFile:
        """The file of a shard. Raises `DataError` for another file than before."""
        known = self._infos.get(path)
        if known is not None and known.indexed is not None and path not in self._identities:
            inputs, targets = known.indexed
            shard = self._file(path, replace(self._places, inputs=inputs, targets=targets))
            try:
                require_as_indexed(shard, known)
            except DataError:
                shard.close()
                raise
        else:
            shard = self._file(path, self._places)
        first = self._infos.setdefault(path, shard.info)
        identity = self._identities.setdefault(path, shard.identity)
        is_another = all(map(operator.ne, identity, shard.identity))
        if shard.info.fields != self._fields or not shard.info.continues(first) or is_another:
            shard.close()
            raise DataError(
                f"{path}: the file was replaced after the run began, or this host sees another one under its "
                "name. Restore the file that the run began with, or start a new run."
            )
        return shard

    def _file(self, path: str, places: Places) -> ShardFile:
        return ShardFile(path, places, texts=self._texts, copy=self._copies.get(places.file_of(path)[0], ""))


@final
class OpenFile:
    """The rows of a shard that is a file, one field after the other.

    Args:
        open_file: opens the file; called again where rows cannot be read, since the handle of a network file
            system may be stale.
        verifiers: of the fields that were read before; outlives the open file.
    """

    def __init__(self, open_file: Callable[[], ShardFile], verifiers: dict[str, Verifier]) -> None:
        self._open_file = open_file
        self._verifiers = verifiers
        self.file = open_file()
        self.info = self.file.info

    def read_into(self, fields: Mapping[str, Array], ranges: Sequence[Range], *, verify: bool) -> None:
        """See `OpenShard`."""
        for name, out in fields.items():
            self._read(name, ranges, out, verify)

    def read_undamaged(
        self, fields: Mapping[str, Array], ranges: Sequence[Range], *, verify: bool
    ) -> Iterator[Unread]:
        """See `OpenShard`."""
        for name, out in fields.items():
            if verify:
                self._verifier(name)
            try:
                self._read(name, ranges, out, verify)
            except UnsupportedShard:
                raise
            except DataError:
                yield from self._around_damage(name, ranges, out, verify)

    def close(self) -> None:
        """Closes the file."""
        self.file.close()

    def _around_damage(
        self, name: str, ranges: Sequence[Range], out: Array, verify: bool
    ) -> Iterator[Unread]:
        self.file.close()
        self.file, at = self._open_file(), 0
        unit = self._damaged_together(name, verify)
        for start, stop in ranges:
            end = at + stop - start
            for rows, error in read_undamaged(
                lambda rows, into: self._read(name, [rows], into, verify), (start, stop), out[at:end], unit
            ):
                yield Unread(rows, at + rows[0] - start, error)
            at = end

    def _damaged_together(self, name: str, verify: bool) -> int:
        """Rows of a checksummed block, else of a chunk, else of 1 MiB."""
        info = self.info
        if verify and info.checksum_rows:
            return info.checksum_rows
        if info.layouts[name].chunk:
            return info.layouts[name].band_rows
        return rows_per_block(info.fields[name], _DAMAGED_BYTES)

    def _read(self, name: str, ranges: Sequence[Range], out: Array, verify: bool) -> None:
        if verify:
            self._verifier(name).read_into(self.file, ranges, out)
        else:
            self.file.read_into(name, ranges, out)

    def _verifier(self, name: str) -> Verifier:
        if name not in self._verifiers:
            self._verifiers[name] = Verifier(self.file, name)
        return self._verifiers[name]
