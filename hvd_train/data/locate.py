"""Which shards a path names."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvd_train.data.format import Manifest, ShardEntry, ShardInfo
from hvd_train.data.hdf5.groups import groups_of
from hvd_train.data.manifest import differences, load_manifest
from hvd_train.data.places import GROUP, Places
from hvd_train.data.python.registry import made_of, make
from hvd_train.errors import DataError
from hvd_train.io.user_module import split_name

SUFFIXES = (".h5", ".hdf5")
UNFINISHED_SUFFIX = ".unfinished.json"
"""Of what is known of shards that are being written."""

OTHER_SUFFIXES = (".hdf", ".he5", ".nc", ".nc4", ".cdf", ".mat", ".h5ad", ".loom", ".nxs", ".cxi")
"""Of formats that are HDF5, or were before. In a folder they count only if it has none of `SUFFIXES`: a file
may be there in both forms."""


@dataclass(frozen=True)
class Found:
    """A shard that was found; nothing of it has been read."""

    path: str

    entry: ShardEntry | None = None
    """Its line in the manifest, if there is one."""

    manifest: Manifest | None = None
    """The manifest that lists it."""

    def differences(self, info: ShardInfo) -> Iterator[str]:
        """One message for each thing in which the shard, whose header is `info`, is not what was listed."""
        return differences(info, self.entry, self.manifest) if self.entry and self.manifest else iter(())


@dataclass(frozen=True)
class Source:
    """The shards that a path names. Without a manifest all of them are in `train`."""

    train: tuple[Found, ...]
    validation: tuple[Found, ...] = ()
    manifest: Manifest | None = None


def locate(path: str, key: str, *, files_only: bool = False) -> Source:
    """The shards of a folder (by its manifest.json, else its .h5 and .hdf5 files, else files such as .nc), a
    file, or a glob pattern; or a Python dataset, `module:make_dataset`, which is made.

    Files are sorted by name, shards of a manifest keep its order. Raises `DataError`, with `key`
    as the name of what the user gave, where nothing is found.

    Args:
        files_only: refuse Python datasets.
    """
    if os.path.isdir(path):
        manifest = load_manifest(path)
        if manifest is None:
            _refuse_unfinished(path)
            return Source(_plain(_files_in(path, key)))
        return Source(
            _listed(path, manifest, manifest.train), _listed(path, manifest, manifest.validation), manifest
        )
    if os.path.exists(path):
        return Source(_plain([path]))
    # A pattern may fit one file in several ways.
    files = sorted({name for name in glob.glob(path, recursive=True) if not os.path.isdir(name)})
    if not files and split_name(path):
        if files_only:
            raise DataError(
                f"{key} = {path!r} names a Python dataset; expected files. Write shards of it: `hvd_train "
                f"shard write --from {path} --out FOLDER`."
            )
        make(path, key)
        return Source(_plain([path]))
    if not files:
        raise DataError(
            f"{key} = {path!r}: no such file or folder, and no file fits it as a pattern. "
            "Expected a folder with a manifest.json or with .h5 files, one file, a glob pattern, or a Python "
            "dataset: `module:make_dataset`."
        )
    return Source(_plain(files))


def _refuse_unfinished(folder: str) -> None:
    for record in Path(folder).glob(f".*{UNFINISHED_SUFFIX}"):
        raise DataError(
            f"{record}: `hvd_train shard write` was ended before all shards were written. Run the same "
            "command "
            "again: it goes on where it was. Or delete the folder."
        )


def in_groups(shards: Sequence[Found], layout: Places) -> Iterator[Found]:
    """The shards; where the fields are in groups of a file, each of its groups as one. Raises `DataError`."""
    for shard in shards:
        if layout.has_groups and made_of(shard.path) is None:
            yield from (Found(shard.path + GROUP + group) for group in groups_of(shard.path, layout))
        else:
            yield shard


def _files_in(folder: str, key: str) -> list[str]:
    visible = [name for name in os.listdir(folder) if not name.startswith(".")]
    for suffixes in (SUFFIXES, OTHER_SUFFIXES):
        if files := sorted(name for name in visible if os.path.splitext(name)[1].lower() in suffixes):
            start = str(Path(folder, "_"))[:-1]  # as pathlib has it, without `./`
            return [start + name for name in files]
    raise DataError(
        f"{key} = {folder!r}: the folder holds neither manifest.json nor files ending in "
        f"{', '.join((*SUFFIXES, *OTHER_SUFFIXES))}. Write some with `hvd_train shard write`, or give a glob "
        "pattern."
    )


def _plain(files: Sequence[str]) -> tuple[Found, ...]:
    return tuple(Found(file) for file in files)


def _listed(folder: str, manifest: Manifest, entries: Sequence[ShardEntry]) -> tuple[Found, ...]:
    return tuple(Found(os.path.join(folder, entry.file), entry, manifest) for entry in entries)
