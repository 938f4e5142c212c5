"""The files that are damaged: a few of each layout, small, with the configuration by which they are read."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hvd_train.data import shard_file
from hvd_train.data.format import MANIFEST_NAME
from hvd_train.data.index import INDEX_NAME
from hvd_train.data.indexing import write_indexes
from hvd_train.data.locate import locate
from hvd_train.data.places import plain
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from tests.launching import ROOT

ROWS = 30
SHARD = "train-00000-of-00001.h5"
OLD = ROOT / "tests" / "fixtures" / "shards-schema-1"

_random = np.random.default_rng(0)
NUMBERS = _random.normal(size=(ROWS, 4)).astype(np.float32)
IMAGES = _random.integers(0, 256, (ROWS, 3, 3)).astype(np.uint8)
LABELS = np.arange(ROWS) % 5


@dataclass(frozen=True)
class Layout:
    """Files of one kind."""

    build: Callable[[Path], None]
    """Writes them into a folder."""

    data: Mapping[str, Any] = field(default_factory=dict)
    """The configuration beside `data.path`."""

    checked: bool = False
    """Whether checksums of hvd_train cover every value: other values are never accepted."""

    text: str = ""
    """Name of the file of JSON that is damaged; empty: a shard is."""


def _written(folder: Path, **options: Any) -> None:
    images, rows = options.pop("images", False), options.pop("rows", ROWS)
    inputs, scale = (IMAGES, 1 / 255) if images else (NUMBERS, None)
    whole, shard_file.CHECKSUM_BYTES = shard_file.CHECKSUM_BYTES, 200
    try:
        write_part(folder, Arrays(inputs[:rows], LABELS[:rows], scale), **options)
    finally:
        shard_file.CHECKSUM_BYTES = whole


def _contiguous(folder: Path) -> None:
    _written(folder)


def _two_parts(folder: Path) -> None:
    _written(folder, images=True, part="train")
    _written(folder, images=True, rows=9, part="validation")


def _three_shards(folder: Path) -> None:
    _written(folder, shards=3)


def _indexed(folder: Path) -> None:
    _written(folder, shards=3)
    files = locate(str(folder), "PATH").train
    for found in files:
        os.utime(found.path, (1_000_000_000, 1_000_000_000))
    (written,) = write_indexes(files, plain(("inputs", "targets")))
    assert written.num_files == 3


def _chunked(folder: Path) -> None:
    _written(folder, chunk_rows=7)


def _gzip(folder: Path) -> None:
    _written(folder, images=True, compression="gzip", chunk_rows=7)


def _schema_1(folder: Path) -> None:
    folder.mkdir()
    shutil.copy(OLD / "train-00000-of-00002.h5", folder / SHARD)


def _foreign(add: Callable[[h5py.File], None], **options: Any) -> Callable[[Path], None]:
    """A function that writes a file, to which `add` adds datasets."""

    def build(folder: Path) -> None:
        folder.mkdir()
        with h5py.File(folder / SHARD, "w", **options) as file:
            add(file)

    return build


def _plain(file: h5py.File) -> None:
    file["inputs"], file["targets"] = NUMBERS, LABELS


def _beside_others(file: h5py.File) -> None:
    _plain(file)
    file["version"], file["nothing"] = 3.0, h5py.Empty("f4")
    file["names"] = ["a", "bc", "d"]
    file["a/b/rows"] = np.arange(7)
    file["linked"] = h5py.SoftLink("/a/b/rows")
    file["a"].attrs["long"] = "x" * 300


def _indices(file: h5py.File) -> None:
    """Each kind of chunk index: fixed and extensible array, B-tree, and one of a single chunk."""
    file.create_dataset("inputs", data=NUMBERS, chunks=(7, 4), compression="gzip", shuffle=True)
    file.create_dataset("targets", data=LABELS, chunks=(7,), maxshape=(None,))
    file.create_dataset("weights", data=np.arange(ROWS) / 8, chunks=(ROWS,), compression="gzip")
    file.create_dataset("mask", data=LABELS > 1, chunks=(8,))


def _tree(file: h5py.File) -> None:
    file.create_dataset("inputs", data=NUMBERS, chunks=(7, 2), maxshape=(None, None))
    file.create_dataset("targets", data=LABELS, chunks=(7,), maxshape=(None,), compression="lzf")


def _fletcher(file: h5py.File) -> None:
    options = {"compression": "gzip", "shuffle": True, "fletcher32": True}
    file.create_dataset("inputs", data=NUMBERS, chunks=(8, 4), **options)
    file.create_dataset("targets", data=LABELS, chunks=(8,), **options)


def _columns(file: h5py.File) -> None:
    """Chunks of one column, and one that is larger than its dataset."""
    file.create_dataset("inputs", data=NUMBERS, chunks=(ROWS, 1), compression="gzip")
    file.create_dataset("targets", data=LABELS, chunks=(1 << 12,), maxshape=(None,), compression="gzip")


def _table(file: h5py.File) -> None:
    table = np.zeros(ROWS, [("name", "S8"), ("x", "f8"), ("y", "f4"), ("kind", "i2")])
    table["x"], table["y"], table["kind"] = NUMBERS[:, 0], NUMBERS[:, 1], LABELS
    file["results"] = table


def _last_axis(file: h5py.File) -> None:
    file["spectrum"] = NUMBERS.T.copy()
    file["kind"] = LABELS[None].copy()


def _groups(file: h5py.File) -> None:
    for number in range(3):
        part = slice(10 * number, 10 * number + 10)
        file[f"scan {number}/data"], file[f"scan {number}/kind"] = NUMBERS[part], LABELS[part]
    file["about"] = "three scans"


def _packed(file: h5py.File) -> None:
    packed = file.create_dataset(
        "inputs", data=np.arange(4 * ROWS, dtype="i2").reshape(ROWS, 4), fillvalue=-1
    )
    packed.attrs.update(scale_factor=np.float32(0.1), add_offset=np.float32(3), _FillValue=np.int16(7))
    packed.attrs.update(valid_range=np.array([1, 100], "i2"))
    file["targets"] = np.linspace(0, 1, ROWS, dtype="f4")
    file["targets"].attrs["missing_value"] = np.float32(0)


def _texts(file: h5py.File) -> None:
    file["inputs"] = NUMBERS
    file["targets"] = [("cat", "dog", "eel")[label % 3] for label in LABELS]


def _enum(file: h5py.File) -> None:
    kind = h5py.enum_dtype({"CAT": 3, "DOG": 5, "EEL": 7}, basetype="u1")
    file["inputs"] = NUMBERS
    file["targets"] = (3 + 2 * (LABELS % 3)).astype(kind)


def _one_hot(file: h5py.File) -> None:
    file["inputs"], file["targets"] = NUMBERS, np.eye(5, dtype="u1")[LABELS]


def _plugins(file: h5py.File) -> None:
    import hdf5plugin

    file.create_dataset("inputs", data=NUMBERS, chunks=(7, 4), **hdf5plugin.LZ4())
    file.create_dataset("targets", data=LABELS, chunks=(7,), **hdf5plugin.Zstd())
    file.create_dataset("weights", data=np.arange(ROWS) / 8, chunks=(7,), **hdf5plugin.Blosc())


_NEW = {"libver": "latest"}
_FORMAT_18 = {"libver": ("v108", "v108")}
_MARKED = {"weights": "weights", "mask": "mask"}
_SCANS = {"fields": {"x": "*/data", "y": "*/kind"}, "inputs": "x", "targets": "y"}
_LAST = {"samples_axis": -1, "inputs": "spectrum[1:3]", "targets": "kind[0]"}

LAYOUTS = {
    "written, contiguous": Layout(_contiguous, checked=True),
    "written, two parts": Layout(_two_parts, checked=True),
    "written, chunked": Layout(_chunked, checked=True),
    "written, gzip": Layout(_gzip, checked=True),
    "written by schema 1": Layout(_schema_1),
    "manifest": Layout(_three_shards, checked=True, text=MANIFEST_NAME),
    "old format": Layout(_foreign(_beside_others)),
    "format 1.8": Layout(_foreign(_beside_others, **_FORMAT_18)),
    "newest format, arrays": Layout(_foreign(_indices, **_NEW), _MARKED),
    "newest format, B-tree": Layout(_foreign(_tree, **_NEW)),
    "shuffle, gzip, fletcher32": Layout(_foreign(_fletcher)),
    "columns, gzip": Layout(_foreign(_columns)),
    "table": Layout(_foreign(_table), {"inputs": "results[x,y]", "targets": "results[kind]"}),
    "part, last axis": Layout(_foreign(_last_axis), _LAST),
    "groups": Layout(_foreign(_groups), _SCANS),
    "packed (CF)": Layout(_foreign(_packed)),
    "classes, strings": Layout(_foreign(_texts), {"classes": ("cat", "dog", "eel")}),
    "classes, enum": Layout(_foreign(_enum, **_NEW), {"classes": ("3", "5", "7")}),
    "classes, one-hot": Layout(_foreign(_one_hot), {"one_hot": True}),
    "lz4, zstd, blosc": Layout(_foreign(_plugins, **_FORMAT_18), {"weights": "weights"}),
    "index": Layout(_indexed, checked=True, text=INDEX_NAME),
}
"""By name."""

if importlib.util.find_spec("hdf5plugin") is None:
    del LAYOUTS["lz4, zstd, blosc"]
