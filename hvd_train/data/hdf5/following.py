"""The files that the links of a shard lead to."""

from __future__ import annotations

import os
from functools import cached_property
from typing import final

import h5py

from hvd_train.data.crash import naming
from hvd_train.data.files import require_regular
from hvd_train.data.hdf5.explained import NOT_HDF5, explained
from hvd_train.data.hdf5.opening import open_file
from hvd_train.errors import DataError, UnsupportedShard
from hvd_train.io.text import shown

FOLLOW = "set data.follow_links = true (of `shard`: --follow-links)"
"""What to do about values that are in another file of the shard's folder."""


@final
class LinkedFiles:
    """Opens the files that links lead to, and keeps them open until it is closed.

    They must be in the folder of the shard, or below it: a shard that another person made must not have any
    file read that its reader did not name.

    Args:
        path: of the shard's file, as the user named it.
        follow: whether links are followed at all.
    """

    def __init__(self, path: str, follow: bool) -> None:
        self.follow = follow
        self._shard = path
        self._open: dict[str, h5py.File] = {}

    @cached_property
    def _root(self) -> str:
        return os.path.realpath(os.path.dirname(self._shard) or ".")

    def another(self) -> LinkedFiles:
        """The same rules for other files, which are closed apart from these."""
        return LinkedFiles(self._shard, self.follow)

    def path_of(self, name: str, file: str, what: str) -> str:
        """The path of a file by the name that a link gives it. Nothing is opened.

        Args:
            name: relative to the folder of `file`, or absolute; `.` for `file` itself.
            file: the file that has the link.
            what: the link, in words, for messages.

        Raises `UnsupportedShard` for a file outside of the folder of the shard, and `DataError` where no file
        is.
        """
        if name == ".":
            return file
        joined = os.path.join(os.path.dirname(file), name)
        real, path = os.path.realpath(joined), os.path.normpath(joined)
        if os.path.realpath(path) != real:  # `..` after a symbolic link
            path = real
        if os.path.commonpath([real, self._root]) != self._root:
            raise UnsupportedShard(
                f"{file}: {what} leads to {shown(name)}, which is {shown(real)}, outside of the folder of "
                f"the shard, {self._root}. Expected a file in that folder or below it: move the file there, "
                "and write the link again, with its new name relative to the file that has the link."
            )
        if not os.path.exists(real):
            raise DataError(
                f"{file}: {what} leads to {shown(name)}, but there is no file {shown(path)}. Expected every "
                "file that a shard leads to: put it there, or write the shard without it."
            )
        return path

    def open(self, path: str) -> h5py.File:
        """The file, open. Raises `DataError` that names it where it cannot be read."""
        if path not in self._open:
            with explained(path, NOT_HDF5):
                require_regular(path, "an HDF5 file")
                self._open[path] = naming(path)(open_file, path)
        return self._open[path]

    def close(self) -> None:
        """Closes all of them. May be called twice."""
        while self._open:
            self._open.popitem()[1].close()
