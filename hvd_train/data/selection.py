"""The rows that a finished model is used on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvd_train.config import DataConfig
from hvd_train.data.catalog import Shards, join_part, whole
from hvd_train.data.class_names import require_names
from hvd_train.data.deal import Span, split_validation
from hvd_train.data.demo import ensure_digits
from hvd_train.data.format import FieldSpec, SampleSpec, ShardInfo
from hvd_train.data.growing import refuse_growing
from hvd_train.data.headers import HeadersRead, read_headers
from hvd_train.data.locate import Found, locate
from hvd_train.data.places import Places, places_of_fields
from hvd_train.errors import DataError


@dataclass(frozen=True)
class Selection:
    """Rows to use a model on."""

    spans: tuple[Span, ...]

    fields: Mapping[str, FieldSpec]
    """What a row is made of."""

    shards: tuple[ShardInfo, ...]
    """The headers of the files."""

    warnings: tuple[str, ...]
    """What a user should know of the shards, one line each."""


def needed_to_predict(sample: SampleSpec) -> tuple[str, ...]:
    """The fields that a model gets where the targets are not known."""
    known = {sample.targets, sample.weights, sample.mask} - {sample.inputs}
    known |= {sample.mask_of(name) for name in known if name}
    return tuple(name for name in sample.fields if name not in known)


@dataclass(frozen=True)
class Listed:
    """The files that a path names; nothing of them has been read."""

    files: tuple[Found, ...]

    places: Places
    """Of the fields that are needed."""


def select_rows(path: str, sample: SampleSpec, names: Sequence[str]) -> Selection:
    """All rows of the shards that `path` names, in its order: of a manifest its validation part, or where it
    has none its training part. All of it in one process.

    Args:
        path: what `data.path` takes.
        sample: what the model was built for; the datasets of it that are in `names` must be like there.
        names: the datasets that are needed of every shard. Those that the model was not trained on must be
            alike in all of them, and may hold strings of a fixed number of bytes.

    Not collective. Raises `DataError`.
    """
    listed = list_rows(path, sample, names)
    return join_rows(listed, sample, names, [read_headers(listed.files, listed.places, texts=True)])


def list_rows(path: str, sample: SampleSpec, names: Sequence[str]) -> Listed:
    """The files of `select_rows`. Not collective. Raises `DataError`."""
    source = locate(str(ensure_digits()) if path == "digits" else path, "--data")
    fields = {name: sample.fields.get(name) or FieldSpec(shape=(), dtype="") for name in names}
    places = places_of_fields(fields, sample.inputs, sample.targets)
    return Listed(source.validation or source.train, places)


def join_rows(
    listed: Listed, sample: SampleSpec, names: Sequence[str], read: Sequence[HeadersRead]
) -> Selection:
    """The rows of `select_rows`, by what each rank has read of the headers. Raises `DataError`."""
    if sample.targets in names:
        require_names(listed.files, sample)
    warnings: list[str] = []
    infos = [info for info, _ in join_part(listed.files, read, warnings)]
    refuse_growing(infos)
    for info in infos:
        for name in names:
            expected, seen = sample.fields.get(name, infos[0].fields[name]), info.fields[name]
            if seen != expected:
                other = "the model was trained on" if name in sample.fields else f"in {infos[0].path} it is"
                raise DataError(
                    f"{info.path}: a sample of `{name}` is {seen}; {other} "
                    f"{expected}. Convert the data, or name other files."
                )
    return Selection(whole(infos), infos[0].fields, tuple(infos), tuple(warnings))


def validation_rows(shards: Shards, data: DataConfig) -> Selection:
    """The validation rows of a run that was trained on `data`, which has these shards. Raises `DataError`,
    also where it has none."""
    infos = (*shards.train, *shards.validation)
    refuse_growing(infos)
    train, validation = whole(shards.train), whole(shards.validation)
    if isinstance(data.validation, float):
        _, validation = split_validation(train, data.validation)
    if not validation:
        raise DataError(
            f"data.path = {data.path!r}: the run has no validation data. Name the data to evaluate on by "
            "--data."
        )
    return Selection(validation, shards.sample.fields, infos, shards.warnings)
