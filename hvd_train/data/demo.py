"""The embedded default data: handwritten digits, in two shards split by class, and all ten to evaluate on."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

import numpy as np

from hvd_train.data.format import MANIFEST_NAME
from hvd_train.data.sources import Arrays, load_digits
from hvd_train.data.writer import write_part
from hvd_train.errors import DataError

_NAME = "digits-v2"
_VALIDATION_FRACTION = 0.2
_SEED = 0


def ensure_digits() -> Path:
    """The folder with the digits' shards; written into the user's cache when it is first asked for.

    Any number of processes and hosts may do this at once: each writes a folder of its own and renames
    it, and all but one find that it is there already. Raises `DataError` where scikit-learn is missing
    or the cache cannot be written.
    """
    folder = cache_folder() / _NAME
    if (folder / MANIFEST_NAME).exists():
        return folder
    temporary = folder.with_name(f".{_NAME}.{secrets.token_hex(4)}.tmp")
    train, validation = _split(load_digits())
    try:
        temporary.mkdir(parents=True)
        write_part(temporary, train, part="train", shards=2, by_class=True)
        write_part(temporary, validation, part="validation")
        _rename(temporary, folder)
    except OSError as error:
        raise DataError(
            f"{folder}: the digits cannot be written here: {error.strerror}. "
            "Set HVD_TRAIN_CACHE to a folder that can be written."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def cache_folder() -> Path:
    """$HVD_TRAIN_CACHE, else hvd_train in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("HVD_TRAIN_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hvd_train"


def _rename(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        # Another process was first, and a folder that is not empty is never replaced by a rename.
        if not (folder / MANIFEST_NAME).exists():
            raise


def _split(digits: Arrays) -> tuple[Arrays, Arrays]:
    random = np.random.default_rng(_SEED)
    held_out = np.zeros(len(digits.targets), bool)
    for label in np.unique(digits.targets):
        rows = random.permutation(np.flatnonzero(digits.targets == label))
        held_out[rows[: round(_VALIDATION_FRACTION * len(rows))]] = True
    return digits.take(np.flatnonzero(~held_out)), digits.take(np.flatnonzero(held_out))
