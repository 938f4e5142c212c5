"""What manifests call the classes: class numbers with names, which data for one model must share."""

from __future__ import annotations

import os
from collections.abc import Sequence

from hvd_train.data.format import MANIFEST_NAME, SampleSpec
from hvd_train.data.labels import Labels
from hvd_train.data.locate import Found
from hvd_train.errors import DataError
from hvd_train.io.text import listed, shown

_LISTED = 8


def named_dataset(sample: SampleSpec) -> str:
    """The dataset of the targets, if its values are class numbers as a manifest may name them; else empty."""
    field = sample.fields[sample.targets]
    return "" if field.coding else field.place or sample.targets


def listed_names(files: Sequence[Found], dataset: str) -> tuple[str, ...]:
    """The names that the manifests of `files` list for the classes in `dataset`; empty if none does. Those of
    one may be the first of those of another. Raises `DataError` where a class has two names."""
    known: tuple[str, ...] = ()
    by = ""
    for file in {id(file.manifest): file for file in files}.values():
        if file.manifest is None or file.manifest.sample.targets != dataset:
            continue
        names = file.manifest.class_names
        if known[: len(names)] != names[: len(known)]:
            raise DataError(_unlike(_place(file), names, known, f"in {by} they are"))
        if len(names) > len(known):
            known, by = names, _place(file)
    return known


def require_names(files: Sequence[Found], sample: SampleSpec) -> None:
    """Raises `DataError` where a manifest gives a class another name than the training's had."""
    names = listed_names(files, named_dataset(sample))
    if sample.names and names != sample.names[: len(names)]:
        file = next(file for file in files if file.manifest and file.manifest.class_names)
        raise DataError(_unlike(_place(file), names, sample.names, "the model was trained on"))


def uncovered(sample: SampleSpec, labels: Labels) -> str:
    """Why the names of a manifest are not used: the targets have more classes; empty if they have not."""
    if not sample.names or labels.highest is None or labels.num_classes <= len(sample.names):
        return ""
    return (
        f"{labels.highest}, but {MANIFEST_NAME} names {len(sample.names)} classes: their names are not used. "
        "Write the shards again with a name for each class."
    )


def _place(file: Found) -> str:
    folder = file.path.removesuffix(file.entry.file) if file.entry else ""
    return os.path.join(folder, MANIFEST_NAME)


def _unlike(path: str, seen: Sequence[str], expected: Sequence[str], said: str) -> str:
    a, b = (listed([f"`{shown(name)}`" for name in names], _LISTED) for names in (seen, expected))
    return (
        f"{path}: the classes are {a}; {said} {b}. Expected the same names for the same numbers: write the "
        "shards again, with --classes and all names in one order."
    )
