"""Writing the parts of a data set as shards, and the manifest next to them, from rows in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from hvd_train.data.facts import digest
from hvd_train.data.format import Compression, Manifest, is_class_dtype
from hvd_train.data.part_writer import Layout, Part, PartWriter, existing_shards, join
from hvd_train.data.progress import Progress, Step, unseen
from hvd_train.data.scratch import Scratch, tidy
from hvd_train.data.shard_file import Storage
from hvd_train.data.shuffling import arranged
from hvd_train.data.sources.base import TARGETS, Block, Source
from hvd_train.data.splitting import ByFraction, ByGroup, Splitter
from hvd_train.data.survey_source import Seen, classes_of_first, survey_source
from hvd_train.errors import DataError


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

    @property
    def parts(self) -> list[str]:
        """The names of all parts, that of the rest first."""
        return [self.part, *(name for name, _ in self.split)]


def write_part(folder: str | Path, source: Source, **options: object) -> Manifest:
    """`write_shards` of a request with these `options`."""
    return write_shards(folder, source, Request(**options))  # type: ignore[arg-type]


def write_shards(
    folder: str | Path, source: Source, request: Request, progress: Progress = unseen
) -> Manifest:
    """Writes the rows of `source` as HDF5 shards into `folder`, and adds them to its manifest.

    Rows are split into parts, and those of a part shuffled if `shuffle_seed` is given, then cut into `shards`
    even row ranges, or with `by_class` into contiguous ranges of classes. Compression needs chunks and
    chooses their rows if `chunk_rows` is None; without either, datasets are contiguous. Files are renamed
    into place, the manifest last. If an earlier call with the same request and unchanged files was ended
    before that, its complete shards stay. Memory does not grow with the number of rows.

    Returns the manifest.

    Raises `DataError` where the part exists already and `force` is not set, another program is writing it,
    the rows cannot be cut so, or the other part has other samples; OSError where the folder cannot be
    written.
    """
    _require(request, source)
    folder = Path(folder)
    with closing(Scratch(folder, request.parts, "alone")) as scratch:
        storage = _storage(source, request)
        layouts = _layouts(folder, request, storage, _identity(source, request, storage))
        for layout in layouts:
            join(layout.folder, layout.part, storage)
        _refuse_existing(layouts, request)
        plan = _plan(source, request, progress)
        cut = [plan.first, *([size] for size in plan.others)]
        layouts = [replace(layout, sizes=sizes) for layout, sizes in zip(layouts, cut, strict=True)]
        with ExitStack() as stack:
            writers = [PartWriter(layout, scratch.path) for layout in layouts]
            for writer in writers:
                stack.callback(writer.abandon)
            _write(source, request, plan, writers, progress)
            manifests = [writer.publish() for writer in reversed(writers)]
            for writer in writers:
                writer.end()
            return manifests[-1]


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
    if len(set(request.parts)) < len(request.parts):
        raise DataError(f"--part {request.part}: is in --split as well. Expected each part once.")


@dataclass(frozen=True)
class _Plan:
    """Which rows go where."""

    num_rows: int
    first: list[int]
    """Rows of each shard of the first part."""
    others: list[int]
    """Rows of the other parts."""
    classes: list[int]
    """Of the first part, in order; empty unless they are counted."""
    splitter: Splitter | None


def _plan(source: Source, request: Request, progress: Progress) -> _Plan:
    strata = request.stratify or request.by_class
    seen = survey_source(source, strata=strata, groups=bool(request.group), progress=progress)
    if not seen.num_rows:
        raise DataError(f"{source.name}: has no rows. Expected at least 1.")
    splitter = _splitter(request, seen)
    classes, sizes = seen.strata, splitter.sizes() if splitter else [seen.num_rows]
    if splitter and request.by_class:
        classes = classes_of_first(source, splitter, seen.num_rows, progress)
        splitter = _splitter(request, seen)  # from the first row on again
    return _Plan(seen.num_rows, _cut(request, sizes[0], classes), sizes[1:], sorted(classes), splitter)


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


def _storage(source: Source, request: Request) -> Storage:
    return Storage(
        fields=source.fields,
        scale=source.scale if request.scale is None else request.scale,
        class_names=source.class_names or request.class_names,
        compression=request.compression,
        chunk_rows=request.chunk_rows,
    )


def _layouts(folder: Path, request: Request, storage: Storage, identity: str) -> list[Layout]:
    """Of each part, with shards whose rows are not known yet."""
    layouts: list[Layout] = []
    for name in request.parts:
        own = name in ("train", "validation")
        part: Part = "validation" if name == "validation" else "train"
        sizes = [0] * (1 if layouts else max(0, request.shards))
        layouts.append(Layout(folder if own else folder / name, part, sizes, storage, identity))
    return layouts


def refuse_written(folder: str | Path, request: Request) -> None:
    """Raises `DataError` where a part exists already, and no earlier call was ended that this one might go on
    with. For what can be known before the source is opened, which may take long. Raises OSError."""
    tidy(Path(folder))
    layouts = _layouts(Path(folder), request, Storage(fields={}), "")
    if not any(layout.unfinished().was_begun for layout in layouts):
        _refuse_existing(layouts, request)


def _refuse_existing(layouts: Sequence[Layout], request: Request) -> None:
    if any(layout.unfinished().goes_on for layout in layouts):
        return  # the others may be complete, and are written again
    for layout in layouts:
        existing = existing_shards(layout)
        if existing and not request.force:
            raise DataError(
                f"{existing[0]}: exists. Give --force to replace the {layout.part} part, or another --out."
            )


def _identity(source: Source, request: Request, storage: Storage) -> str:
    """A digest of all that decides which rows are written where."""
    files = [(path, (found := os.stat(path)).st_size, found.st_mtime_ns) for path in sorted(source.files)]
    values = {**asdict(replace(request, force=False)), "storage": asdict(storage), "files": files}
    return digest(msgspec.json.encode([values, source.name], order="deterministic"))


def _cut(request: Request, num_rows: int, classes: Mapping[int, int]) -> list[int]:
    """Rows of each shard of the first part, which has so many rows of each of its `classes`."""
    shards = request.shards
    if not 1 <= shards <= num_rows:
        raise DataError(f"--shards {shards}: expected 1 to {num_rows}, the number of samples.")
    if not request.by_class:
        return [b - a for a, b in pairwise(num_rows * i // shards for i in range(shards + 1))]
    if shards > len(classes):
        raise DataError(
            f"--by-class --shards {shards}: the targets have {len(classes)} classes. "
            "Expected at least one for each shard: ask for fewer shards."
        )
    sizes = [0] * shards
    for place, label in enumerate(sorted(classes)):
        sizes[place * shards // len(classes)] += classes[label]
    return sizes


def _write(
    source: Source, request: Request, plan: _Plan, writers: Sequence[PartWriter], progress: Progress
) -> None:
    rest = writers[0]
    if request.shuffle_seed is None and not request.by_class:
        # Without a splitter the rows of shards that are complete need not be read at all.
        start = 0 if plan.splitter else rest.num_complete_rows
        rest.skip(start)
        for block in _parted(source, plan, writers, start, progress):
            rest.append(block)
            del block  # a large row need not be there while the next is read
        return
    if rest.is_complete and all(writer.is_complete for writer in writers):
        return
    blocks = _parted(source, plan, writers, 0, progress)
    num_rows = sum(rest.sizes)
    sizes = rest.sizes if request.by_class else [num_rows]
    shard_of = _shard_of_class(plan.classes, request.shards) if request.by_class else None
    row = 0
    for block in arranged(blocks, rest.fields, sizes, shard_of, request.shuffle_seed, rest.scratch):
        rest.append(block)
        row += len(block[TARGETS])
        del block
        progress(Step("written", row, num_rows))


def _parted(
    source: Source, plan: _Plan, writers: Sequence[PartWriter], start: int, progress: Progress
) -> Iterator[Block]:
    """The rows of the first part; those of the others are given to their writers."""
    row = start
    for block in source.blocks((), start):
        row += len(block[TARGETS])
        if plan.splitter is None:
            yield block
        else:
            parts = plan.splitter.parts_of(block)
            for number, writer in enumerate(writers):
                rows = np.flatnonzero(parts == number)
                if not len(rows):
                    continue
                # Most rows that are large come alone: no copy of those.
                whole = len(rows) == len(parts)
                piece = block if whole else {name: array[rows] for name, array in block.items()}
                if number:
                    writer.append(piece)
                else:
                    yield piece
                del piece
        del block  # as above
        progress(Step("read", row, plan.num_rows))
    if row != plan.num_rows:
        raise DataError(
            f"{source.name}: {row} rows, but {plan.num_rows} when it was first read. It was changed "
            "meanwhile: write the shards again."
        )


def _shard_of_class(classes: Sequence[int], shards: int) -> Callable[[Block], npt.NDArray[np.intp]]:
    known = np.array(classes, np.int64)
    return lambda block: np.searchsorted(known, block[TARGETS].astype(np.int64)) * shards // len(known)
