"""What manifests and Python datasets call the classes. Data for one model must share the names of the class
numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from hvd_train.data.format import MANIFEST_NAME, SampleSpec
from hvd_train.data.labels import Labels
from hvd_train.data.locate import Found
from hvd_train.data.python.registry import made_of
from hvd_train.errors import DataError
from hvd_train.io.text import listed, shown

_LISTED = 8


def named_dataset(sample: SampleSpec) -> str:
    """The dataset of the targets, if it holds class numbers, which may have names, else empty."""
    field = sample.fields[sample.targets]
    return "" if field.coding else field.place or sample.targets


def listed_names(files: Sequence[Found], dataset: str) -> tuple[str, ...]:
    """The names that the manifests of `files`, or Python datasets, list for the classes in `dataset`, if any.
    Those of one may be the first of those of another. Raises `DataError` where a class has two
    names."""
    known: tuple[str, ...] = ()
    by = ""
    for place, names in _named(files, dataset):
        if known[: len(names)] != names[: len(known)]:
            raise DataError(_unlike(place, names, known, f"in {by} they are"))
        if len(names) > len(known):
            known, by = names, place
    return known


def _named(files: Sequence[Found], dataset: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Where names of classes are listed, and which."""
    for file in {id(file.manifest) if file.manifest else file.path: file for file in files}.values():
        if file.manifest is not None:
            if file.manifest.sample.targets == dataset:
                folder = file.path.removesuffix(file.entry.file) if file.entry else ""
                yield os.path.join(folder, MANIFEST_NAME), file.manifest.class_names
        elif dataset and (made := made_of(file.path)):
            yield file.path, made.class_names


def require_names(files: Sequence[Found], sample: SampleSpec) -> None:
    """Raises `DataError` where a class is given another name than the training's had."""
    dataset = named_dataset(sample)
    names = listed_names(files, dataset)
    if sample.names and names != sample.names[: len(names)]:
        place = next(place for place, listed in _named(files, dataset) if listed)
        raise DataError(_unlike(place, names, sample.names, "the model was trained on"))


def uncovered(sample: SampleSpec, labels: Labels) -> str:
    """Why the names of the classes are not used: the targets have more classes; empty if they have not."""
    if not sample.names or labels.highest is None or labels.num_classes <= len(sample.names):
        return ""
    return (
        f"{labels.highest}, but {len(sample.names)} classes have names, by {MANIFEST_NAME} or the attribute "
        "`classes` of a dataset: they are not used. Give each class a name."
    )


def _unlike(path: str, seen: Sequence[str], expected: Sequence[str], said: str) -> str:
    a, b = (listed([f"`{shown(name)}`" for name in names], _LISTED) for names in (seen, expected))
    remedy = "write the shards again, with --classes and all names in one order"
    if made_of(path):
        remedy = "list all names in one order in the attribute `classes`"
    return f"{path}: the classes are {a}; {said} {b}. Expected the same names for the same numbers: {remedy}."
