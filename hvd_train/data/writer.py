"""Writing shards and the manifest next to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from hvd_train.data.blocks import checksums, class_counts, row_bytes, rows_per_block
from hvd_train.data.facts import digest_of
from hvd_train.data.format import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Array,
    DatasetFacts,
    Facts,
    FieldSpec,
    Manifest,
    SampleSpec,
    ShardEntry,
    is_class_dtype,
)
from hvd_train.data.hdf5.write import write_file
from hvd_train.data.manifest import load_manifest, save_manifest
from hvd_train.data.sources import Arrays
from hvd_train.errors import DataError
from hvd_train.io.atomic import replacing

Part = Literal["train", "validation"]
Compression = Literal["none", "gzip"]

INPUTS, TARGETS = "inputs", "targets"

_CHECKSUM_BYTES = 64 << 10
_GZIP_CHUNK_BYTES = 256 << 10
# A vocabulary beyond this would make the counts larger than many shards.
_MAX_COUNTED_CLASSES = 65_536
_MAX_LISTED_CLASSES = 1000


def write_part(
    folder: str | Path,
    arrays: Arrays,
    *,
    part: Part = "train",
    shards: int = 1,
    by_class: bool = False,
    shuffle_seed: int | None = None,
    compression: Compression = "none",
    chunk_rows: int | None = None,
    force: bool = False,
) -> Manifest:
    """Writes one part of a data set as HDF5 shards into `folder`, and adds them to its manifest.

    Rows are shuffled first if `shuffle_seed` is given, then cut into `shards` even row ranges, or with
    `by_class` into contiguous ranges of classes. gzip needs chunks and chooses their rows if `chunk_rows`
    is None; without either, datasets are contiguous. Files are renamed into place, the manifest last.

    Raises `DataError` where the part exists already and `force` is not set, the data cannot be cut so, or
    the other part has other samples; OSError where the folder cannot be written.
    """
    arrays = _readable(arrays)
    if chunk_rows is not None and chunk_rows < 1:
        raise DataError(f"--chunk-rows {chunk_rows}: expected at least 1 row.")
    folder = Path(folder)
    names = [f"{part}-{i:05d}-of-{shards:05d}.h5" for i in range(shards)]
    manifest = load_manifest(folder)
    existing = _existing(folder, manifest, part, names)
    if existing and not force:
        raise DataError(f"{existing[0]}: exists. Give --force to replace the {part} part, or another --out.")
    cut = _cut(arrays, shards, by_class, shuffle_seed)
    manifest = _join(folder, manifest, part, _sample_of(arrays))
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, rows in zip(names, cut, strict=True):
        piece = arrays.take(rows)
        counts = _class_counts(piece.targets)
        with replacing(folder / name) as temporary:
            digest = _write_shard(temporary, piece, counts, compression, chunk_rows)
        listed = tuple(counts.tolist()) if counts is not None and len(counts) <= _MAX_LISTED_CLASSES else None
        entries.append(ShardEntry(file=name, num_samples=len(rows), class_counts=listed, facts_digest=digest))
    manifest = _with_part(manifest, part, tuple(entries))
    manifest = save_manifest(folder, manifest)
    # Only now, when nothing refers to them any more.
    for stale in set(existing) - {folder / name for name in names}:
        stale.unlink(missing_ok=True)
    return manifest


def _readable(arrays: Arrays) -> Arrays:
    """`arrays` in types that a shard can hold."""
    if arrays.scale is not None and not math.isfinite(arrays.scale):
        raise DataError(f"--scale {arrays.scale}: expected a finite number.")
    for name, array in ((INPUTS, arrays.inputs), (TARGETS, arrays.targets)):
        if array.dtype.kind not in "biuf":
            raise DataError(
                f"{name} are {array.dtype}. Expected integers, floating-point numbers or booleans."
            )
    return replace(arrays, inputs=_narrow(arrays.inputs), targets=_narrow(arrays.targets))


def _narrow(array: Array) -> Array:
    # Long double has another layout on every machine, and torch has none.
    return array.astype(np.float64) if array.dtype.kind == "f" and array.dtype.itemsize > 8 else array


def _existing(folder: Path, manifest: Manifest | None, part: Part, names: Sequence[str]) -> list[Path]:
    listed = [entry.file for entry in _entries(manifest, part)]
    return [folder / name for name in dict.fromkeys([*listed, *names]) if (folder / name).exists()]


def _entries(manifest: Manifest | None, part: Part) -> tuple[ShardEntry, ...]:
    if manifest is None:
        return ()
    return manifest.train if part == "train" else manifest.validation


def _with_part(manifest: Manifest, part: Part, entries: tuple[ShardEntry, ...]) -> Manifest:
    return replace(manifest, train=entries) if part == "train" else replace(manifest, validation=entries)


def _sample_of(arrays: Arrays) -> SampleSpec:
    fields = {INPUTS: _field(arrays.inputs), TARGETS: _field(arrays.targets)}
    classes = int(arrays.targets.max(initial=0)) + 1 if is_class_dtype(fields[TARGETS].dtype) else None
    scale = 1.0 if arrays.scale is None else arrays.scale
    return SampleSpec(inputs=INPUTS, targets=TARGETS, fields=fields, num_classes=classes, scale=scale)


def _join(folder: Path, manifest: Manifest | None, part: Part, sample: SampleSpec) -> Manifest:
    """The manifest so far, if the other part's samples are like `sample`."""
    other = _entries(manifest, "validation" if part == "train" else "train")
    if manifest is None or not other:
        return Manifest(sample=sample)
    for key in ("fields", "scale"):
        ours, theirs = getattr(sample, key), getattr(manifest.sample, key)
        if ours != theirs:
            raise DataError(
                f"{folder / MANIFEST_NAME}: the other part has {key} {theirs}, these samples have {ours}. "
                "Expected the same in both parts: write them into another folder."
            )
    classes = max(sample.num_classes or 0, manifest.sample.num_classes or 0) or None
    return replace(manifest, schema=SCHEMA_VERSION, sample=replace(sample, num_classes=classes))


def _cut(arrays: Arrays, shards: int, by_class: bool, shuffle_seed: int | None) -> list[npt.NDArray[np.intp]]:
    num_samples = len(arrays.targets)
    if not 1 <= shards <= num_samples:
        raise DataError(f"--shards {shards}: expected 1 to {num_samples}, the number of samples.")
    order = np.arange(num_samples, dtype=np.intp)
    if shuffle_seed is not None:
        order = np.random.default_rng(shuffle_seed).permutation(order)
    if not by_class:
        bounds = [num_samples * i // shards for i in range(shards + 1)]
        return [order[a:b] for a, b in pairwise(bounds)]
    targets = arrays.targets
    if targets.ndim != 1 or not is_class_dtype(targets.dtype.name):
        raise DataError(
            f"--by-class: targets are {targets.dtype} {list(targets.shape[1:])}. Expected one class number "
            "per sample: leave --by-class out."
        )
    classes, class_of_row = np.unique(targets, return_inverse=True)
    if shards > len(classes):
        raise DataError(
            f"--by-class --shards {shards}: the targets have {len(classes)} classes. "
            "Expected at least one for each shard: ask for fewer shards."
        )
    shard_of_row = class_of_row * shards // len(classes)
    return [order[shard_of_row[order] == shard] for shard in range(shards)]


def _class_counts(targets: Array) -> npt.NDArray[np.int64] | None:
    if not is_class_dtype(targets.dtype.name):
        return None
    num_classes = int(targets.max(initial=0)) + 1
    return class_counts(targets, num_classes) if num_classes <= _MAX_COUNTED_CLASSES else None


def _write_shard(
    path: Path,
    arrays: Arrays,
    counts: npt.NDArray[np.int64] | None,
    compression: Compression,
    chunk_rows: int | None,
) -> str:
    """Writes one shard; returns the digest of its facts."""
    datasets = {INPUTS: arrays.inputs, TARGETS: arrays.targets}
    if compression != "none" and chunk_rows is None:
        chunk_rows = rows_per_block(_field(arrays.inputs), _GZIP_CHUNK_BYTES)
    # Blocks end where chunks end, so that a damaged chunk is a damaged block.
    row = sum(row_bytes(_field(array)) for array in datasets.values())
    block = chunk_rows or max(1, _CHECKSUM_BYTES // max(1, row))
    sums = {name: checksums(array, block) for name, array in datasets.items()}
    all_counts = {} if counts is None else {TARGETS: counts}
    scales = {INPUTS: arrays.scale}
    facts = Facts(
        schema=SCHEMA_VERSION,
        checksum_rows=block,
        datasets={
            name: DatasetFacts(
                shape=array.shape,
                dtype=_field(array).dtype,
                scale=scales.get(name),
                class_counts=digest_of(all_counts[name]) if name in all_counts else None,
                checksums=digest_of(sums[name]),
            )
            for name, array in datasets.items()
        },
    )
    return write_file(
        path,
        datasets,
        facts,
        chunk_rows=chunk_rows,
        compression=compression,
        class_counts=all_counts,
        checksums=sums,
    )


def _field(array: Array) -> FieldSpec:
    return FieldSpec(shape=array.shape[1:], dtype=array.dtype.newbyteorder("=").name)
