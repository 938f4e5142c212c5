"""docs/data.md: its recipes make files that are trained on."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.cli import main
from tests.launching import ROOT
from tests.markdown import Block, blocks, tables
from tests.mpi.jobs import events

DATA = ROOT / "docs" / "data.md"
HVD_TRAIN = "python -m hvd_train "
BLOCKS = blocks(DATA)
RECIPES = list(dict.fromkeys(block.section for block in BLOCKS))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        yield tmp_path
    finally:
        os.chdir(before)


def execute(block: Block) -> None:
    """Runs a block in the working directory; one that begins with the name of a file becomes that file."""
    first, _, rest = block.text.partition("\n")
    if first.startswith("# "):
        Path(first.removeprefix("# ")).write_text(rest)
    elif block.language == "python":
        exec(compile(block.text, str(DATA), "exec"), {"__name__": "__main__"})
    else:
        for line in block.text.splitlines():
            assert line.startswith(HVD_TRAIN), line
            assert main(shlex.split(line.removeprefix(HVD_TRAIN))) == 0, line


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_trained_on(recipe: str, folder: Path) -> None:
    for block in BLOCKS:
        if block.section == recipe:
            execute(block)
    (run,) = (folder / "runs").iterdir()
    (header,) = events(run, "header")
    (stop,) = events(run, "stop")
    assert (stop["reason"], stop["round"]) == ("max_rounds", 3)
    assert sum(header["samples_per_rank"]) + header["validation_samples"] in (300, 400)
    assert np.isfinite([e["error"] for e in events(run, "evaluation")]).all()
    if recipe == "Several inputs":
        with h5py.File(folder / "two-predicted.h5") as file:
            assert set(np.unique(file["class"])) <= {0, 1}
            assert len(file["class"]) == 300
    if recipe == "Rows of any length, packed":
        with h5py.File(folder / "events-predicted.h5") as file:
            assert len(file["class"]) == 300
    if recipe == "Groups of a file":
        assert header["shards_per_rank"] == [4]


def test_every_kind_of_place_has_a_recipe() -> None:
    table = tables(DATA)[0]
    packed = next(found for found in tables(DATA) if "packed(" in found[1][0])
    shown = DATA.read_text().partition("## ")[2]
    assert [row[0] for row in table[1:]] == [
        "`entry/data`",
        "`table[x,y]`",
        "`table[x]`",
        "`spectrum[100:900]`",
        "`image[0,:,::2]`",
        "`packed(values, offsets)`",
        "`*/data`",
    ]
    named = ("entry/data", "results[x,y]", "results[kind]", "spectrum[100:900]", "packed(values, offsets)")
    for place in (*named, "*/data"):
        assert place in shown
    kinds = ["offsets)", "starts=first)", "lengths=n)"]
    assert [row[0] for row in packed[1:]] == [f"`packed(values, {kind}`" for kind in kinds]
