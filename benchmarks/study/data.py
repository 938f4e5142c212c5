"""The rows of the problems, written as shards: one for each rank, and those that are evaluated."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.study.problems import ROOT, SELECTION, SPLITS, TEST, Problem, folder_of
from examples.tabular import table
from hvd_train.data.sources import Arrays, load_npz, read_idx
from hvd_train.data.writer import write_part

MNIST = {"train": "train", TEST: "t10k"}
"""What the names of its files begin with."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a problem."""

    train: Arrays
    split: np.ndarray
    """The order of the rows of `train` in which consecutive parts are unlike."""
    selection: Arrays
    test: Arrays


def write_data(problem: Problem, folder: Path, mnist: Path) -> None:
    """Writes what is not there yet of the shards of a problem below `folder`."""
    missing = [split for split in SPLITS if not (folder / folder_of(problem, split, TEST)).exists()]
    if not missing:
        return
    rows = WRITERS[problem.data](problem.rows, mnist)
    orders = {"alike": np.random.default_rng(0).permutation(problem.rows), "split": rows.split}
    for split in missing:
        train = _taken(rows.train, orders[split])
        for part, validation in ((SELECTION, rows.selection), (TEST, rows.test)):
            name = folder_of(problem, split, part)
            unfinished = folder / f"{name}.unfinished"
            write_part(unfinished, train, part="train", shards=problem.ranks, force=True)
            write_part(unfinished, validation, part="validation", force=True)
            unfinished.rename(folder / name)


def _taken(source: Arrays, rows: np.ndarray) -> Arrays:
    return Arrays(source.inputs[rows], source.targets[rows], source.scale, name=source.name)


def mnist_rows(rows: int, mnist: Path) -> Rows:
    """As many images of each class for training, 1,000 of each of the others for selection, and the test
    images. Split by class: consecutive parts of the rows in the order of their classes."""
    (images, labels), test = (_read_mnist(mnist, part) for part in ("train", TEST))
    by_class = [np.flatnonzero(labels == c) for c in range(10)]
    each = rows // 10
    train = np.concatenate([of[:each] for of in by_class])
    selection = np.concatenate([of[each : each + 1000] for of in by_class])
    return Rows(
        train=Arrays(images[train], labels[train], 1 / 255, name="MNIST"),
        split=np.arange(rows),
        selection=Arrays(images[selection], labels[selection], 1 / 255, name="MNIST"),
        test=Arrays(*test, 1 / 255, name="MNIST"),
    )


def _read_mnist(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = (read_idx(next(folder.glob(f"{MNIST[part]}-{kind}*"))) for kind in ("images", "labels"))
    return images, labels


def text_rows(rows: int, mnist: Path) -> Rows:
    """Stretches of 64 characters of the sources of Python's standard library. Split: consecutive parts of the
    text, whose modules are in the order of their names."""
    with tempfile.TemporaryDirectory() as name:
        words = [sys.executable, str(ROOT / "examples" / "characters.py"), "write", name]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        text, validation = (load_npz(Path(name) / f"{part}.npz") for part in ("train", "validation"))
    chosen = np.sort(np.random.default_rng(0).permutation(len(text.inputs))[:rows])
    evaluated = np.random.default_rng(1).permutation(len(validation.inputs))
    return Rows(
        train=_taken(text, chosen),
        split=np.arange(rows),
        selection=_taken(validation, evaluated[: len(evaluated) // 2]),
        test=_taken(validation, evaluated[len(evaluated) // 2 :]),
    )


def tabular_rows(rows: int, mnist: Path) -> Rows:
    """The table of examples/tabular.py without wrong targets: ten columns, and noise of variance 1 in
    the targets. Split: consecutive parts of the rows in the order of their targets."""
    made = [table(count, wrong=0.0, seed=seed) for seed, count in ((1, rows), (2, 4000), (3, 4000))]
    train, selection, test = (
        Arrays(t["inputs"].astype(np.float32), t["targets"].astype(np.float32)) for t in made
    )
    return Rows(train=train, split=np.argsort(train.targets), selection=selection, test=test)


WRITERS: dict[str, Callable[[int, Path], Rows]] = {
    "mnist": mnist_rows,
    "text": text_rows,
    "tabular": tabular_rows,
}


def write_all(problems: Sequence[Problem], folder: Path, mnist: Path) -> None:
    """Writes what is missing for all of them."""
    for problem in problems:
        write_data(problem, folder, mnist)
