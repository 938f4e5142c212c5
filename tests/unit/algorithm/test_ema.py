"""The moving average of the averages: its values, from the saved anchors, its slices, and that training does
not notice it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hvd_train.after.trained import load_model
from hvd_train.algorithm.averaging import StateAverage
from hvd_train.algorithm.ema import AverageWithEma, Ema
from hvd_train.algorithm.flat_state import FlatState
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import (
    CheckpointConfig,
    Config,
    EvaluateConfig,
    ModelConfig,
    StopConfig,
    SyncConfig,
)
from hvd_train.data.format import SampleSpec
from hvd_train.errors import ConfigError, RunDirectoryError
from hvd_train.record.console import _Status
from hvd_train.record.reports import EvaluationReport, FaultReport, RoundReport
from hvd_train.run import checkpoint
from hvd_train.run.saved_checkpoint import SavedCheckpoint
from hvd_train.tasks.built_in import Classification
from tests.threads import ThreadCommunicator, on_ranks
from tests.unit.data.shards import write_foreign
from tests.unit.run_reports import HEADER, evaluation
from tests.unit.trainings import resumed, small, train

DECAY = 0.75


class Net(nn.Module):
    """Parameters of two types, one of them in columns, a frozen one, and statistics of a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU())
        self.still = nn.Parameter(torch.ones(2), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros(7, dtype=torch.float64))
        self.head = nn.Linear(5, 7)
        self.head.weight = nn.Parameter(self.head.weight.detach().t().contiguous().t())
        generator = torch.Generator().manual_seed(5)  # the ranks are threads, which share the global one
        for p in (*self.body.parameters(), *self.head.parameters()):
            p.detach().normal_(0.5, 0.5, generator=generator)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(inputs / 240)) + self.shift.float()
        return outputs


class Mixed(Classification):
    """Trains a `Net`."""

    def __init__(self) -> None:
        super().__init__(ModelConfig())

    def build_model(self, spec: SampleSpec) -> nn.Module:
        super().build_model(spec)
        return Net()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """With validation data, and a checkpoint after every round."""
    config = small(tmp_path)
    write_foreign(tmp_path / "val.hdf5", 30, 240)
    return replace(
        config,
        data=replace(config.data, validation=str(tmp_path / "val.hdf5")),
        sync=SyncConfig(period=2, ema=DECAY),
        evaluate=EvaluateConfig(every_epochs=0, every_rounds=2, batch_size=4),
        checkpoint=CheckpointConfig(every_rounds=1, keep=50),
        stop=StopConfig(patience=0, max_rounds=6),
    )


def folder(config: Config, rounds: int) -> Path:
    return Path(config.runs) / config.name / "checkpoints" / f"round-{rounds}"


def saved(config: Config, rounds: int, name: str = "model") -> dict[str, Tensor]:
    return load_file(folder(config, rounds) / f"{name}.safetensors")


def check(config: Config, rounds: int, first: int = 1) -> None:
    """Compares the moving average of every round with that of the saved anchors since `first`, bit by bit."""
    expected = {n: t.zero_() for n, t in saved(config, first).items()}
    for n in range(first, rounds + 1):
        anchor, found = saved(config, n), saved(config, n, "ema")
        count = n - first + 1
        for name, value in anchor.items():
            if value.is_floating_point() and name != "still":
                expected[name].lerp_(value, (1 - DECAY) / (1 - DECAY**count))
            else:
                expected[name] = value
            assert torch.equal(found[name], expected[name]), (n, name)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_it_is_the_moving_average_of_the_saved_anchors(ranks: int, config: Config) -> None:
    train(config, ranks, Mixed())
    check(config, 6)
    model, moving = saved(config, 6), saved(config, 6, "ema")
    differ = {n for n in model if not torch.equal(model[n], moving[n])}
    assert {"body.0.weight", "body.1.running_mean", "shift", "head.weight", "head.bias"} <= differ
    assert not differ & {"still", "body.1.num_batches_tracked"}


def test_it_is_the_weighted_mean_without_a_bias(config: Config) -> None:
    train(config, 2, Mixed())
    anchors = [saved(config, n)["body.0.weight"].double() for n in range(1, 7)]
    weights = [DECAY ** (6 - n) for n in range(1, 7)]
    mean = sum(w * x for w, x in zip(weights, anchors, strict=True)) / sum(weights)
    torch.testing.assert_close(saved(config, 6, "ema")["body.0.weight"].double(), mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("changes", [{}, {"batch_norm": "keep"}, {"optimizer_state": "keep"}])
def test_training_does_not_notice_it(changes: dict[str, Any], config: Config) -> None:
    with_it = replace(config, sync=replace(config.sync, **changes))
    without = replace(with_it, name="without", sync=replace(with_it.sync, ema=0.0))
    curves = [
        [(e.round, e.error, e.metrics["loss"]) for e in train(c, 2, Mixed())[0].of(EvaluationReport)]
        for c in (with_it, without)
    ]
    assert curves[0] == curves[1]
    for rounds in range(1, 7):
        a, b = saved(with_it, rounds), saved(without, rounds)
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert SavedCheckpoint.open(folder(with_it, rounds)).has_ema
        assert not SavedCheckpoint.open(folder(without, rounds)).has_ema


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_resumed_run_goes_on_with_it(ranks: int, config: Config) -> None:
    """To the bit, with the same number of ranks or with another one."""
    train(replace(config, stop=StopConfig(patience=0, max_rounds=3)), 2, Mixed())
    train(resumed(config, max_rounds=6), ranks, Mixed())
    check(config, 6)
    if ranks == 2:
        whole = replace(config, name="whole")
        train(whole, 2, Mixed())
        for name in ("model.safetensors", "ema.safetensors"):
            assert (folder(whole, 6) / name).read_bytes() == (folder(config, 6) / name).read_bytes()


def test_it_can_be_switched_on_and_off(config: Config) -> None:
    off = replace(config, sync=replace(config.sync, ema=0.0))
    train(replace(off, stop=StopConfig(patience=0, max_rounds=2)), 2, Mixed())
    train(resumed(config, max_rounds=4), 2, Mixed())
    check(config, 4, first=3)
    train(replace(resumed(config, max_rounds=5), sync=off.sync), 2, Mixed())
    assert not (folder(config, 5) / "ema.safetensors").exists()
    train(resumed(config, max_rounds=7), 2, Mixed())
    check(config, 7, first=6)


def test_a_rank_that_is_not_finite_or_out_of_rows_does_not_reach_it(config: Config, tmp_path: Path) -> None:
    """Of three rounds, an epoch, rank 0 has rows for two, and in one of these a value that is not finite."""
    write_foreign(tmp_path / "a.h5", 32)
    write_foreign(tmp_path / "b.h5", 48, 32)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["inputs"][3, 1] = float("nan")
    data, sync = replace(config.data, batch_size=16), replace(config.sync, period=1)
    config = replace(config, data=data, sync=sync)
    recorders = train(config, 2, Mixed())
    weightless = [r.zero_weight for r in recorders[0].of(RoundReport)]
    assert sum(ranks == (0,) for ranks in weightless) == 4, "in two epochs once of each kind"
    assert len(recorders[0].of(FaultReport)) == 2
    check(config, 6)
    assert all(torch.isfinite(t).all() for t in saved(config, 6, "ema").values())


@pytest.mark.parametrize("ranks", [1, 3])
def test_it_is_evaluated_beside_the_model(ranks: int, config: Config, tmp_path: Path) -> None:
    reports = train(config, ranks, Mixed())[0].of(EvaluationReport)
    assert [r.round for r in reports] == [2, 4, 6]
    for report in reports:
        assert report.metrics.keys() == {"error", "loss", "ema_error", "ema_loss"}
        model = load_model(folder(config, report.round), "ema-best", Mixed())
        task = Mixed()
        task.build_model(SavedCheckpoint.open(folder(config, report.round)).sample)
        with torch.no_grad():
            batch = {n: torch.from_numpy(a) for n, a in arrays(tmp_path / "val.hdf5").items()}
            total, count = task.metrics(model, batch)["error"]
        assert report.metrics["ema_error"] == pytest.approx(total / count)
    assert reports[-1].metrics["ema_loss"] != reports[-1].metrics["loss"]


def arrays(path: Path) -> dict[str, Any]:
    with h5py.File(path, locking=False) as file:
        return {name: file[name][()] for name in ("inputs", "targets")}


def test_the_watch_can_follow_it(config: Config) -> None:
    watched = replace(config, evaluate=replace(config.evaluate, metric="ema_error"))
    for report in train(watched, 2, Mixed())[0].of(EvaluationReport):
        assert report.error == report.metrics["ema_error"]


def test_without_validation_data_it_is_kept_and_saved(config: Config) -> None:
    alone = replace(config, data=replace(config.data, validation=""))
    (report, *_) = train(alone, 2, Mixed())[0].of(EvaluationReport)
    assert report.metrics.keys() == {"error", "loss"}
    check(alone, 6)


def test_a_checkpoint_without_it_says_so(config: Config) -> None:
    train(replace(config, sync=SyncConfig(period=2)), 1, Mixed())
    run = Path(config.runs) / config.name
    with pytest.raises(
        RunDirectoryError, match=r"round-\d has no moving average, as sync\.ema was off\. Take"
    ):
        load_model(run, "ema-latest", Mixed())
    with pytest.raises(RunDirectoryError, match=r"expected best, latest or round-N, or ema- before it"):
        load_model(run, "ema-", Mixed())


@pytest.mark.parametrize("ema", [1.0, -0.1])
def test_the_decay_is_checked(ema: float) -> None:
    with pytest.raises(ConfigError, match=r"sync\.ema = .*: expected a decay in \[0, 1\)"):
        SyncConfig(ema=ema)
    with pytest.raises(ConfigError, match=r"sync\.ema = 0\.5: expected 0 with sync\.mode = 'none'"):
        SyncConfig(ema=0.5, mode="none")


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_each_rank_holds_one_slice_of_the_model_alone(ranks: int) -> None:
    """Not of the optimizer's state, which is as large, and evenly: 59 parameters on 7 ranks."""

    def held(comm: ThreadCommunicator) -> int:
        model = nn.Linear(2, 1)
        model.weight = nn.Parameter(torch.zeros(59))
        model.bias = None
        state = FlatState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), comm)
        ema = Ema(state, comm, 0.9)
        average = AverageWithEma(StateAverage(state, comm), ema)
        average.start()
        average.average(1.0, healthy=True)
        return sum(part.numel() for part in ema._slices.values())

    sizes = on_ranks(ranks, held)
    assert sum(sizes) == 59
    assert max(sizes) - min(sizes) <= 1


def test_an_average_without_weight_does_not_count() -> None:
    model, comm = nn.Linear(1, 1, bias=False), SoloCommunicator()
    state = FlatState(model, torch.optim.SGD(model.parameters(), lr=0.1), comm)
    ema = Ema(state, comm, 0.5)
    average = AverageWithEma(StateAverage(state, comm), ema)
    average.start()
    seen = []
    for value, weight in ((8.0, 0.0), (3.0, 1.0), (100.0, 0.0), (6.0, 2.0)):
        with torch.no_grad():
            model.weight.fill_(value)
        average.average(weight, healthy=weight > 0)
        live = model.weight.item()
        if ema.averages:
            with ema.shown():
                seen.append(model.weight.item())
            assert model.weight.item() == live
        else:
            seen.append(None)
    assert ema.averages == 2
    assert seen == [None, 3.0, 3.0, pytest.approx((0.5 * 3 + 6) / 1.5)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_kept_in_float32(dtype: torch.dtype) -> None:
    """In bfloat16 a decay of 0.999 would leave no trace of a round."""
    model, comm = nn.Linear(1, 1, bias=False).to(dtype), SoloCommunicator()
    state = FlatState(model, torch.optim.SGD(model.parameters(), lr=0.1), comm)
    ema = Ema(state, comm, 0.999)
    average = AverageWithEma(StateAverage(state, comm), ema)
    average.start()
    for _ in range(500):
        with torch.no_grad():
            model.weight.fill_(1.0)
        average.average(1.0, healthy=True)
    for _ in range(1000):
        with torch.no_grad():
            model.weight.fill_(2.0)
        average.average(1.0, healthy=True)
    share = (1 - 0.999**1000) / (1 - 0.999**1500)
    with ema.shown():
        assert model.weight.dtype is dtype
        assert model.weight.item() == pytest.approx(1 + share, rel=0.01)
    assert model.weight.item() == 2.0


def test_a_checkpoint_that_fails_leaves_the_model_as_it_was(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second file of the model cannot be packed: training goes on."""
    whole = replace(config, name="whole")
    train(whole, 1, Mixed())
    packed = []

    def pack(*args: Any) -> bytes:
        packed.append(args)
        if len(packed) == 3:  # after the rank's file and the model
            raise MemoryError
        return real(*args)

    real = checkpoint.pack
    monkeypatch.setattr(checkpoint, "pack", pack)
    (recorder,) = train(config, 1, Mixed())
    (fault,) = recorder.of(FaultReport)
    assert (fault.round, fault.kind) == (1, "checkpoint_not_saved")
    for name in ("model.safetensors", "ema.safetensors"):
        assert (folder(whole, 6) / name).read_bytes() == (folder(config, 6) / name).read_bytes()


def test_the_console_shows_it() -> None:
    status = _Status(HEADER, lambda: 0.0)
    report = evaluation(3, 0.5, 0.25, 2)
    status.take(replace(report, metrics={**report.metrics, "ema_error": 0.125}))
    assert "error 0.5000 (best 0.2500, ema 0.1250)" in status.line()
