"""A folder of images with a folder for each class."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from typing import final

import numpy as np

from hvd_train.data.format import Array, FieldSpec
from hvd_train.data.sources.base import INPUTS, TARGETS, Block, Source, rows_of_block
from hvd_train.data.sources.pillow import IMAGE_SUFFIXES, ImageReader
from hvd_train.errors import DataError
from hvd_train.io.text import listed


@final
class ImageFolder(Source):
    """Inputs uint8 [height, width] of gray images, else [height, width, 3]; targets int64, the place of an
    image's folder among `classes`. The first image decides which.

    Args:
        path: each of its folders has the images of a class.
        resize: height and width that all get; None if they have the same.
        classes: the names of the folders in the order of the classes' numbers, also of those that have no
            images here; empty for the folders with images, sorted.

    Raises `DataError`.
    """

    def __init__(
        self, path: str, resize: tuple[int, int] | None = None, classes: tuple[str, ...] = ()
    ) -> None:
        self._path = path
        self._reader = ImageReader(resize)
        folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        self._counts = {name: len(self._files(name)) for name in folders if name[0] != "."}
        self._counts = {name: count for name, count in self._counts.items() if count}
        if not self._counts:
            raise DataError(
                f"{path}: no images in its folders. Expected files ending in {', '.join(IMAGE_SUFFIXES)}, in "
                "a "
                "folder for each class."
            )
        self._classes = classes or tuple(self._counts)
        unknown = [name for name in self._counts if name not in self._classes]
        if unknown:
            known = listed([f"`{name}`" for name in classes])
            raise DataError(
                f"{os.path.join(path, unknown[0])}: has images, but is not one of --classes: {known}. Add it "
                "there, or move the folder elsewhere."
            )
        first = next(iter(self._counts))
        self._shape = self._reader.read(os.path.join(path, first, self._files(first)[0])).shape

    @property
    def name(self) -> str:
        return self._path

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        return {
            INPUTS: FieldSpec(shape=self._shape, dtype="uint8"),
            TARGETS: FieldSpec(shape=(), dtype="int64"),
        }

    @property
    def num_rows(self) -> int:
        return sum(self._counts.values())

    @property
    def scale(self) -> float:
        return 1 / 255

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._classes

    @property
    def files(self) -> Collection[str]:
        return [os.path.join(self._path, name) for name in self._counts]

    def blocks(self, names: Collection[str] = (), start: int = 0) -> Iterator[Block]:
        rows = rows_of_block(self.fields)
        for folder, count in self._counts.items():
            number = self._classes.index(folder)
            files = self._files(folder) if start < count else []
            for first in range(start, len(files), rows):
                paths = [os.path.join(self._path, folder, file) for file in files[first : first + rows]]
                yield self._block(paths, number, not names or INPUTS in names)
            start = max(0, start - count)

    def _block(self, paths: list[str], number: int, with_images: bool) -> Block:
        block: dict[str, Array] = {TARGETS: np.full(len(paths), number, np.int64)}
        if with_images:
            images = [self._reader.read(path) for path in paths]
            block[INPUTS] = np.stack(images) if len(images) > 1 else images[0][np.newaxis]
        return block

    def _files(self, folder: str) -> list[str]:
        entries = os.scandir(os.path.join(self._path, folder))
        return sorted(entry.name for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES))
