"""Modules with Python datasets for the tests. Row i is i, i + 0.25, i + 0.5, with the target i % 7, as in
`shards`."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from hvd_train.data.python import registry
from hvd_train.data.python.memory import Limit

COMMON = """
import numpy as np
import torch

SEEN = []
PASSES = []


def inputs_of(i):
    return np.array([i, i + 0.25, i + 0.5], np.float32)


class Plain(torch.utils.data.Dataset):
    rows = 60

    def __len__(self):
        return self.rows

    def __getitem__(self, i):
        SEEN.append(i)
        return torch.from_numpy(inputs_of(i)), i % 7


class Known(Plain):
    def __init__(self):
        self.targets = [i % 7 for i in range(self.rows)]


class Streamed(torch.utils.data.IterableDataset):
    rows = 60

    def __iter__(self):
        PASSES.append(self)
        for i in range(self.rows):
            yield {"inputs": torch.from_numpy(inputs_of(i)), "targets": i % 7}


def generated():
    PASSES.append("generator")
    for i in range(60):
        yield inputs_of(i), i % 7
"""


def write_module(folder: Path, text: str = "") -> str:
    """A file with these datasets and others; its path."""
    path = folder / "mine.py"
    path.write_text(COMMON + textwrap.dedent(text))
    return str(path)


def seen() -> list[int]:
    """The numbers of the samples that were asked for, since the module was loaded last."""
    found: list[int] = sys.modules["hvd_train_dataset_mine"].SEEN
    return found


def limited(monkeypatch: pytest.MonkeyPatch, of_this_rank: int, ranks: int = 1) -> None:
    """Datasets without an index may hold so many bytes of samples."""
    monkeypatch.setattr(registry, "limit_of", lambda *_: Limit(of_this_rank, of_this_rank * ranks))
