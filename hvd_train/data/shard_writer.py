"""Shards from a program's own samples, of one process or of many ranks at once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, final

import numpy as np

from hvd_train.data.format import Compression, FieldSpec, Manifest, ShardEntry
from hvd_train.data.manifest import load_manifest
from hvd_train.data.part_writer import Layout, Part, entries_of, join, listed, shard_name
from hvd_train.data.samples import Samples
from hvd_train.data.scratch import Scratch, locked, tidy
from hvd_train.data.shard_file import ShardBuilder, Storage
from hvd_train.data.spool import Spool
from hvd_train.data.unfinished import Unfinished
from hvd_train.errors import DataError
from hvd_train.io.atomic import complete


class Ranks(Protocol):
    """What is used of a communicator: one of mpi4py, such as MPI.COMM_WORLD, or what `connect` returns."""

    @property
    def rank(self) -> int:
        """Of this process."""

    @property
    def size(self) -> int:
        """Of the world."""

    def allgather(self, obj: Any, /) -> list[Any]:
        """Collective: the values of all ranks."""


class _Alone:
    rank, size = 0, 1

    def allgather(self, obj: Any, /) -> list[Any]:
        return [obj]


@final
class ShardWriter:
    """Writes samples as one part of a data set, HDF5 shards and their manifest, as `shard write` does.

        with hvd_train.ShardWriter("data", shards=4) as writer:
            writer.append({"inputs": image, "targets": 3})

    Samples are kept on disk, in `out`, until there are enough for a shard. The shards and then the manifest
    appear when the writer is closed; after an exception in the block nothing of it is left. With `comm` every
    rank appends samples of its own, which become shards of their own. `close`, and so the end of the block,
    is collective then; nothing else is.

    Args:
        out: folder; created if missing. With `comm`, one that all ranks see.
        part: "train" or "validation"; the manifest keeps both.
        shards: number of files, of all ranks together. They have equal numbers of rows on each rank.
        rows_per_shard: instead of `shards`: rows of each file; the last one of a rank may have fewer.
        fields: dtype and shape of each field of a sample, such as {"inputs": ("float32", (28, 28))}. Without
            it the first sample decides. Values are converted if none changes but by rounding.
        inputs, targets: names of the fields that a training takes unless it is told otherwise.
        scale: factor for integer inputs, recorded in the shards.
        class_names: of the classes in the targets, in the order of their numbers; recorded in the manifest.
        compression: "none", "gzip", "lz4", "zstd" or "blosc".
        chunk_rows: rows of an HDF5 chunk. Default: contiguous, with compression chunks of about 256 KiB.
        force: replace a part that exists.
        comm: a communicator of mpi4py, or of `hvd_train.connect`.

    Raises `DataError` for a sample unlike the first, a part that exists, and options that cannot be; OSError
    where the folder cannot be written.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        part: Part = "train",
        shards: int | None = None,
        rows_per_shard: int | None = None,
        fields: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
        inputs: str = "inputs",
        targets: str = "targets",
        scale: float | None = None,
        class_names: tuple[str, ...] = (),
        compression: Compression = "none",
        chunk_rows: int | None = None,
        force: bool = False,
        comm: Ranks | None = None,
    ) -> None:
        self._comm: Ranks = comm or _Alone()
        self._shards = _num_shards(shards, rows_per_shard, self._comm.size)
        self._rows_per_shard = rows_per_shard
        _require_rows(rows_per_shard=rows_per_shard, chunk_rows=chunk_rows)
        self._folder, self._part = Path(out), part
        self._storage = Storage(
            fields={},
            inputs=inputs,
            targets=targets,
            scale=scale,
            class_names=class_names,
            compression=compression,
            chunk_rows=chunk_rows,
        )
        self._force = force
        tidy(self._folder)
        self._remove_unfinished()
        self._refuse_existing()
        self._samples = Samples(fields, (inputs, targets))
        self._scratch = Scratch(self._folder, [part], "beside")
        self._spool: Spool | None = None
        self._renamed: list[Path] = []
        self._is_recorded = False
        self._made: list[tuple[Path, ShardEntry, int]] = []
        self._closed = False

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def append(self, sample: Mapping[str, Any]) -> None:
        """Takes one sample: each field an array, or a scalar. Raises `DataError` with the number of the row,
        counted on this rank, for one that is not like the first."""
        arrays = {name: self._samples.array(name, value) for name, value in sample.items()}
        self.append_batch({name: array[np.newaxis] for name, array in arrays.items()})

    def append_batch(self, batch: Mapping[str, Any]) -> None:
        """Takes several samples: each field an array [samples, ...]. Errors are those of `append`."""
        if self._closed:
            raise DataError(f"{self._folder}: the writer is closed. Make another one for another part.")
        block = self._samples.take(batch)
        if self._spool is None:
            self._storage = replace(self._storage, fields=self._samples.fields)
            self._spool = self._new_spool()
        length = len(next(iter(block.values())))
        at = 0
        while at < length:
            room = (self._rows_per_shard or length + self._spool.num_rows) - self._spool.num_rows
            self._spool.append({name: array[at : at + room] for name, array in block.items()})
            at += room
            if self._spool.pending_bytes >= _PENDING_BYTES:
                self._spool.flush()
            if self._spool.num_rows == self._rows_per_shard:
                self._make([self._spool.num_rows])

    def close(self) -> Manifest:
        """Makes the shards and the manifest; returns that. Collective with `comm`. May be called once.

        Raises `DataError` on every rank if no rank has samples, if ranks have unlike ones, and if one of them
        cannot write.
        """
        self._closed = True
        try:
            self._agree(self._finish)
            reports = self._comm.allgather((dict(self._storage.fields), [made[1:] for made in self._made]))
            fields = self._common_fields([fields for fields, _ in reports])
            self._storage = replace(self._storage, fields=fields)
            counts = [len(made) for _, made in reports]
            names = [shard_name(self._part, i, sum(counts)) for i in range(sum(counts))]
            first = sum(counts[: self._comm.rank])
            made = [made for _, shards in reports for made in shards]
            entries = [replace(entry, file=name) for (entry, _), name in zip(made, names, strict=True)]
            num_classes = max(classes for _, classes in made) or None
            is_first = self._comm.rank == 0
            with locked(self._folder) if is_first else nullcontext():
                self._agree(lambda: self._record(entries) if is_first else None)
                self._agree(lambda: self._rename(names[first:]))
                self._agree(lambda: self._publish(entries, num_classes) if is_first else None)
            self._renamed = []
        finally:
            self.abandon()
        manifest = load_manifest(self._folder)
        assert manifest is not None  # written above
        return manifest

    def abandon(self) -> None:
        """Removes what is not published. Not collective; may be called twice."""
        self._closed = True
        for path in self._renamed:
            path.unlink(missing_ok=True)
        self._renamed = []
        if self._is_recorded:
            self._unfinished([]).end()
            self._is_recorded = False
        self._scratch.close()

    def _refuse_existing(self) -> None:
        """Also at the end: another program may have written it meanwhile."""
        if self._force:
            return
        there = [self._folder / entry.file for entry in entries_of(load_manifest(self._folder), self._part)]
        there += self._folder.glob(f"{self._part}-*-of-*.h5")
        if there:
            raise DataError(
                f"{there[0]}: exists. Give force=True to replace the {self._part} part, or another folder."
            )

    def _new_spool(self) -> Spool:
        return Spool(self._scratch.path / "rows", self._storage.fields)

    def _finish(self) -> None:
        """The shards of the rows that are left."""
        if self._spool is None or not self._spool.num_rows:
            return
        rank, size, rows = self._comm.rank, self._comm.size, self._spool.num_rows
        share = self._shards * (rank + 1) // size - self._shards * rank // size
        count = 1 if self._rows_per_shard else min(share, rows)
        self._make([b - a for a, b in pairwise(rows * i // count for i in range(count + 1))])

    def _make(self, sizes: list[int]) -> None:
        """Makes shards of the rows so far."""
        assert self._spool is not None  # there are rows
        for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
            path = self._scratch.path / f"{len(self._made)}.h5"
            builder = ShardBuilder(path, self._storage, size)
            try:
                left = size
                for block in self._spool.blocks(start):
                    piece = {name: array[:left] for name, array in block.items()}
                    builder.append(piece)
                    left -= len(next(iter(piece.values())))
                    if not left:
                        break
                entry = builder.finish()
            except BaseException:
                builder.abandon()
                path.unlink(missing_ok=True)
                raise
            self._made.append((path, entry, builder.num_classes or 0))
        self._spool.remove()

    def _agree(self, step: Any) -> None:
        """A step on each rank; collective. Raises `DataError` on every rank if it fails on one."""
        said = ""
        try:
            step()
        except (OSError, DataError) as error:
            said = f"{self._folder}: rank {self._comm.rank} cannot write its shards: {error}"
        failed = [text for text in self._comm.allgather(said) if text]
        if failed:
            raise DataError(failed[0], agreed=True)

    def _common_fields(self, fields: list[Mapping[str, FieldSpec]]) -> Mapping[str, FieldSpec]:
        ranks = [rank for rank, of_rank in enumerate(fields) if of_rank]
        if not ranks:
            raise DataError(f"{self._folder}: no samples. Expected at least 1: append some.", agreed=True)
        first = fields[ranks[0]]
        for rank in ranks:
            if fields[rank] != first:
                raise DataError(
                    f"{self._folder}: samples of rank {rank} are {_shown(fields[rank])}, but {_shown(first)} "
                    f"on rank {ranks[0]}. Expected the same on every rank: give `fields`.",
                    agreed=True,
                )
        return first

    def _rename(self, names: list[str]) -> None:
        join(self._folder, self._part, self._storage)
        for (path, _, _), name in zip(self._made, names, strict=False):
            complete(path, self._folder / name)
            self._renamed.append(self._folder / name)

    def _remove_unfinished(self) -> None:
        """What a writer renamed that was killed before it wrote the manifest."""
        if self._comm.rank == 0 and self._folder.is_dir():
            with locked(self._folder):
                self._unfinished([]).remove()

    def _unfinished(self, names: list[str]) -> Unfinished:
        scratch = self._scratch.path if names else None
        return Unfinished(self._folder, self._part, _REQUEST, names, list(self._storage.fields), scratch)

    def _record(self, entries: list[ShardEntry]) -> None:
        self._refuse_existing()
        self._is_recorded = True
        self._unfinished([entry.file for entry in entries]).add(entries, None)

    def _publish(self, entries: list[ShardEntry], num_classes: int | None) -> None:
        names = [entry.file for entry in entries]
        unfinished = self._unfinished(names)
        stale = {entry.file for entry in entries_of(load_manifest(self._folder), self._part)}
        stale.update(unfinished.others)
        layout = Layout(self._folder, self._part, [entry.num_samples for entry in entries], self._storage, "")
        listed(layout, entries, num_classes, self._scratch.path)
        for name in stale - set(names):
            (self._folder / name).unlink(missing_ok=True)
        unfinished.end()


_REQUEST = "ShardWriter"
_PENDING_BYTES = 8 << 20


def _shown(fields: Mapping[str, FieldSpec]) -> str:
    return ", ".join(f"`{name}` {field}" for name, field in fields.items())


def _num_shards(shards: int | None, rows_per_shard: int | None, num_ranks: int) -> int:
    """Shards of all ranks together, unless their rows are given. Raises `DataError`."""
    if shards is not None and rows_per_shard is not None:
        raise DataError("shards and rows_per_shard: expected one of them.")
    if shards is None:
        return num_ranks
    if shards < num_ranks:
        raise DataError(f"shards = {shards}: expected at least {num_ranks}, one for each rank.")
    return shards


def _require_rows(**given: int | None) -> None:
    for key, value in given.items():
        if value is not None and value < 1:
            raise DataError(f"{key} = {value}: expected at least 1.")
