"""docs/after.md: its commands and programs about exports are run, and give what the run's model gives."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hvd_train
from hvd_train.data.sources import load_source
from tests.launching import AS_ROOT, BIN, ROOT, Job, run
from tests.markdown import blocks

AFTER = ROOT / "docs" / "after.md"
SECTIONS = ("", "Export", "Load an export in plain torch", "Load an export in ONNX Runtime")


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str, Job]]]:
    """The folder in which all blocks were run, one after the other, and what each printed."""
    folder = tmp_path_factory.mktemp("after")
    np.save(folder / "images.npy", load_source(["digits"]).inputs[:50])
    done = []
    env = {"PYTHONPATH": str(ROOT), "PATH": f"{BIN}:/usr/bin:/bin", **AS_ROOT}
    for block in blocks(AFTER):
        if block.section not in SECTIONS:
            continue
        shell = ["bash", "-euo", "pipefail", "-c", block.text]
        argv = shell if block.language == "sh" else [sys.executable, "-c", block.text]
        job = run(argv, deadline_s=200, cwd=folder, env=env)
        assert job.returncode == 0, f"{block.text}\n{job.output}"
        done.append((block.language, block.text, job))
    return folder, done


def test_every_program_gives_what_the_model_gives(printed: tuple[Path, list[tuple[str, str, Job]]]) -> None:
    folder, done = printed
    model = hvd_train.load_model(folder / "runs" / "digits")
    with torch.no_grad():
        expected = model(torch.from_numpy(np.load(folder / "images.npy"))).argmax(1).tolist()
    assert len(set(expected)) > 5
    programs = [job.stdout.splitlines() for language, _, job in done if language == "python"]
    assert len(programs) == 3
    assert [lines[-1] for lines in programs] == [str(expected)] * 3
    (shown,) = re.findall(r"line that it prints is `(.+?)`", AFTER.read_text())
    assert programs[2][0] == shown


def test_the_exports_are_compared_and_have_their_sums(
    printed: tuple[Path, list[tuple[str, str, Job]]],
) -> None:
    folder, done = printed
    (export,) = [job for _, text, job in done if "hvd_train export" in text]
    differences = re.findall(r"^compared .*largest difference (\S+) ", export.stdout, re.MULTILINE)
    assert len(differences) == 3
    assert differences[0] == "0"
    (sums,) = [job.stdout for _, text, job in done if "sha256sum" in text]
    in_card, of_file = re.findall(r"\b[0-9a-f]{64}\b", sums)
    assert in_card == of_file
    assert sorted(p.name for p in folder.glob("digits.*")) == [
        f"digits.{suffix}{card}" for suffix in ("onnx", "pt2", "safetensors") for card in ("", ".toml")
    ]
