"""The moving average under a real launcher, with anchors in shared memory: exact, evaluated, resumed."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.mpi.jobs import events, train

DECAY = 0.875
DIGITS = ("--config", "hvd_train/demo/digits.toml", "--patience", "0", "--threads", "1")
EVERY = ("--sync.ema", str(DECAY), "--checkpoint.every-rounds", "1", "--checkpoint.keep", "50")


def test_it_is_exact_also_with_another_number_of_ranks(tmp_path: Path) -> None:
    train("mpirun", 2, tmp_path, "--name", "r", *DIGITS, *EVERY, "--max-rounds", "5")
    train("mpirun", 3, tmp_path, "--resume", str(tmp_path / "r"), "--max-rounds", "9")
    expected = {}
    for n in range(1, 10):
        folder = tmp_path / "r" / "checkpoints" / f"round-{n}"
        found = load_file(folder / "ema.safetensors")
        for name, anchor in load_file(folder / "model.safetensors").items():
            before = expected.get(name, torch.zeros_like(anchor))
            expected[name] = before.lerp_(anchor, (1 - DECAY) / (1 - DECAY**n))
            assert torch.equal(found[name], expected[name]), (n, name)
    evaluations = events(tmp_path / "r", "evaluation")
    assert [e["round"] for e in evaluations] == [4, 5, 8, 9]
    for event in evaluations:
        assert event["metrics"].keys() == {"error", "loss", "ema_error", "ema_loss"}
        assert 0 < event["metrics"]["ema_loss"] != event["metrics"]["loss"]
