"""Opens what a user names as the source of shards, by its kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvd_train.data.locate import OTHER_SUFFIXES, SUFFIXES
from hvd_train.data.progress import Progress, unseen
from hvd_train.data.sources.base import INPUTS, TARGETS, Source
from hvd_train.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is taken of the files, and how. Names are those of arrays, datasets (places in HDF5 files) or
    columns."""

    inputs: str = INPUTS
    targets: str = TARGETS
    others: Mapping[str, str] = field(default_factory=dict)
    """Further fields: what they are called in the files."""
    group: str = ""
    """What says which group a row belongs to."""
    classes: tuple[str, ...] = ()
    """Texts or folders that are classes, in the order of their numbers."""
    resize: tuple[int, int] | None = None
    """Height and width of images."""
    tokenizer: str = "bytes"
    length: int = 128
    """Tokens of a sequence."""
    progress: Progress = unseen
    """Of what is read before the first row is asked for."""
    python: str = ""
    """The name of a Python dataset, in place of files."""

    @property
    def names(self) -> dict[str, str]:
        """What each field is called in the files."""
        return {INPUTS: self.inputs, TARGETS: self.targets, **self.others}


EXPECTED = (
    "expected `digits`, one .npz file, or two idx files: inputs, then targets; or two .npy files, HDF5 files "
    "(.h5 and others), CSV files (.csv, .tsv, plain or .gz), Parquet files (.parquet), text (.txt), "
    "WebDataset files (.tar), or a folder of images with a folder for each class"
)


def open_source(paths: Sequence[str], wanted: Wanted | None = None) -> Source:
    """The source that `paths` name. Raises `DataError`, also where a package that reads it is missing."""
    wanted = wanted or Wanted()
    source = _open(paths, wanted)
    rows = source.num_rows
    if rows == 0:
        raise DataError(f"{source.name}: 0 rows. Expected at least 1.")
    return source


def _open(paths: Sequence[str], wanted: Wanted) -> Source:
    if wanted.python:
        return _open_python(paths, wanted)
    if list(paths) == ["digits"]:
        from hvd_train.data.sources.digits import load_digits

        return load_digits()
    if len(paths) == 1 and paths[0].endswith(".npz"):
        from hvd_train.data.sources.npz import load_npz

        return load_npz(paths[0], wanted.inputs, wanted.targets, wanted.others, wanted.group)
    for is_kind, opened in _KINDS:
        if paths and all(map(is_kind, paths)):
            return opened(paths, wanted)
    if len(paths) == 2 and not any(Path(path).suffix.lower() in _KNOWN for path in paths):
        from hvd_train.data.sources.idx import open_idx_pair

        return open_idx_pair(paths[0], paths[1], wanted.progress)
    for path in paths:
        if not os.path.exists(path):
            raise DataError(f"{path}: no such file or folder; {EXPECTED}.")
    raise DataError(f"sources {' '.join(paths)!r}: {EXPECTED}.")


def _open_python(paths: Sequence[str], wanted: Wanted) -> Source:
    from hvd_train.data.sources.python_dataset import PythonDataset

    if paths:
        raise DataError(f"{' '.join(paths)} and --from {wanted.python}: expected one source. Leave one out.")
    return PythonDataset(wanted.python, wanted.names, wanted.group, wanted.classes)


def _open_npy(paths: Sequence[str], wanted: Wanted) -> Source:
    from hvd_train.data.sources.npz import open_npy

    if len(paths) != 2:
        raise DataError(
            f"{' '.join(paths)}: {len(paths)} .npy files. Expected two: inputs, then targets. Name further "
            "ones as --fields NAME=FILE."
        )
    return open_npy({INPUTS: paths[0], TARGETS: paths[1], **wanted.others}, wanted.group)


def _open_hdf5(paths: Sequence[str], wanted: Wanted) -> Source:
    from hvd_train.data.sources.hdf5 import Hdf5Source

    return Hdf5Source(paths, wanted.names, wanted.group, wanted.progress)


def _open_csv(paths: Sequence[str], wanted: Wanted) -> Source:
    from hvd_train.data.sources.csv_files import CsvSource

    return CsvSource(paths, wanted.names, wanted.group, wanted.classes, wanted.progress)


def _open_parquet(paths: Sequence[str], wanted: Wanted) -> Source:
    from hvd_train.data.sources.parquet_files import ParquetSource

    return ParquetSource(paths, wanted.names, wanted.group, wanted.classes, wanted.progress)


def _open_images(paths: Sequence[str], wanted: Wanted) -> Source:
    from hvd_train.data.sources.images import ImageFolder

    if len(paths) != 1:
        raise DataError(
            f"{' '.join(paths)}: {len(paths)} folders. Expected one, with a folder for each class."
        )
    return ImageFolder(paths[0], wanted.resize, wanted.classes)


def _open_text(paths: Sequence[str], wanted: Wanted) -> Source:
    from hvd_train.data.sources.text import TextSource

    return TextSource(paths, wanted.tokenizer, wanted.length)


def _open_tar(paths: Sequence[str], wanted: Wanted) -> Source:
    from hvd_train.data.sources.webdataset import WebDataset

    return WebDataset(paths, wanted.names, wanted.group, wanted.classes, wanted.resize)


def _is_folder_of_folders(path: str) -> bool:
    """A folder of shards has files instead."""
    return os.path.isdir(path) and not any(entry.is_file() for entry in os.scandir(path))


def _is_csv(path: str) -> bool:
    return path.removesuffix(".gz").endswith((".csv", ".tsv"))


def _is_hdf5(path: str) -> bool:
    return os.path.isdir(path) or os.path.splitext(path)[1].lower() in (*SUFFIXES, *OTHER_SUFFIXES)


_KINDS: list[tuple[Callable[[str], bool], Callable[[Sequence[str], Wanted], Source]]] = [
    (lambda path: path.endswith(".npy"), _open_npy),
    (_is_csv, _open_csv),
    (lambda path: path.endswith(".parquet"), _open_parquet),
    (lambda path: path.endswith(".txt"), _open_text),
    (lambda path: path.removesuffix(".gz").endswith(".tar"), _open_tar),
    (_is_folder_of_folders, _open_images),
    (_is_hdf5, _open_hdf5),
]
_KNOWN = {".npz", ".npy", ".csv", ".tsv", ".parquet", ".txt", ".tar", *SUFFIXES, *OTHER_SUFFIXES}
