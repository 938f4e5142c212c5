"""Times drawing batches as float32: warm after an epoch, and cold from opening the files."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch

from hvd_train.errors import EnvironmentMismatch
from hvd_train.tools.bench.data.contestants import Contestant, Pair
from hvd_train.tools.bench.data.samples import Samples

_LONGEST = 4
"""Times the seconds of one timing, after which it ends in the middle of an epoch."""

_PAGE = 4096


def timed(entry: Contestant, samples: Samples, batch_size: int, seconds: float) -> float:
    """Samples/s, of whole epochs where they are short, after the first one or `seconds` of it."""
    with closing(entry.batches(batch_size)) as batches:
        _draw(batches, samples, 0, longest=seconds)
        return _draw(batches, samples, seconds, longest=_LONGEST * seconds)


def timed_cold(entry: Contestant, samples: Samples, batch_size: int, seconds: float) -> float:
    """Samples/s of the first epoch and the opening of the files, none of whose pages is in memory. Raises
    `EnvironmentMismatch` where the system keeps them."""
    forget(entry.files)
    with closing(entry.batches(batch_size)) as batches:
        return _draw(batches, samples, 0, longest=_LONGEST * seconds)


def forget(files: Sequence[Path]) -> None:
    """Drops `files` from the page cache. Raises `EnvironmentMismatch` where their pages stay."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if _has_pages(file.fileno()):
                raise EnvironmentMismatch(f"{path}: its pages stay in memory")


def _has_pages(file: int) -> bool:
    """Whether the page in the middle of it is in memory."""
    middle = os.fstat(file).st_size // 2
    try:
        return os.preadv(file, [bytearray(_PAGE)], middle, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    except OSError:  # a file system that cannot say
        return True


def _draw(batches: Iterator[Pair], samples: Samples, seconds: float, *, longest: float) -> float:
    """Samples/s until an epoch ends after `seconds`, or until `longest` seconds have passed."""
    began, spent, rows = time.perf_counter(), 0.0, 0
    for inputs, targets in batches:
        torch.as_tensor(inputs).to(torch.float32).mul_(samples.scale)
        rows += len(targets)
        spent = time.perf_counter() - began
        if spent >= longest or (spent >= seconds and rows % len(samples) == 0):
            break
    return rows / spent
