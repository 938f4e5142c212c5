"""The rows that a finished model is used on."""

from __future__ import annotations

from collections.abc import Sequence

from hvd_train.data.catalog import read_shards
from hvd_train.data.deal import Span
from hvd_train.data.demo import ensure_digits
from hvd_train.data.format import FieldSpec, SampleSpec
from hvd_train.data.locate import locate
from hvd_train.errors import DataError


def select_rows(
    path: str, sample: SampleSpec, names: Sequence[str]
) -> tuple[tuple[Span, ...], tuple[str, ...]]:
    """All rows of the shards that `path` names, in its order: of a manifest its validation part, or where it
    has none its training part. Also what a user should know of the shards, one line each.

    Args:
        path: what `data.path` takes.
        sample: what the model was built for; the datasets of it that are in `names` must be like there.
        names: the datasets that are needed of every shard.

    Not collective: every rank does the same and gets the same. Raises `DataError`.
    """
    source = locate(str(ensure_digits()) if path == "digits" else path, "--data")
    warnings: list[str] = []
    infos = [info for info, _ in read_shards(source.validation or source.train, tuple(names), warnings)]
    for info in infos:
        for name in names:
            expected, seen = sample.fields.get(name, info.fields[name]), info.fields[name]
            if seen != expected:
                raise DataError(
                    f"{info.path}: a sample of `{name}` is {_describe(seen)}; the model was trained on "
                    f"{_describe(expected)}. Convert the data, or name other files."
                )
    return tuple(Span(info.path, 0, info.num_samples) for info in infos), tuple(warnings)


def _describe(field: FieldSpec) -> str:
    return f"{field.dtype} {list(field.shape)}"
