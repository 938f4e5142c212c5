"""HDF5 filters, such as compression, that the chunks of a dataset passed, and whether HDF5 has them here."""

from __future__ import annotations

from typing import Any

import h5py

from hvd_train.data.format import Compression
from hvd_train.errors import DataError, UnsupportedShard
from hvd_train.io.text import shown

_OF_HDF5PLUGIN = {
    307: "bzip2",
    32001: "blosc",
    32004: "lz4",
    32008: "bitshuffle",
    32013: "zfp",
    32015: "zstd",
    32017: "sz",
    32018: "fcidecomp",
    32024: "sz3",
    32026: "blosc2",
    32028: "sperr",
    32033: "htj2k",
}
"""Registered numbers and names of the filters that the package hdf5plugin brings."""
_WRITTEN: dict[str, tuple[int, tuple[int, ...], bool]] = {
    "lz4": (32004, (0,), True),
    "zstd": (32015, (3,), True),
    # Four values that the filter sets itself, level 5, its own shuffle, LZ4 in its blocks.
    "blosc": (32001, (0, 0, 0, 0, 5, 1, 1), False),
}
"""Number and options of the filters that shards are written with, and whether HDF5 shuffles the bytes."""
_MOST_NAME = 60


def require_filters(dataset: h5py.Dataset, path: str, name: str) -> None:
    """Raises `UnsupportedShard` if a chunk of `dataset`, `name` in the file `path`, cannot be read because a
    filter is not installed. If hdf5plugin is installed and brings it, it is registered for this process.

    A filter is needed if one chunk passed it. A writer may skip an optional filter for single chunks, as HDF5
    records with each chunk, and chunks that were never written passed none. So the chunks are searched up to
    the first that did, whichever rows this rank reads: every rank decides the same, before the training. A
    dataset whose filters are all available costs no search.
    """
    pipeline = dataset.id.get_create_plist()
    for index in range(pipeline.get_nfilters()):
        number, _, _, recorded = pipeline.get_filter(index)
        if h5py.h5z.filter_avail(number) or not _is_needed(dataset, index):
            continue
        remedy = _register(number)
        if not h5py.h5z.filter_avail(number):
            raise UnsupportedShard(
                f"{path}: dataset `{name}` needs the HDF5 filter {_describe(number, recorded)}, which is not "
                f"installed. {remedy}"
            )


def creation_of(compression: Compression) -> dict[str, Any]:
    """What `create_dataset` needs for a compression; `shuffle`: to put the bytes of equal place of all values
    together before. If it is one of hdf5plugin's, they are registered for this process. Raises `DataError`
    where that is not installed."""
    if compression == "none":
        return {}
    if compression == "gzip":
        return {"compression": "gzip", "shuffle": True}
    number, options, shuffle = _WRITTEN[compression]
    if not h5py.h5z.filter_avail(number):
        remedy = _register(number)
        if not h5py.h5z.filter_avail(number):
            filter_ = _describe(number, b"")
            raise DataError(
                f"--compression {compression}: the HDF5 filter {filter_} is not installed. {remedy}"
            )
    return {"compression": number, "compression_opts": options, "shuffle": shuffle}


def _is_needed(dataset: h5py.Dataset, index: int) -> bool:
    """Whether a chunk passed the filter at this place of the pipeline."""
    if not hasattr(dataset.id, "chunk_iter"):  # HDF5 before 1.12.3
        return True

    def passed(chunk: Any) -> bool | None:
        return None if chunk.filter_mask >> index & 1 else True  # None goes on to the next chunk

    return dataset.id.chunk_iter(passed) is not None


def _register(number: int) -> str:
    """Registers the filters of hdf5plugin, if it has the one of this number; returns what to do if it is not
    available then."""
    if number not in _OF_HDF5PLUGIN:
        return (
            "Install its plugin and set HDF5_PLUGIN_PATH to the folder of the plugin, or write the file "
            "without filters on a machine that has it: `h5repack -f NONE OLD.h5 NEW.h5`."
        )
    try:
        import hdf5plugin
    except ModuleNotFoundError:
        return "Install it where the ranks run: `pip install hdf5plugin`."
    except Exception as error:  # of a library that does not load, or HDF5's of a filter in use
        return (
            f"hdf5plugin, which has it, cannot be imported: {error}. Install it again: "
            "`pip install --force-reinstall hdf5plugin`."
        )
    return (
        f"hdf5plugin {hdf5plugin.version} does not have it. Install a newer one: "
        "`pip install --upgrade hdf5plugin`."
    )


def _describe(number: int, recorded: bytes) -> str:
    # The table first: many filters are recorded without a name, or with a sentence.
    name = _OF_HDF5PLUGIN.get(number) or shown(recorded.decode(errors="backslashreplace"), _MOST_NAME)
    return f"{name} (number {number})" if name else f"number {number}"
