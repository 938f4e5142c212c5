"""From the configuration to row ranges: which shards there are, and what one sample looks like."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hvd_train.config import DataConfig
from hvd_train.data.blocks import rows_per_block
from hvd_train.data.check import unlike
from hvd_train.data.class_names import listed_names, named_dataset, uncovered
from hvd_train.data.deal import Span, deal, split_validation
from hvd_train.data.demo import ensure_digits
from hvd_train.data.format import MANIFEST_NAME, SampleSpec, ShardInfo, is_class_dtype, mask_name
from hvd_train.data.header_labels import HeaderLabels, header_labels, summarized
from hvd_train.data.headers import HeadersRead, index_lines, join_headers, read_headers
from hvd_train.data.labels import Labels, Unclassed, divisor, join, labels_of, labels_of_header, objection
from hvd_train.data.lengths import check_lengths, with_mask
from hvd_train.data.locate import Found, locate
from hvd_train.data.places import Places, places_of
from hvd_train.data.python.facts import is_read_for_targets
from hvd_train.data.python.registry import made_of
from hvd_train.data.repeats import Origin, refuse_repeats
from hvd_train.data.rows import Rows
from hvd_train.data.screen import Screen, damage_screen, stretches
from hvd_train.data.unpacked import unpacked_lines
from hvd_train.errors import DataError

_SCAN_BYTES = 8 << 20
_MAX_LISTED = 12


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The shards of a data set by their headers; none of their values has been read."""

    train: tuple[ShardInfo, ...]

    validation: tuple[ShardInfo, ...]

    sample: SampleSpec
    """One sample; its `num_classes` is not known yet."""

    warnings: tuple[str, ...] = ()
    """What a user should know of the shards, one line each."""

    screen: Screen | None = None
    """What marks rows that are left out of summaries, since they cannot be read; None: that is an error."""


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

    labels: Labels
    """What is known of the integer targets of the training shards."""

    warnings: tuple[str, ...] = ()
    """What a user should know of the shards, one line each."""

    def parts(self, parts: int, batch_size: int) -> list[tuple[Span, ...]]:
        """The training rows in so many parts that differ by `batch_size` rows at most."""
        units = {shard.path: shard.chunk_rows or shard.checksum_rows or 1 for shard in self.shards}
        return deal(self.train, parts, batch_size, units)


def open_catalog(data: DataConfig, *, tokens: bool = False) -> Catalog:
    """All of it in one process: finds the shards, summarizes their labels and makes the catalog.

    Args:
        tokens: the inputs hold tokens, which are numbered as the targets are.

    Not collective. Raises `DataError`.
    """
    read = header_labels(data, tokens=tokens)
    shards = find_shards(data, read)
    labels = summarize_labels(shards, tokens=tokens, read=read)
    inputs = summarize_inputs(shards, data, tokens=tokens)
    return make_catalog(shards, data, [labels], [inputs], tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class Files:
    """The files that a configuration names; nothing of them has been read."""

    train: tuple[Found, ...]

    validation: tuple[Found, ...]

    places: Places
    """Of the fields of a sample in each of them."""

    @property
    def every(self) -> tuple[Found, ...]:
        """Those of the training part first."""
        return (*self.train, *self.validation)


def find_shards(data: DataConfig, labels: HeaderLabels | None = None) -> Shards:
    """Reads the manifest and every shard's header, and settles what a sample is: the three steps of the ranks
    of a job, in one process. With `labels` these are read as well, where they are small.

    Not collective. Raises `DataError`, also where two names lead to the same rows.
    """
    files = list_files(data)
    return join_shards(files, data, [read_headers(files.every, files.places, labels=labels)])


def list_files(data: DataConfig) -> Files:
    """The files that a configuration names. Not collective. Raises `DataError`."""
    train, validation = _find_parts(data)
    for found in train if data.cache else ():
        if made_of(found.path):
            raise DataError(
                f"data.cache = {data.cache!r}: {found.path} is a Python dataset; expected files, which are "
                "copied. Leave data.cache out."
            )
    return Files(train=train, validation=validation, places=places_of(data))


def join_shards(files: Files, data: DataConfig, read: Sequence[HeadersRead]) -> Shards:
    """The shards, by what each rank has read of their headers, and what a sample is. Raises `DataError`, also
    where two names lead to the same rows."""
    of_files = join_headers(files.every, read)
    warnings = index_lines(files.every, read)
    cut = len(files.train)
    parts = [_with_samples(part, warnings) for part in (of_files[:cut], of_files[cut:])]
    refuse_repeats(*([origin for _, origin in part] for part in parts))
    train_infos, validation_infos = (tuple(info for info, _ in part) for part in parts)
    sample = _agree((*train_infos, *validation_infos), data)
    sample = replace(sample, names=listed_names(files.every, named_dataset(sample)))
    return Shards(
        train=train_infos,
        validation=validation_infos,
        sample=sample,
        warnings=tuple(warnings),
        screen=damage_screen(data, sample),
    )


LabelSummary = tuple[Labels, Labels]
"""The labels of the training and of the validation shards."""


def summarize_labels(
    shards: Shards,
    rank: int = 0,
    world_size: int = 1,
    *,
    tokens: bool = False,
    read: HeaderLabels | None = None,
    counted: bool = True,
) -> LabelSummary:
    """What this rank's part of the integer targets looks like; together the parts are all of them.

    Rows of any length are compared with the length to which they are padded. Shards that record their classes
    are not read, unless they hold values that are no class. The rows of the
    others are dealt to the ranks as for training, and each is read once. Not collective. Raises `DataError`.

    Args:
        read: what this rank has read with the headers, if every rank has; those labels are not read again.
        counted: whether the task asks for the number of classes. If not, Python datasets are left out, which
            have to make a whole sample for its target.
    """
    fields = shards.sample.fields
    if any(field.padding for field in fields.values()):
        check_lengths(deal(whole((*shards.train, *shards.validation)), world_size)[rank], fields)
    if not is_class_dtype(fields[shards.sample.targets].dtype):
        return Labels(), Labels()
    read = HeaderLabels({}) if read is None else read
    train, validation = (
        _summarize_part(_cheap(infos, shards.sample, counted), shards, rank, world_size, tokens, read)
        for infos in (shards.train, shards.validation)
    )
    return train, validation


def _cheap(infos: Sequence[ShardInfo], sample: SampleSpec, counted: bool) -> Sequence[ShardInfo]:
    return [info for info in infos if counted or not is_read_for_targets(info, sample.targets)]


def summarize_inputs(
    shards: Shards, data: DataConfig, rank: int = 0, world_size: int = 1, *, tokens: bool = False
) -> Labels:
    """This rank's part of the integer inputs for training, if their scale has to be found by them; else
    empty. Each row is read once. Not collective. Raises `DataError`."""
    sample = shards.sample
    dtype, recorded = sample.fields[sample.inputs].dtype, shards.train[0].scale
    if data.scale != "auto" or tokens or recorded is not None or not dtype.startswith(("int", "uint")):
        return Labels()
    mine = deal(_parts(shards, data)[0], world_size)[rank]
    return _read_labels(mine, sample, sample.inputs, shards.screen, ignore=False)


def _summarize_part(
    infos: Sequence[ShardInfo],
    shards: Shards,
    rank: int,
    world_size: int,
    tokens: bool,
    read: HeaderLabels,
) -> Labels:
    spec = shards.sample
    known = [labels_of_header(info, spec.targets) for info in infos]
    unknown = [info for info, labels in zip(infos, known, strict=True) if labels is None]
    found = [labels for labels in known if labels is not None and rank == 0]
    found += read.of(infos)
    for name, ignore in summarized(spec.inputs, spec.targets, tokens).items():
        if is_class_dtype(spec.fields[name].dtype):
            every = unknown if name == spec.targets else infos
            left = [info for info in every if not read.covers(info, name)]
            mine = deal(whole(left), world_size)[rank]
            found.append(_read_labels(mine, spec, name, shards.screen, ignore))
    return join(found)


def _read_labels(
    spans: Sequence[Span], spec: SampleSpec, name: str, screen: Screen | None, ignore: bool
) -> Labels:
    found = []
    step, offset = rows_per_block(spec.fields[name], _SCAN_BYTES), 0
    fields, mask = with_mask(name, spec.fields[name]), mask_name(name)
    rows = Rows(spans, fields, verify=screen is not None, screen=screen)
    try:
        for span in rows.spans:
            for start in range(0, span.num_rows, step):
                batch = rows.read(offset + start, offset + min(start + step, span.num_rows))
                for first, stop in stretches(batch):
                    row = span.start + start + first
                    block = batch[name][first:stop]
                    marks = batch[mask][first:stop] if mask in fields else None
                    found.append(labels_of(block, name, span.shard, row, ignore=ignore, marks=marks))
            offset += span.num_rows
    finally:
        rows.close()
    return join(found)


def make_catalog(
    shards: Shards,
    data: DataConfig,
    summaries: Sequence[LabelSummary],
    inputs: Sequence[Labels] = (),
    *,
    tokens: bool = False,
) -> Catalog:
    """The catalog, from what each rank found of the labels and of the inputs. Raises `DataError` where the
    fraction of rows for validation leaves one of the parts empty."""
    shards, said = _scaled(shards, join(inputs))
    train, validation = _parts(shards, data)
    labels = join(train_labels for train_labels, _ in summaries)
    shards, unnamed = _named(shards, join(part for parts in summaries for part in parts))
    return Catalog(
        sample=_with_classes(shards, summaries, tokens),
        shards=(*shards.train, *shards.validation),
        train=train,
        validation=validation,
        labels=labels,
        warnings=(*shards.warnings, *said, *unnamed),
    )


def _parts(shards: Shards, data: DataConfig) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """The rows to train on, and those to evaluate on. Raises `DataError` where a fraction leaves one part
    empty."""
    if isinstance(data.validation, float):
        return split_validation(whole(shards.train), data.validation)
    return whole(shards.train), whole(shards.validation)


def _scaled(shards: Shards, inputs: Labels) -> tuple[Shards, tuple[str, ...]]:
    """With the scale that brings `inputs` to about 1, and a line that says so; as they are without inputs, or
    with zeros and ones."""
    low, high, sample = inputs.lowest, inputs.highest, shards.sample
    if low is None or high is None or max(-low.value, high.value) <= 1:
        return shards, ()
    by = divisor(max(-low.value, high.value), sample.fields[sample.inputs].dtype)
    line = f"data.scale = 'auto': `{sample.inputs}` is multiplied by {1 / by:.6g} (1/{by})."
    return replace(shards, sample=replace(sample, scale=1 / by)), (line,)


def _named(shards: Shards, labels: Labels) -> tuple[Shards, tuple[str, ...]]:
    """Without the names of the classes, and with a line that says so, if there are more classes."""
    said = uncovered(shards.sample, labels)
    return (replace(shards, sample=replace(shards.sample, names=())), (said,)) if said else (shards, ())


def _with_classes(shards: Shards, summaries: Sequence[LabelSummary], tokens: bool) -> SampleSpec:
    sample = shards.sample
    if not is_class_dtype(sample.fields[sample.targets].dtype):
        return sample
    parts = [(shards.train, join(train for train, _ in summaries))]
    if shards.validation:
        parts.append((shards.validation, join(validation for _, validation in summaries)))
    every = join(labels for _, labels in parts)
    # A part without any class first, then what the values of all are.
    empty = [(labels, infos[0].path) for infos, labels in parts if not labels.count]
    labels, path = empty[0] if empty else (every, shards.train[0].path)
    reason = objection(labels, sample.targets, path, tokens=tokens)
    coding = sample.fields[sample.targets].coding
    named = len(coding.names if coding else sample.names)
    counted = replace(sample, num_classes=named or every.num_classes)
    return Unclassed(counted, reason) if reason else counted


def whole(infos: Sequence[ShardInfo]) -> tuple[Span, ...]:
    """All rows of some shards."""
    return tuple(Span(info.path, 0, info.num_samples) for info in infos)


def _find_parts(data: DataConfig) -> tuple[tuple[Found, ...], tuple[Found, ...]]:
    path = str(ensure_digits()) if data.path == "digits" else data.path
    source = locate(path, "data.path")
    if not source.train:
        raise DataError(
            f"{os.path.join(path, MANIFEST_NAME)}: lists no train shards. "
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


def join_part(
    files: Sequence[Found], read: Sequence[HeadersRead], warnings: list[str]
) -> list[tuple[ShardInfo, Origin]]:
    """The headers of the shards of some files, without those that have no samples. Raises `DataError`."""
    warnings += index_lines(files, read)
    return _with_samples(join_headers(files, read), warnings)


def _with_samples(
    of_files: Sequence[Sequence[tuple[ShardInfo, Origin]]], warnings: list[str]
) -> list[tuple[ShardInfo, Origin]]:
    read = [shard for of_file in of_files for shard in of_file]
    empty = [info.path for info, _ in read if info.num_samples == 0]
    more = f" and {len(empty) - _MAX_LISTED} more" if len(empty) > _MAX_LISTED else ""
    named = ", ".join(empty[:_MAX_LISTED]) + more
    if read and len(empty) == len(read):
        raise DataError(f"{named}: no samples. Expected at least 1 in one of the shards.")
    if empty:
        warnings.append(f"{named}: no samples: skipped ({len(empty)} of {len(read)} shards).")
    read = [(info, origin) for info, origin in read if info.num_samples > 0]
    warnings += unpacked_lines([info for info, _ in read])
    return read


def _agree(infos: Sequence[ShardInfo], data: DataConfig) -> SampleSpec:
    first = infos[0]
    if data.max_length is not None and not any(field.padding for field in first.fields.values()):
        raise DataError(
            f"data.max_length = {data.max_length}: no field of a sample in {first.path} has rows of any "
            "length. Expected one, such as a dataset of variable-length type or `packed(values, offsets)`: "
            "leave data.max_length out, or name such a field."
        )
    for info in infos:
        for difference in unlike(info, first, with_scale=not isinstance(data.scale, (int, float))):
            raise DataError(difference)
    shape = first.fields[data.inputs].shape
    if 0 in shape:
        raise DataError(
            f"{first.path}: `{data.inputs}` has the shape {list(shape)} a sample; expected one number or "
            "more. Name another dataset in data.inputs."
        )
    recorded = 1.0 if first.scale is None or data.standardize else first.scale
    return SampleSpec(
        inputs=data.inputs,
        targets=data.targets,
        fields=first.fields,
        weights=data.weights,
        mask=data.mask,
        scale=data.scale if isinstance(data.scale, (int, float)) else recorded,
        standardize=data.standardize or "",
    )
