"""Whole trainings with averaged gradients: resumed, on other ranks, switched on and off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from safetensors.torch import load_file

from hvd_train.config import CheckpointConfig, Config, OptimConfig, StopConfig, SyncConfig
from hvd_train.record.reports import FaultReport, LayerReport, RoundReport, StopReport
from hvd_train.record.wording import header_lines
from hvd_train.run.saved_checkpoint import SavedCheckpoint
from tests.unit.outer_checkpoints import kept, optimizer_steps
from tests.unit.trainings import Drawn, Remembered, resumed, small, train


def trained(config: Config, ranks: int) -> list[Remembered]:
    return train(config, ranks, Drawn())


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return replace(
        small(tmp_path),
        sync=SyncConfig(mode="gradients", period=2),
        optim=OptimConfig(name="AdamW", lr=0.01),
        checkpoint=CheckpointConfig(every_rounds=1, keep=50),
        stop=StopConfig(patience=0, max_rounds=6),
    )


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What is on standard error since it was last asked, in one line."""
    return lambda: " ".join(capsys.readouterr().err.split())


def having(config: Config, rounds: int = 6, name: str = "r", **sync: Any) -> Config:
    stop = StopConfig(patience=0, max_rounds=rounds)
    return replace(config, name=name, stop=stop, sync=replace(config.sync, **sync))


def checkpoint(config: Config, rounds: int) -> Path:
    return Path(config.runs) / config.name / "checkpoints" / f"round-{rounds}"


@pytest.mark.parametrize("sync", [{}, {"ema": 0.5}], ids=str)
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_resumed_run_gives_the_same_bits(ranks: int, sync: dict[str, Any], config: Config) -> None:
    """With three ranks one is out of rows before the others are."""
    whole, half = having(config, name="whole", **sync), having(config, 3, **sync)
    trained(whole, ranks)
    trained(half, ranks)
    trained(resumed(half, max_rounds=6), ranks)
    for name in ("model", *(["ema"] if sync else []), *(f"rank-{rank:05d}" for rank in range(ranks))):
        a, b = (load_file(checkpoint(c, 6) / f"{name}.safetensors") for c in (half, whole))
        assert a.keys() == b.keys()
        # The ranks are threads of one process: its generators are seeded by each of them.
        unlike = [key for key in a if not torch.equal(a[key], b[key])]
        assert [key for key in unlike if not key.startswith("random/")] == []
    assert not SavedCheckpoint.open(checkpoint(whole, 6)).part(0, "moments")


@pytest.mark.parametrize("ranks", [1, 4])
def test_moments_are_dealt_anew(ranks: int, config: Config) -> None:
    trained(having(config, 3), 2)
    before = kept(checkpoint(config, 3), "sliced")
    assert before.keys() == {
        f"{moment}/{name}"
        for moment in ("exp_avg", "exp_avg_sq")
        for name in load_file(checkpoint(config, 3) / "model.safetensors")
    }
    trained(resumed(having(config), max_rounds=4), ranks)
    after = kept(checkpoint(config, 4), "sliced")
    assert {key: len(value) for key, value in before.items()} == {k: len(v) for k, v in after.items()}
    assert optimizer_steps(checkpoint(config, 4)) == {8.0}, "four rounds of two steps"
    other = replace(config, optim=OptimConfig(name="AdamW", lr=0.01, args={"amsgrad": True}))
    trained(resumed(having(other), max_rounds=5), ranks)
    assert optimizer_steps(checkpoint(config, 5)) == {2.0}, "with other arguments the state begins anew"


def test_the_mode_can_be_changed_and_back(config: Config, said: Callable[[], str]) -> None:
    trained(having(config, 2, mode="average"), 2)
    said()
    trained(resumed(having(config), max_rounds=4), 2)
    expected = "sync.mode was 'average' and is 'gradients': the optimizer's state begins anew."
    assert expected in said()
    folder = checkpoint(config, 4)
    assert all((value != 0).any() for key, value in kept(folder, "sliced").items() if "bias" not in key)
    assert optimizer_steps(folder) == {4.0}, "two rounds of two steps"
    trained(resumed(having(config, mode="average"), max_rounds=5), 2)
    assert "sync.mode was 'gradients' and is 'average': the optimizer's state begins anew." in said()
    saved = SavedCheckpoint.open(checkpoint(config, 5))
    assert "sliced" not in saved.parts(0)
    own = saved.part(0, "optimizer")
    assert {float(value) for key, value in own.items() if key.endswith("/step")} == {2.0}


def test_a_rank_that_is_not_finite_has_no_weight_in_that_step(config: Config, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["inputs"][20] = float("nan")
    config = replace(config, data=replace(config.data, not_finite="keep"))
    (recorder, *_) = trained(having(config, 20, period=1), 3)
    (fault,) = recorder.of(FaultReport)
    assert fault.ranks == (0,)
    assert fault.message.startswith("gradients or loss of ranks [0] were not finite: ")
    assert fault.message.endswith("They took the others' mean.")
    rounds = recorder.of(RoundReport)
    assert [r.zero_weight for r in rounds if r.round == fault.round] == [(0,)]
    assert all(torch.isfinite(torch.tensor(r.loss)) and r.drift is None for r in rounds)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_round_with_a_bad_step_on_every_rank_does_not_end_the_run(
    ranks: int, config: Config, tmp_path: Path
) -> None:
    """A rank is named if one of its steps was not finite. The others have moved the parameters."""
    for name, row in (("a.h5", 20), ("b.h5", 20), ("b.h5", 150)):  # with three ranks one on each
        with h5py.File(tmp_path / name, "r+") as file:
            file["inputs"][row] = float("nan")
    config = replace(config, data=replace(config.data, not_finite="keep"))
    (recorder, *_) = trained(having(config, 2, period=120), ranks)
    assert [r.round for r in recorder.of(RoundReport)] == [1, 2]
    assert {f.ranks for f in recorder.of(FaultReport)} == {tuple(range(ranks))}
    for fault in recorder.of(FaultReport):
        assert fault.message.endswith("Steps without a finite gradient were left out; there were others.")
    assert recorder.of(StopReport)[0].reason == "max_rounds"
    saved = load_file(checkpoint(config, 2) / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_a_round_without_a_finite_step_ends_the_run(config: Config, tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5"):
        with h5py.File(tmp_path / name, "r+") as file:
            file["inputs"][...] = float("nan")
    config = replace(config, data=replace(config.data, not_finite="keep"))
    (recorder, *_) = trained(having(config), 2)
    (fault,) = recorder.of(FaultReport)
    assert fault.message.endswith("All ranks keep the last good parameters; the run ends.")
    assert recorder.of(StopReport)[0].reason == "diverged"


def test_the_header_and_the_layers_say_what_a_step_is(config: Config) -> None:
    (recorder, *_) = trained(having(config, 2), 2)
    assert recorder.start.mode == "gradients"
    lines = "\n".join(header_lines(recorder.start))
    assert "gradients in every local step; a round is 2 local steps" in lines
    layers = recorder.of(LayerReport)
    assert layers
    assert {report.period for report in layers} == {1}
