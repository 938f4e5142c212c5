"""idx and .npz files, the digits, and what is said about files that are not what they should be."""

from __future__ import annotations

import gzip
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hvd_train.data.sources import load_digits, load_npz, open_source, read_idx
from hvd_train.errors import DataError

CODES = {"u1": 0x08, "i1": 0x09, ">i2": 0x0B, ">i4": 0x0C, ">f4": 0x0D, ">f8": 0x0E}


def idx_bytes(array: npt.NDArray[Any], dtype: str = "u1") -> bytes:
    header = bytes([0, 0, CODES[dtype], array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(dtype).tobytes()


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_idx_of_every_type(tmp_path: Path, dtype: str, packed: bool) -> None:
    array = np.arange(24).reshape(4, 3, 2)
    raw = idx_bytes(array, dtype)
    path = tmp_path / "a-idx3"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    read = read_idx(path)
    np.testing.assert_array_equal(read, array)
    assert read.dtype == np.dtype(dtype).newbyteorder("=")


IMAGES = idx_bytes(np.arange(60).reshape(5, 4, 3))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", r"begins with nothing\. Expected an idx file"),
        (b"PK\x03\x04" + IMAGES, r"begins with 50 4b 03 04\. Expected an idx file"),
        (b"\0\0\x07" + IMAGES[3:], r"begins with 00 00 07 03"),
        (IMAGES[:10], r"10 bytes and 3 dimensions\. Expected a whole idx header"),
        (IMAGES[:-1], r"truncated: 59 bytes of values, but 60 for the shape \[5, 4, 3\]"),
        (IMAGES + b"x", r"too long: 61 bytes of values, but 60"),
        (gzip.compress(IMAGES)[:-12], r"cannot be read: .*Copy the file again"),
        (gzip.compress(IMAGES)[:12] + b"\xff" * 30, r"cannot be read: .*Copy the file again"),
    ],
    ids=["empty", "magic", "type", "header", "truncated", "too-long", "gz-truncated", "gz-damaged"],
)
def test_a_bad_idx_file_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "bad-idx"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=rf"bad-idx: {message}"):
        read_idx(path)


def test_a_pair_of_idx_files(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(IMAGES)
    (tmp_path / "y").write_bytes(idx_bytes(np.arange(5)))
    arrays = open_source([str(tmp_path / "x"), str(tmp_path / "y")])
    assert (arrays.inputs.dtype, arrays.fields["targets"].dtype, arrays.scale) == (np.uint8, "int64", 1 / 255)
    (tmp_path / "y").write_bytes(idx_bytes(np.arange(4)))
    with pytest.raises(DataError, match="5 inputs and 4 targets"):
        open_source([str(tmp_path / "x"), str(tmp_path / "y")])
    with pytest.raises(DataError, match="no-such-file: no such file"):
        open_source([str(tmp_path / "x"), "no-such-file"])


def test_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, inputs=np.ones((3, 2), "f4"), targets=np.arange(3), other=np.zeros(3))
    arrays = open_source([str(path)])
    assert (arrays.inputs.shape, arrays.targets.tolist(), arrays.scale) == ((3, 2), [0, 1, 2], None)
    assert load_npz(path, "inputs", "other").targets.tolist() == [0, 0, 0]
    with pytest.raises(DataError, match=r"no array `x`; the file has 'inputs', 'targets', 'other'.*--inputs"):
        load_npz(path, "x")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.npz: .*Expected a complete \.npz file"):
        load_npz(path)
    with pytest.raises(DataError, match=r"b\.npz: no such file"):
        load_npz(tmp_path / "b.npz")


def test_a_pickle_in_a_npz_is_never_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    np.savez(tmp_path / "a.npz", inputs=np.array([Trap()], dtype=object), targets=np.zeros(1))
    with pytest.raises(DataError, match="pickle"):
        load_npz(tmp_path / "a.npz")
    assert not (tmp_path / "sprung").exists()


def test_other_sources_are_refused() -> None:
    with pytest.raises(DataError, match=r"expected `digits`, one \.npz file, or two idx files"):
        open_source(["a.xyz"])


def test_digits() -> None:
    digits = load_digits()
    assert (digits.inputs.shape, digits.inputs.dtype, int(digits.inputs.max())) == (
        (1797, 8, 8),
        np.uint8,
        16,
    )
    assert (digits.targets.shape, digits.targets.dtype, digits.scale) == ((1797,), np.int64, 1 / 16)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        DataError, match=r"scikit-learn, which is not installed.*pip install hvd_train\[demo\]"
    ):
        load_digits()
