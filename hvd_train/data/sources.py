"""Arrays from common file formats, idx and .npz, and the digits that scikit-learn ships."""

from __future__ import annotations

import gzip
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_train.data.files import require_regular
from hvd_train.errors import DataError

Array = npt.NDArray[Any]

_IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class Arrays:
    """Samples in memory."""

    inputs: Array
    """[samples, ...]"""

    targets: Array
    """[samples, ...]"""

    scale: float | None = None
    """What integer inputs are to be multiplied by before the model; None: nothing is known."""

    def take(self, rows: npt.NDArray[np.intp]) -> Arrays:
        """These rows, in this order."""
        return Arrays(self.inputs[rows], self.targets[rows], self.scale)


def load_source(paths: Sequence[str], inputs: str = "inputs", targets: str = "targets") -> Arrays:
    """What `shard write` was given: the word `digits`, one .npz, or an idx file of inputs and one of targets.

    `inputs` and `targets` name the arrays of a .npz. Raises `DataError`.
    """
    if list(paths) == ["digits"]:
        arrays = load_digits()
    elif len(paths) == 1 and paths[0].endswith(".npz"):
        arrays = load_npz(paths[0], inputs, targets)
    elif len(paths) == 2:
        arrays = Arrays(read_idx(paths[0]), _as_labels(read_idx(paths[1])))
        arrays = Arrays(arrays.inputs, arrays.targets, _image_scale(arrays.inputs))
    else:
        raise DataError(
            f"sources {' '.join(paths)!r}: expected `digits`, one .npz file, or two idx files: inputs, then "
            "targets."
        )
    seen = len(arrays.inputs), len(arrays.targets)
    if seen[0] != seen[1] or seen[0] == 0:
        raise DataError(
            f"{' and '.join(paths)}: {seen[0]} inputs and {seen[1]} targets. Expected the same number of "
            "each, and at least 1: give the inputs and the targets of one data set."
        )
    return arrays


def load_digits() -> Arrays:
    """1797 digits: inputs uint8 [1797, 8, 8] of 0 to 16, targets int64 [1797].

    Raises `DataError` where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise DataError(
            "digits: these data come with scikit-learn, which is not installed. "
            "Install it with `pip install hvd_train[demo]`, or set data.path to shards of your own."
        ) from None
    digits = load()
    return Arrays(digits.images.astype(np.uint8), digits.target.astype(np.int64), 1 / 16)


def load_npz(path: str | Path, inputs: str = "inputs", targets: str = "targets") -> Arrays:
    """The arrays `inputs` and `targets` of a .npz file. Raises `DataError`; pickled objects are refused."""
    try:
        require_regular(path, "a .npz file")
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in (inputs, targets) if name not in file.files]
            if missing:
                raise DataError(
                    f"{path}: no array `{missing[0]}`; the file has "
                    f"{', '.join(map(repr, file.files)) or 'none'}. Name them with --inputs and --targets."
                )
            first, second = file[inputs], file[targets]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Expected a .npz file.") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path}: {error}. Expected a complete .npz file with plain numeric arrays."
        ) from None
    for name, array in ((inputs, first), (targets, second)):
        if array.ndim == 0 or array.dtype.kind not in "biuf":
            raise DataError(
                f"{path}: array `{name}` is {array.dtype} {list(array.shape)}. Expected integers, floating-"
                "point numbers or booleans with samples along the first axis."
            )
    return Arrays(first, second, _image_scale(first))


def read_idx(path: str | Path) -> Array:
    """The array of an idx file (MNIST's format), plain or gzip, in native byte order.

    Raises `DataError` for a wrong magic number and for too few or too many bytes.
    """
    raw = _read_bytes(path)
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_DTYPES:
        raise DataError(
            f"{path}: begins with {raw[:4].hex(' ') or 'nothing'}. Expected an idx file: two zero bytes, "
            "a type (08, 09, 0b to 0e) and the number of dimensions. Is this the right file?"
        )
    dtype, num_dims = np.dtype(_IDX_DTYPES[raw[2]]), raw[3]
    header = 4 + 4 * num_dims
    if num_dims == 0 or len(raw) < header:
        raise DataError(
            f"{path}: {len(raw)} bytes and {num_dims} dimensions. Expected a whole idx header: copy it again."
        )
    shape = struct.unpack(f">{num_dims}I", raw[4:header])
    expected = dtype.itemsize
    for length in shape:
        expected *= length
    if len(raw) - header != expected:
        kind = "truncated" if len(raw) - header < expected else "too long"
        raise DataError(
            f"{path}: {kind}: {len(raw) - header} bytes of values, but {expected} for the shape "
            f"{list(shape)} that its header gives. Copy the file again."
        )
    return np.frombuffer(raw, dtype, offset=header).reshape(shape).astype(dtype.newbyteorder("="))


def _read_bytes(path: str | Path) -> bytes:
    try:
        require_regular(path, "an idx file, plain or .gz")
        raw = Path(path).read_bytes()
        # By content, not by name: browsers unpack .gz files and keep the name.
        return gzip.decompress(raw) if raw.startswith(_GZIP_MAGIC) else raw
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Expected an idx file, plain or .gz.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}. Copy the file again.") from None


def _as_labels(array: Array) -> Array:
    # Labels are small; as int64 they need no conversion in any loss.
    return array.astype(np.int64) if array.dtype.kind in "iu" and array.ndim == 1 else array


def _image_scale(inputs: Array) -> float | None:
    return 1 / 255 if inputs.dtype == np.uint8 and inputs.ndim >= 3 else None
