""".npz and .npy files, mapped into memory where they are not compressed."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from hvd_train.data.files import require_regular
from hvd_train.data.format import Array
from hvd_train.data.sources.base import GROUP, INPUTS, TARGETS, Arrays, alike
from hvd_train.data.sources.streamed import StreamedArray
from hvd_train.errors import DataError

_PICKLED = (
    "it has Python objects, such as rows of different lengths, which are pickled: to load them could run any "
    "program. Pad the rows to one length"
)
_LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a zip file, before each member: the lengths of its name and of its extra field."""


def load_npz(
    path: str | Path,
    inputs: str = INPUTS,
    targets: str = TARGETS,
    others: Mapping[str, str] | None = None,
    group: str = "",
) -> Arrays:
    """The arrays `inputs` and `targets` of a .npz file, `others` by the name of their field, and the one with
    the groups. Raises `DataError`; pickled objects are refused."""
    names = {INPUTS: inputs, TARGETS: targets, **(others or {}), **({GROUP: group} if group else {})}
    with _explained(path, "a .npz file", "a complete .npz file with plain numeric arrays"):
        with zipfile.ZipFile(path) as file:
            there = [Path(name).stem if name.endswith(".npy") else name for name in file.namelist()]
            for name in names.values():
                if name not in there:
                    raise DataError(
                        f"{path}: no array `{name}`; the file has "
                        f"{', '.join(map(repr, there)) or 'none'}. Name them with --inputs, --targets and "
                        "--fields."
                    )
        arrays = {field: _member(Path(path), f"{name}.npy") for field, name in names.items()}
    for field, array in arrays.items():
        if field != GROUP:
            _require_numbers(f"{path}: array `{names[field]}`", array)
    return _arrays(arrays, str(path), (str(path),))


def open_npy(files: Mapping[str, str], group: str = "") -> Arrays:
    """An array from a .npy file for each field, `inputs` and `targets` among them, and from one with the
    groups. Raises `DataError`."""
    arrays: dict[str, Array] = {}
    files = {**files, **({GROUP: group} if group else {})}
    for field, path in files.items():
        with _explained(path, "a .npy file", "a complete .npy file with plain numbers"):
            arrays[field] = _mapped(path)
        if field != GROUP:
            _require_numbers(f"{path}: the array", arrays[field])
    return _arrays(arrays, " and ".join(files.values()), tuple(files.values()))


def _mapped(path: str) -> Array:
    with open(path, "rb") as file:
        _, _, dtype = _header(file)
    if dtype.hasobject:
        raise ValueError(_PICKLED)
    return npy.open_memmap(path, mode="r")


def _arrays(arrays: dict[str, Array], name: str, files: tuple[str, ...]) -> Arrays:
    inputs, targets, group = arrays.pop(INPUTS), arrays.pop(TARGETS), arrays.pop(GROUP, None)
    lengths = {INPUTS: len(inputs), TARGETS: len(targets), **{key: len(a) for key, a in arrays.items()}}
    if group is not None:
        lengths["groups"] = len(group)
    if len(set(lengths.values())) > 1 or not len(inputs):
        raise DataError(alike(name, lengths))
    scale = 1 / 255 if inputs.dtype == np.uint8 and len(inputs.shape) >= 3 else None
    return Arrays(inputs, targets, scale, arrays, group, name, files)


def _member(path: Path, member: str) -> Array:
    """An array in a .npz file: mapped, or a `StreamedArray` if it is compressed."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        with archive.open(member) as file:
            shape, fortran, dtype = _header(file)
            header = file.tell()
    if dtype.hasobject:
        raise ValueError(_PICKLED)
    if info.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as raw:
            raw.seek(info.header_offset)
            lengths = _LOCAL_HEADER.unpack(raw.read(_LOCAL_HEADER.size))
        offset = info.header_offset + _LOCAL_HEADER.size + sum(lengths) + header
        if 0 in shape:
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")
    if fortran and len(shape) > 1:
        raise ValueError(
            f"`{member}` is compressed and stored by columns, so that its rows cannot be read one by one: "
            "save it with numpy.ascontiguousarray"
        )

    def at_values() -> BinaryIO:
        file = zipfile.ZipFile(path).open(member)  # noqa: SIM115, closed by the array
        file.read(header)
        return file  # type: ignore[return-value]

    return StreamedArray(at_values, shape, dtype)  # type: ignore[return-value]


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, fortran, dtype


def _require_numbers(where: str, array: Array) -> None:
    if not array.shape or array.dtype.kind not in "biuf":
        raise DataError(
            f"{where} is {array.dtype} {list(array.shape)}. Expected integers, floating-"
            "point numbers or booleans with samples along the first axis."
        )


@contextmanager
def _explained(path: str | Path, kind: str, expected: str) -> Iterator[None]:
    try:
        require_regular(path, kind)
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Expected {kind}.") from None
    except (OSError, ValueError, EOFError, LookupError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: {error}. Expected {expected}.") from None
    except RuntimeError as error:  # encrypted, or compressed by what Python does not have here
        raise DataError(
            f"{path}: {error}. Expected {expected}: write it again by numpy.savez, or by "
            "numpy.savez_compressed."
        ) from None
