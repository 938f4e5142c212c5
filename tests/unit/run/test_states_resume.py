"""Whole trainings whose states have policies and periods of their own: resumed, on other ranks, changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hvd_train.comm.agree import SetupFailed
from hvd_train.config import CheckpointConfig, Config, OptimConfig, StopConfig, SyncConfig
from hvd_train.record.reports import RoundReport
from hvd_train.run import packing
from hvd_train.run.saved_checkpoint import SavedCheckpoint
from tests.unit.normed import WithoutDropout
from tests.unit.run.test_outer_resume import rewrite
from tests.unit.trainings import Remembered, resumed, small, train

DES_LOC: dict[str, Any] = {"every_rounds": {"exp_avg": 3, "exp_avg_sq": 6, "buffers": 4}}


def trained(config: Config, ranks: int) -> list[Remembered]:
    return train(config, ranks, WithoutDropout())


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return replace(
        small(tmp_path),
        sync=SyncConfig(period=2, check_every=1),
        optim=OptimConfig(name="AdamW", lr=0.01),
        checkpoint=CheckpointConfig(every_rounds=1, keep=50),
    )


def having(config: Config, rounds: int, name: str = "r", **sync: Any) -> Config:
    stop = StopConfig(patience=0, max_rounds=rounds)
    return replace(config, name=name, stop=stop, sync=replace(config.sync, **sync))


def checkpoint(config: Config, rounds: int) -> SavedCheckpoint:
    return SavedCheckpoint.open(Path(config.runs) / config.name / "checkpoints" / f"round-{rounds}")


@pytest.mark.parametrize(
    "sync",
    [
        DES_LOC,
        {**DES_LOC, "outer": "nesterov", "ema": 0.5},
        {"moments": {"exp_avg_sq": "keep"}, "every_rounds": {"exp_avg": 5}},
        {"moments": {"exp_avg": "reset"}, "batch_norm": "keep"},
        {"optimizer_state": "keep", "batch_norm": "keep"},
        {"optimizer_state": "reset", "moments": {"exp_avg_sq": "average"}, "every_rounds": {"buffers": 5}},
    ],
    ids=str,
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_gives_the_same_bits(ranks: int, sync: dict[str, Any], config: Config) -> None:
    """Interrupted where no state with a period of its own is due."""
    whole, half = having(config, 11, "whole", **sync), having(config, 7, **sync)
    trained(whole, ranks)
    trained(half, ranks)
    trained(resumed(half, max_rounds=11), ranks)
    names = ["model.safetensors", *(f"rank-{rank:05d}.safetensors" for rank in range(ranks))]
    for name in names:
        a, b = (load_file(checkpoint(c, 11).folder / name) for c in (half, whole))
        assert a.keys() == b.keys()
        # The ranks are threads of one process: its generators are seeded by each of them.
        unlike = [key for key in a if not torch.equal(a[key], b[key])]
        assert [key for key in unlike if not key.startswith("random/")] == []


def own(config: Config, rounds: int, rank: int) -> dict[str, Tensor]:
    """What a rank has saved of its own."""
    saved = checkpoint(config, rounds)
    tensors = {**saved.part(rank, "optimizer"), **saved.part(rank, "buffers")}
    return {key: value for key, value in tensors.items() if isinstance(value, Tensor)}


def test_each_rank_saves_what_it_does_not_share(config: Config) -> None:
    config = having(config, 7, **DES_LOC)
    trained(config, 2)
    first, second = own(config, 7, 0), own(config, 7, 1)
    assert {"first.running_mean", "last.weight/exp_avg", "last.weight/exp_avg_sq"} <= first.keys()
    for name in ("first.running_mean", "last.weight/exp_avg", "last.weight/exp_avg_sq"):
        assert not torch.equal(first[name], second[name])
    assert checkpoint(config, 7).part(0, "moments") == {}
    model = load_file(checkpoint(config, 7).folder / "model.safetensors")
    assert torch.equal(model["first.running_mean"], first["first.running_mean"])


def test_another_number_of_ranks_takes_those_of_a_rank_modulo_that_before(config: Config) -> None:
    config = having(config, 7, **DES_LOC)
    trained(config, 2)
    recorders = trained(resumed(config, max_rounds=13), 3)
    assert [r.round for r in recorders[2].of(RoundReport)] == [8, 9, 10, 11, 12, 13]
    # After round 12 all ranks hold the mean of everything.
    twelfth = [own(config, 12, rank) for rank in range(3)]
    assert all(torch.equal(twelfth[0][name], mine[name]) for mine in twelfth for name in mine)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, DES_LOC),
        (DES_LOC, {}),
        (DES_LOC, {"every_rounds": {"exp_avg_sq": 2}, "moments": {"exp_avg": "keep"}}),
        ({"optimizer_state": "keep"}, DES_LOC),
        (DES_LOC, {"optimizer_state": "keep", "batch_norm": "keep"}),
        (DES_LOC, {"optimizer_state": "reset"}),
    ],
    ids=str,
)
def test_what_is_averaged_can_be_changed(before: Any, after: Any, config: Config) -> None:
    trained(having(config, 4, **before), 2)
    old = moments(config, 4)
    recorders = trained(resumed(having(config, 4, **after), max_rounds=5), 2)
    assert [r.round for r in recorders[0].of(RoundReport)] == [5]
    new = moments(config, 5)
    if after.get("optimizer_state") == "reset":
        assert not new
        return
    assert new.keys() == old.keys()
    assert all(new[name] == old[name] + 2 for name in new if name.endswith("/step"))
    # With beta2 = 0.999 two steps cannot bring as much of the moment as six before them: it went on.
    name = "last.weight/exp_avg_sq"
    assert new[name].sum() > 0.5 * old[name].sum()


def test_arguments_of_the_optimizer_can_be_changed(config: Config) -> None:
    """A moment that is new begins with its initial value; the others go on."""
    trained(having(config, 4, **DES_LOC), 2)
    amsgrad = replace(config.optim, args={"amsgrad": True})
    one = replace(resumed(having(config, 4, **DES_LOC), max_rounds=5), optim=amsgrad)
    trained(one, 2)
    assert checkpoint(config, 5).part(0, "moments").keys() >= {"last.weight/max_exp_avg_sq"}
    assert moments(config, 5)["last.weight/step"] == moments(config, 4)["last.weight/step"] + 2
    trained(replace(resumed(one, max_rounds=6), optim=config.optim), 2)
    assert "last.weight/max_exp_avg_sq" not in moments(config, 6)


def moments(config: Config, rounds: int) -> dict[str, Any]:
    """All of the optimizer's state that rank 0 has saved."""
    parts = checkpoint(config, rounds).parts(0)
    return {**parts["moments"], **parts["optimizer"]}


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the parts of rank 0 in its file."""
    parts = SavedCheckpoint.open(folder).parts(0)
    change(parts)
    tensors, plain = {}, {}
    for name, state in parts.items():
        own_tensors, plain[name] = packing.split(state)
        tensors |= {f"{name}/{key}": value for key, value in own_tensors.items()}
    rewrite(folder, "rank-00000.safetensors", packing.pack(tensors, plain))


def test_a_checkpoint_from_before_goes_on(config: Config) -> None:
    """One that an earlier version wrote: without the part `buffers`."""
    trained(having(config, 2), 1)
    folder = checkpoint(config, 2).folder
    changed(folder, lambda parts: parts.pop("buffers"))
    assert "buffers" not in checkpoint(config, 2).parts(0)
    (recorder,) = trained(resumed(having(config, 2, **DES_LOC), max_rounds=4), 1)
    assert [r.round for r in recorder.of(RoundReport)] == [3, 4]


def test_a_buffer_of_another_shape_is_refused(config: Config) -> None:
    config = having(config, 2, **DES_LOC)
    trained(config, 1)
    folder = checkpoint(config, 2).folder
    changed(folder, lambda parts: parts["buffers"].update({"first.running_mean": torch.zeros(4)}))
    with pytest.raises(
        SetupFailed, match=r"buffers: `first.running_mean` is not a buffer of this model: expected"
    ):
        trained(resumed(config, max_rounds=4), 1)


def test_a_second_moment_with_a_longer_period_is_warned_about(
    config: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    trained(having(config, 1, "s", every_rounds={"exp_avg": 6, "exp_avg_sq": 6}), 1)
    assert "exp_avg" not in capfd.readouterr().err
    trained(having(config, 1, every_rounds={"exp_avg": 3, "exp_avg_sq": 6}), 1)
    expected = (
        "exp_avg is averaged in rounds in which exp_avg_sq is not. Where a rank has had no gradient (of a "
        "unit that was never active, a token that it has not seen), its exp_avg_sq is 0, and the exp_avg of "
        "others makes steps of any length. Average exp_avg_sq whenever exp_avg is: with the policy "
        "'average', and sync.every_rounds.exp_avg a multiple of that of exp_avg_sq."
    )
    assert expected in " ".join(capfd.readouterr().err.split())
