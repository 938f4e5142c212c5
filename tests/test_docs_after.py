"""docs/after.md: its commands and programs are run, and give what the run's model gives."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import hvd_train
from hvd_train.cli import main
from hvd_train.data.sources import load_digits
from tests.launching import ROOT, run
from tests.markdown import Block, blocks

AFTER = ROOT / "docs" / "after.md"
HVD_TRAIN = "python -m hvd_train "

Printed = list[tuple[Block, str]]


def execute(block: Block) -> str:
    """Runs a block in the working directory, in this process where it is Python; returns what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if block.language == "python":
            exec(compile(block.text, str(AFTER), "exec"), {"__name__": "__main__"})
            return out.getvalue()
        for line in block.text.splitlines():
            if line.startswith(HVD_TRAIN):
                assert main(shlex.split(line.removeprefix(HVD_TRAIN))) == 0, line
            else:
                job = run(["bash", "-c", line], deadline_s=30, cwd=Path.cwd())
                assert job.returncode == 0, job.output
                out.write(job.stdout)
    return out.getvalue()


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Printed]:
    """The folder in which all blocks were run, one after the other, and what each printed."""
    folder, before = tmp_path_factory.mktemp("after"), Path.cwd()
    np.save(folder / "images.npy", load_digits().inputs[:50])
    os.chdir(folder)
    try:
        return folder, [(block, execute(block)) for block in blocks(AFTER)]
    finally:
        os.chdir(before)


def test_every_program_gives_what_the_model_gives(printed: tuple[Path, Printed]) -> None:
    folder, done = printed
    model = hvd_train.load_model(folder / "runs" / "digits")
    with torch.no_grad():
        expected = model(torch.from_numpy(np.load(folder / "images.npy"))).argmax(1).tolist()
    assert len(set(expected)) > 5
    programs = [text.splitlines() for block, text in done if block.language == "python"]
    assert len(programs) == 4
    assert [lines[-1] for lines in programs[1:]] == [str(expected)] * 3
    assert 0.9 < float(programs[0][-1]) < 1
    (shown,) = re.findall(r"line that it prints is `(.+?)`", AFTER.read_text())
    assert programs[3][0] == shown


def test_the_exports_are_compared_and_have_their_sums(printed: tuple[Path, Printed]) -> None:
    folder, done = printed
    (exports,) = [text for block, text in done if "hvd_train export" in block.text]
    differences = re.findall(r"^compared .*largest difference (\S+) ", exports, re.MULTILINE)
    assert len(differences) == 3
    assert differences[0] == "0"
    (sums,) = [text for block, text in done if "sha256sum" in block.text]
    in_card, of_file = re.findall(r"\b[0-9a-f]{64}\b", sums)
    assert in_card == of_file
    assert sorted(p.name for p in folder.glob("digits.*")) == [
        f"digits.{suffix}{card}" for suffix in ("onnx", "pt2", "safetensors") for card in ("", ".toml")
    ]
