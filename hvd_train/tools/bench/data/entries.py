"""Writes the files that are read, and lists who reads them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvd_train.data.format import Compression
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from hvd_train.errors import DataError
from hvd_train.tools.bench.data.contestants import Contestant, in_memory, mapped, modes, own
from hvd_train.tools.bench.data.h5py_peers import batch_by_batch, data_loader
from hvd_train.tools.bench.data.library_peers import streaming, webdataset
from hvd_train.tools.bench.data.samples import Samples

Entries = tuple[list[Contestant], dict[str, str]]
"""Who takes part, and by name why another does not."""

_LIBRARIES: Mapping[str, tuple[str, str, Callable[[Any, Path, Samples], Contestant]]] = {
    "WebDataset": ("webdataset", "webdataset", webdataset),
    "Streaming": ("mosaicml-streaming", "streaming", streaming),
}
"""By name: the package, its module, and what measures it."""

_OF_PLUGINS: Sequence[Compression] = ("lz4", "zstd", "blosc")


def enter(samples: Samples, folder: Path) -> Entries:
    """Writes `samples` into `folder` in every layout, and opens nothing. Raises `DataError` or OSError where
    a file cannot be written."""
    np.save(_made(folder / "npy") / "inputs.npy", samples.inputs)
    np.save(folder / "npy" / "targets.npy", samples.targets)
    entries = [in_memory(samples), mapped(folder / "npy")]
    for compression in ("none", "gzip"):
        entries += _of_hdf5(samples, folder, compression)
    left_out: dict[str, str] = {}
    for compression in _OF_PLUGINS:
        try:
            entries += _of_hdf5(samples, folder, compression)
        except DataError as error:
            left_out[compression] = str(error).partition(": ")[2]
    for name, (package, module, peer) in _LIBRARIES.items():
        try:
            library = importlib.import_module(module)
        except ModuleNotFoundError:
            left_out[name] = f"not installed: `pip install {package}`"
        except Exception as error:  # whatever an installation that does not fit raises
            left_out[name] = f"cannot be imported: {type(error).__name__}: {error}"
        else:
            entries.append(peer(library, _made(folder / package), samples))
    return entries, left_out


def _of_hdf5(samples: Samples, folder: Path, compression: Compression) -> list[Contestant]:
    layout = "contiguous" if compression == "none" else compression
    shards = folder / layout
    arrays = Arrays(samples.inputs, samples.targets, samples.scale)
    write_part(shards, arrays, compression=compression)
    (path,) = shards.glob("*.h5")
    entries = [own(shards, mode, layout) for mode in modes() if mode != "mmap" or compression == "none"]
    entries.append(batch_by_batch(path, layout))
    workers = (0, 2) if compression == "none" else (0,)
    return entries + [data_loader(path, layout, number) for number in workers]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
