"""A folder of images with a folder for each class, read by Pillow."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from typing import Any, final

import numpy as np

from hvd_train.data.format import Array, FieldSpec
from hvd_train.data.sources.base import INPUTS, TARGETS, Block, Source, rows_of_block
from hvd_train.errors import DataError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_MOST_BYTES = 128 << 20
_GRAY = {"1", "L"}


@final
class ImageFolder(Source):
    """Inputs uint8 [height, width] of gray images, else [height, width, 3]; targets int64, the place of an
    image's folder among all, sorted by name. The first image decides which.

    Args:
        path: each of its folders has the images of a class.
        resize: height and width that all get; None if they have the same.

    Raises `DataError`.
    """

    def __init__(self, path: str, resize: tuple[int, int] | None = None) -> None:
        if find_spec("PIL") is None:
            raise DataError(
                "images are read by Pillow, which is not installed. Install it: "
                "`pip install 'hvd_train[images]'`."
            )
        self._path = path
        self._resize = resize
        folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
        self._counts = {name: len(self._files(name)) for name in folders if name[0] != "."}
        self._counts = {name: count for name, count in self._counts.items() if count}
        if not self._counts:
            raise DataError(
                f"{path}: no images in its folders. Expected files ending in {', '.join(_SUFFIXES)}, in a "
                "folder for each class."
            )
        first = next(iter(self._counts))
        self._first = os.path.join(path, first, self._files(first)[0])
        self._mode = ""
        self._shape = self._read(self._first).shape

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
        return tuple(self._counts)

    @property
    def files(self) -> Collection[str]:
        return [os.path.join(self._path, name) for name in self._counts]

    def blocks(self, names: Collection[str] = (), start: int = 0) -> Iterator[Block]:
        rows = rows_of_block(self.fields)
        for number, (folder, count) in enumerate(self._counts.items()):
            files = self._files(folder) if start < count else []
            for first in range(start, len(files), rows):
                paths = [os.path.join(self._path, folder, file) for file in files[first : first + rows]]
                block: dict[str, Array] = {TARGETS: np.full(len(paths), number, np.int64)}
                if not names or INPUTS in names:
                    block[INPUTS] = np.stack([self._image(path) for path in paths])
                yield block
            start = max(0, start - count)

    def _files(self, folder: str) -> list[str]:
        entries = os.scandir(os.path.join(self._path, folder))
        return sorted(entry.name for entry in entries if entry.name.lower().endswith(_SUFFIXES))

    def _image(self, path: str) -> Array:
        image = self._read(path)
        if image.shape != self._shape:
            height, width = self._shape[:2]
            raise DataError(
                f"{path}: {image.shape[0]} pixels high and {image.shape[1]} wide, but {height} and {width} "
                f"in {self._first}. Expected one size: add --resize {height} {width}, or another height and "
                "width."
            )
        return image

    def _read(self, path: str) -> Array:
        from PIL import Image

        try:
            with Image.open(path) as image:
                self._require_modest(path, image.size)
                mode = "L" if image.mode in _GRAY else "RGB"
                if self._mode == "L" and mode == "RGB":
                    raise DataError(
                        f"{path}: has colours, but {self._first} has none. Expected all gray or all with "
                        "colours: convert the images, or leave some out."
                    )
                self._mode = self._mode or mode
                pixels: Any = image.convert(self._mode)
                if self._resize is not None:
                    pixels = pixels.resize(self._resize[::-1], Image.Resampling.BILINEAR)
                return np.asarray(pixels, np.uint8)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{path}: {error}. Expected a complete image: copy it again, or leave it out."
            ) from None

    def _require_modest(self, path: str, size: tuple[int, int]) -> None:
        if size[0] * size[1] * 3 > _MOST_BYTES:
            raise DataError(
                f"{path}: {size[1]} pixels high and {size[0]} wide. Expected {_MOST_BYTES >> 20} MiB of "
                "pixels at most: make it smaller."
            )
