"""Writes the files that are read, and lists who reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from hvd_train.data.sources import Arrays
from hvd_train.data.writer import Compression, write_part
from hvd_train.tools.bench.data.contestants import Contestant, in_memory, mapped, modes, own
from hvd_train.tools.bench.data.h5py_peers import batch_by_batch, data_loader
from hvd_train.tools.bench.data.library_peers import streaming, webdataset
from hvd_train.tools.bench.data.samples import Samples

Entries = tuple[list[Contestant], dict[str, str]]
"""Who takes part, and by name why another does not."""

_COMPRESSIONS: Sequence[Compression] = ("none", "gzip")


def enter(samples: Samples, folder: Path) -> Entries:
    """Writes `samples` into `folder` in every layout, and opens nothing. Raises `DataError` or OSError where
    a file cannot be written."""
    np.save(_made(folder / "npy") / "inputs.npy", samples.inputs)
    np.save(folder / "npy" / "targets.npy", samples.targets)
    entries = [in_memory(samples), mapped(folder / "npy")]
    for compression in _COMPRESSIONS:
        entries += _of_hdf5(samples, folder, compression)
    left_out = {}
    for name, package, peer in (
        ("WebDataset", "webdataset", webdataset),
        ("Streaming", "mosaicml-streaming", streaming),
    ):
        entry = _entry(peer, _made(folder / package), samples)
        if entry is None:
            left_out[name] = f"not installed: `pip install {package}`"
        else:
            entries.append(entry)
    return entries, left_out


def _of_hdf5(samples: Samples, folder: Path, compression: Compression) -> list[Contestant]:
    layout = "contiguous" if compression == "none" else compression
    shards = folder / layout
    arrays = Arrays(samples.inputs, samples.targets, samples.scale)
    write_part(shards, arrays, compression=compression)
    (path,) = shards.glob("*.h5")
    entries = [own(shards, mode, layout) for mode in modes()]
    entries.append(batch_by_batch(path, layout))
    workers = (0, 2) if compression == "none" else (0,)
    return entries + [data_loader(path, layout, number) for number in workers]


def _entry(peer: Callable[[Path, Samples], Contestant], folder: Path, samples: Samples) -> Contestant | None:
    try:
        return peer(folder, samples)
    except ImportError:
        return None


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
