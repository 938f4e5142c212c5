"""Writing the parts of a data set as shards, and the manifest next to them, from rows in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from hvd_train.data.facts import digest
from hvd_train.data.format import Compression, Manifest, is_class_dtype
from hvd_train.data.part_writer import Layout, Part, PartWriter, existing_shards
from hvd_train.data.shard_file import Storage
from hvd_train.data.shuffling import arranged
from hvd_train.data.sources.base import TARGETS, Block, Source
from hvd_train.data.splitting import ByFraction, ByGroup, Splitter
from hvd_train.data.survey_source import Seen, survey_source
from hvd_train.errors import DataError

Progress = Callable[[int, int], None]
"""Called with the rows that are written, and those there are."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be written of a source."""

    part: Part = "train"
    """Of all rows, or of those that no part of `split` gets."""
    shards: int = 1
    by_class: bool = False
    shuffle_seed: int | None = None
    split: Sequence[tuple[str, float]] = ()
    """Names and fractions of further parts, each of one shard. `validation` is listed in the same manifest;
    others get a folder of their name."""
    split_seed: int = 0
    stratify: bool = False
    group: str = ""
    compression: Compression = "none"
    chunk_rows: int | None = None
    scale: float | None = None
    """Instead of the scale of the source."""
    class_names: tuple[str, ...] = ()
    """Where the source knows none."""
    force: bool = False


def write_part(folder: str | Path, source: Source, **options: object) -> Manifest:
    """`write_shards` of a request with these `options`."""
    return write_shards(folder, source, Request(**options))  # type: ignore[arg-type]


def write_shards(
    folder: str | Path, source: Source, request: Request, progress: Progress = lambda *_: None
) -> Manifest:
    """Writes the rows of `source` as HDF5 shards into `folder`, and adds them to its manifest.

    Rows are split into parts, and those of a part shuffled if `shuffle_seed` is given, then cut into `shards`
    even row ranges, or with `by_class` into contiguous ranges of classes. Compression needs chunks and
    chooses their rows if `chunk_rows` is None; without either, datasets are contiguous. Files are renamed
    into place, the manifest last. If an earlier call with the same request and unchanged files was ended
    before that, its complete shards stay. Memory does not grow with the number of rows.

    Returns the manifest.

    Raises `DataError` where the part exists already and `force` is not set, the rows cannot be cut so, or
    the other part has other samples; OSError where the folder cannot be written.
    """
    _require(request, source)
    folder = Path(folder)
    seen = survey_source(source, strata=request.stratify or request.by_class, groups=bool(request.group))
    if not seen.num_rows:
        raise DataError(f"{source.name}: has no rows. Expected at least 1.")
    splitter = _splitter(request, seen)
    sizes = splitter.sizes() if splitter else [seen.num_rows]
    storage = Storage(
        fields=source.fields,
        scale=source.scale if request.scale is None else request.scale,
        class_names=source.class_names or request.class_names,
        compression=request.compression,
        chunk_rows=request.chunk_rows,
    )
    writers = _writers(folder, source, request, storage, sizes, seen)
    try:
        _write(source, request, splitter, writers, seen, progress)
        manifests = [writer.publish() for writer in reversed(writers)]
        for writer in writers:
            writer.end()
        return manifests[-1]
    finally:
        for writer in writers:
            writer.abandon()


def _require(request: Request, source: Source) -> None:
    if request.chunk_rows is not None and request.chunk_rows < 1:
        raise DataError(f"--chunk-rows {request.chunk_rows}: expected at least 1 row.")
    targets = source.fields[TARGETS]
    of_classes = {"--by-class": request.by_class, "--stratify": request.stratify}
    of_classes["--classes"] = bool(request.class_names)
    for option, on in of_classes.items():
        if on and (targets.shape or not is_class_dtype(targets.dtype)):
            raise DataError(
                f"{option}: targets are {targets.dtype} {list(targets.shape)}. Expected one class number "
                f"per sample: leave {option} out."
            )
    if request.stratify and request.group:
        raise DataError(
            "--stratify and --group: expected one of them: whole groups have what classes they have."
        )
    if (request.stratify or request.group) and not request.split:
        raise DataError(
            "--stratify and --group say how --split divides the rows. Expected --split with them."
        )
    if len({request.part, *dict(request.split)}) <= len(request.split):
        raise DataError(f"--part {request.part}: is in --split as well. Expected each part once.")


def _splitter(request: Request, seen: Seen) -> Splitter | None:
    if not request.split:
        return None
    names, fractions = zip(*request.split, strict=True)
    if request.group:
        return ByGroup((request.part, *names), fractions, seen.groups, request.group, request.split_seed)
    counts = seen.strata if request.stratify else {0: seen.num_rows}
    splitter = ByFraction(fractions, counts, TARGETS if request.stratify else None, request.split_seed)
    for name, size in zip((request.part, *names), splitter.sizes(), strict=True):
        if not size:
            raise DataError(
                f"--split: {seen.num_rows} rows leave none for the part `{name}`. Expected at least 1 row in "
                "each part: give a larger fraction."
            )
    return splitter


def _writers(
    folder: Path, source: Source, request: Request, storage: Storage, sizes: Sequence[int], seen: Seen
) -> list[PartWriter]:
    """A writer for each part, after everything that can be refused was."""
    identity = _identity(source, request, storage)
    layouts: list[Layout] = []
    for name, size in zip([request.part, *dict(request.split)], sizes, strict=True):
        is_first = not layouts
        cut = _cut(request, size, seen) if is_first else [size]
        own = name in ("train", "validation")
        part: Part = "validation" if name == "validation" else "train"
        layouts.append(Layout(folder if own else folder / name, part, cut, storage, identity))
    for layout in layouts:
        existing = existing_shards(layout)
        if existing and not request.force:
            raise DataError(
                f"{existing[0]}: exists. Give --force to replace the {layout.part} part, or another --out."
            )
    return [PartWriter(layout) for layout in layouts]


def _identity(source: Source, request: Request, storage: Storage) -> str:
    """A digest of all that decides which rows are written where."""
    files = [(path, (found := os.stat(path)).st_size, found.st_mtime_ns) for path in sorted(source.files)]
    values = {**asdict(replace(request, force=False)), "storage": asdict(storage), "files": files}
    return digest(msgspec.json.encode([values, source.name], order="deterministic"))


def _cut(request: Request, num_rows: int, seen: Seen) -> list[int]:
    """Rows of each shard of the first part."""
    shards = request.shards
    if not 1 <= shards <= num_rows:
        raise DataError(f"--shards {shards}: expected 1 to {num_rows}, the number of samples.")
    if not request.by_class:
        return [b - a for a, b in pairwise(num_rows * i // shards for i in range(shards + 1))]
    if request.split:
        raise DataError("--by-class with --split: expected one of them. Write the parts one after the other.")
    if shards > len(seen.strata):
        raise DataError(
            f"--by-class --shards {shards}: the targets have {len(seen.strata)} classes. "
            "Expected at least one for each shard: ask for fewer shards."
        )
    sizes = [0] * shards
    for place, label in enumerate(sorted(seen.strata)):
        sizes[place * shards // len(seen.strata)] += seen.strata[label]
    return sizes


def _write(
    source: Source,
    request: Request,
    splitter: Splitter | None,
    writers: Sequence[PartWriter],
    seen: Seen,
    progress: Progress,
) -> None:
    rest = writers[0]
    if request.shuffle_seed is None and not request.by_class:
        # Without a splitter the rows of shards that are complete need not be read at all.
        start = 0 if splitter else rest.num_complete_rows
        rest.skip(start)
        for block in _parted(source, splitter, writers, start, seen, progress):
            rest.append(block)
            del block  # a large row need not be there while the next is read
        return
    if rest.is_complete and all(writer.is_complete for writer in writers):
        return
    blocks = _parted(source, splitter, writers, 0, seen, progress)
    sizes = rest.sizes if request.by_class else [sum(rest.sizes)]
    shard_of = _shard_of_class(sorted(seen.strata), request.shards) if request.by_class else None
    for block in arranged(blocks, rest.fields, sizes, shard_of, request.shuffle_seed, rest.folder):
        rest.append(block)


def _parted(
    source: Source,
    splitter: Splitter | None,
    writers: Sequence[PartWriter],
    start: int,
    seen: Seen,
    progress: Progress,
) -> Iterator[Block]:
    """The rows of the first part; those of the others are given to their writers."""
    row = start
    for block in source.blocks((), start):
        row += len(block[TARGETS])
        if splitter is None:
            yield block
        else:
            parts = splitter.parts_of(block)
            for number, writer in enumerate(writers):
                rows = np.flatnonzero(parts == number)
                if not len(rows):
                    continue
                piece = {name: array[rows] for name, array in block.items()}
                if number:
                    writer.append(piece)
                else:
                    yield piece
        del block  # as above
        progress(row, seen.num_rows)
    if row != seen.num_rows:
        raise DataError(
            f"{source.name}: {row} rows, but {seen.num_rows} when it was first read. It was changed "
            "meanwhile: write the shards again."
        )


def _shard_of_class(classes: Sequence[int], shards: int) -> Callable[[Block], npt.NDArray[np.intp]]:
    known = np.array(classes, np.int64)
    return lambda block: np.searchsorted(known, block[TARGETS].astype(np.int64)) * shards // len(known)
