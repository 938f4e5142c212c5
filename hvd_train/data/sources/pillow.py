"""Images of one size as arrays, read by Pillow."""

from __future__ import annotations

from importlib.util import find_spec
from typing import IO, Any, final

import numpy as np

from hvd_train.data.format import Array
from hvd_train.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_MOST_BYTES = 128 << 20
_BAND_BYTES = 1 << 20
_GRAY = {"1", "L"}


@final
class ImageReader:
    """Reads images as uint8 [height, width] if the first one is gray, else [height, width, 3].

    Args:
        resize: height and width that all get; None if they have the same.

    Raises `DataError` where Pillow is missing.
    """

    def __init__(self, resize: tuple[int, int] | None) -> None:
        if find_spec("PIL") is None:
            raise DataError(
                "images are read by Pillow, which is not installed. Install it: "
                "`pip install 'hvd_train[images]'`."
            )
        self._resize = resize
        self._first = ""
        self._mode = ""
        self._shape: tuple[int, ...] = ()

    def read(self, path: str, file: IO[bytes] | None = None) -> Array:
        """The pixels of an image, from `file` if it is given, which is closed. Raises `DataError`, with the
        path, for an image that cannot be read, and for one unlike the first."""
        image = self._decoded(path, file)
        self._first = self._first or path
        self._shape = self._shape or image.shape
        if image.shape != self._shape:
            height, width = self._shape[:2]
            raise DataError(
                f"{path}: {image.shape[0]} pixels high and {image.shape[1]} wide, but {height} and {width} "
                f"in {self._first}. Expected one size: add --resize {height} {width}, or another height and "
                "width."
            )
        return image

    def _decoded(self, path: str, file: IO[bytes] | None) -> Array:
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with Image.open(file or path) as image:
                self._require_modest(path, image.size)
                _require_all(path, image)
                ImageOps.exif_transpose(image, in_place=True)
                mode = "L" if image.mode in _GRAY else "RGB"
                if self._mode == "L" and mode == "RGB":
                    raise DataError(
                        f"{path}: has colours, but {self._first} has none. Expected all gray or all with "
                        "colours: convert the images, or leave some out."
                    )
                self._mode = self._mode or mode
                # Even where nothing changes `convert` is a copy.
                pixels: Any = image if image.mode == self._mode else image.convert(self._mode)
                if self._resize is not None:
                    pixels = pixels.resize(self._resize[::-1], Image.Resampling.BILINEAR)
                pixels.load()
                if file is not None:
                    file.close()  # it may be as large as the image
                return _array(pixels)
        except UnidentifiedImageError:
            raise DataError(
                f"{path}: is damaged, or of a format that this Pillow does not read. Expected an image such "
                "as .png: copy it again, convert it, or leave it out."
            ) from None
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


def _require_all(path: str, image: Any) -> None:
    """Raises `DataError` for an image of which bytes of one frame are only a part."""
    frames = getattr(image, "n_frames", 1) if image.format in ("GIF", "TIFF") else 1
    if frames > 1:
        raise DataError(f"{path}: has {frames} frames. Expected one: save each as a file of its own.")
    if image.mode[0] in "IF":  # of which Pillow would take what is above 255 as 255
        raise DataError(
            f"{path}: has more than 8 bits a pixel. Expected 8: convert the images, or save their pixels "
            "with NumPy and give .npy files."
        )


def _array(image: Any) -> Array:
    """The pixels of an image, in bands: all at once would be in memory three times."""
    pixels = np.empty((image.height, image.width, *((3,) if image.mode == "RGB" else ())), np.uint8)
    band = max(1, _BAND_BYTES // max(1, 3 * image.width))
    for top in range(0, image.height, band):
        bottom = min(top + band, image.height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)), np.uint8)
    return pixels
