"""Carries out what the refusal of a shard says to do about it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.data.hdf5.file import read_info
from hvd_train.data.places import plain
from hvd_train.errors import UnsupportedShard


def hdf5_tool(name: str) -> str:
    """A program of HDF5; without it the test is skipped."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"there is no {name}: Debian has it in hdf5-tools")
    return path


def refusal(path: Path, names: Sequence[str] = ("inputs", "targets")) -> str:
    """Why the file is refused."""
    with pytest.raises(UnsupportedShard) as refused:
        read_info(path, plain(names))
    return str(refused.value)


def written_again(path: Path, message: str, *others: str) -> Path:
    """A new file, from `path`, by the statements of the message; the datasets `others` are copied."""
    (statements,) = re.findall(
        r"from an open file `old` to a new one, `new`: `(.*?)`\. Copy the other", message
    )
    target = path.with_name("new.h5")
    with h5py.File(path) as old, h5py.File(target, "w") as new:
        exec(statements, {"h5py": h5py, "np": np, "old": old, "new": new})
        for name in others:
            old.copy(name, new)
    return target
