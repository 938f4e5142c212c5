"""From the configuration to row ranges: which shards there are, and what one sample looks like."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from hvd_train.config import DataConfig
from hvd_train.data.blocks import rows_per_block
from hvd_train.data.check import unlike
from hvd_train.data.deal import Span, split_validation
from hvd_train.data.demo import ensure_digits
from hvd_train.data.format import SampleSpec, ShardInfo, is_class_dtype
from hvd_train.data.h5 import ShardFile, read_info
from hvd_train.data.locate import Found, locate
from hvd_train.errors import DataError

_SCAN_BYTES = 8 << 20
_MAX_LISTED = 12


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """The whole data set; the same on every rank."""

    sample: SampleSpec
    """One sample."""

    shards: tuple[ShardInfo, ...]
    """The header of every shard, those of the training part first."""

    train: tuple[Span, ...]
    """Rows to train on; one span a shard unless validation rows are cut off them."""

    validation: tuple[Span, ...]
    """Rows to evaluate on; empty where there are none."""

    warnings: tuple[str, ...] = ()
    """What a user should know of the data, one line each."""


def open_catalog(data: DataConfig) -> Catalog:
    """Reads the manifest and every shard's header, and settles what a sample is.

    Shards that do not record their classes have their integer targets read once. Not collective: every
    rank does the same and gets the same. Raises `DataError`.
    """
    train, validation = _find_parts(data)
    names = tuple(dict.fromkeys((data.inputs, data.targets)))
    warnings: list[str] = []
    train_infos, validation_infos = (_read_shards(part, names, warnings) for part in (train, validation))
    infos = (*train_infos, *validation_infos)
    train_spans, validation_spans = _spans(train_infos), _spans(validation_infos)
    if isinstance(data.validation, float):
        train_spans, validation_spans = split_validation(train_spans, data.validation)
    return Catalog(
        sample=_agree(infos, data),
        shards=infos,
        train=train_spans,
        validation=validation_spans,
        warnings=tuple(warnings),
    )


def _find_parts(data: DataConfig) -> tuple[tuple[Found, ...], tuple[Found, ...]]:
    path = str(ensure_digits()) if data.path == "digits" else data.path
    source = locate(path, "data.path")
    if not source.train:
        raise DataError(
            f"data.path = {path!r}: its manifest lists no train shards. "
            f"Add them with `hvd_train shard write ... --out {path} --part train`."
        )
    if isinstance(data.validation, float):
        return source.train, ()
    if not data.validation:
        return source.train, source.validation
    other = locate(data.validation, "data.validation")
    validation = other.validation or other.train
    # A folder or pattern that takes in both parts is usual: nothing is trained on that is evaluated on.
    held_out = {os.path.realpath(shard.path) for shard in validation}
    train = tuple(shard for shard in source.train if os.path.realpath(shard.path) not in held_out)
    if not train or not validation:
        raise DataError(
            f"data.validation = {data.validation!r} leaves {len(train)} shards of data.path = {path!r} "
            f"to train on and has {len(validation)} itself. Expected at least 1 of each: change one path."
        )
    return train, validation


def _read_shards(part: Sequence[Found], names: tuple[str, ...], warnings: list[str]) -> tuple[ShardInfo, ...]:
    """The headers of a part's shards, without those that have no samples."""
    infos = tuple(_read_shard(shard, names) for shard in part)
    empty = [info.path for info in infos if info.num_samples == 0]
    more = f" and {len(empty) - _MAX_LISTED} more" if len(empty) > _MAX_LISTED else ""
    named = ", ".join(empty[:_MAX_LISTED]) + more
    if infos and len(empty) == len(infos):
        raise DataError(f"{named}: no samples. Expected at least 1 in one of the shards.")
    if empty:
        warnings.append(f"{named}: no samples: skipped ({len(empty)} of {len(infos)} shards).")
    return tuple(info for info in infos if info.num_samples > 0)


def _read_shard(shard: Found, names: tuple[str, ...]) -> ShardInfo:
    info = read_info(shard.path, names)
    for difference in shard.differences(info):
        raise DataError(difference)
    return info


def _spans(infos: Sequence[ShardInfo]) -> tuple[Span, ...]:
    return tuple(Span(info.path, 0, info.num_samples) for info in infos)


def _agree(infos: Sequence[ShardInfo], data: DataConfig) -> SampleSpec:
    first = infos[0]
    for info in infos:
        for difference in unlike(info, first, with_scale=data.scale is None):
            raise DataError(difference)
    recorded = 1.0 if first.scale is None else first.scale
    return SampleSpec(
        inputs=data.inputs,
        targets=data.targets,
        fields=first.fields,
        num_classes=_num_classes(infos, data.targets),
        scale=recorded if data.scale is None else data.scale,
    )


def _num_classes(infos: Sequence[ShardInfo], targets: str) -> int | None:
    if not is_class_dtype(infos[0].fields[targets].dtype):
        return None
    return max(_classes_of(info, targets) for info in infos)


def _classes_of(info: ShardInfo, targets: str) -> int:
    if info.class_counts is not None:
        return len(info.class_counts)
    rows = rows_per_block(info.fields[targets], _SCAN_BYTES)
    largest = -1
    with ShardFile(info.path, (targets,)) as shard:
        for start in range(0, info.num_samples, rows):
            block = shard.read(targets, start, min(start + rows, info.num_samples))
            largest = max(largest, int(block.max(initial=0)))
    return largest + 1
