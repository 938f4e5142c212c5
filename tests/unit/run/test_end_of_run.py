"""The end of a run tells the truth: exit code, last lines, result, record and what is on disk agree."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hvd_train
from hvd_train.algorithm.evaluate import ValidationEvaluator
from hvd_train.cli import main
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import CheckpointConfig, Config, DataConfig, EvaluateConfig, ModelConfig, StopConfig
from hvd_train.data.catalog import open_catalog
from hvd_train.data.rows import Rows
from hvd_train.errors import CheckpointNotSaved, ConfigError, RunDirectoryError, UserError
from hvd_train.record.events import read_events
from hvd_train.run.checkpoint import Checkpoints
from hvd_train.run.layout import checkpoint_of
from hvd_train.tasks.built_in import Classification


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A training of 12 rounds of one rank on the digits, which improves at most of its evaluations."""
    return Config(
        name="r",
        runs=str(tmp_path),
        backend="solo",
        threads=1,
        data=DataConfig(path="digits", batch_size=32),
        model=ModelConfig(hidden=(64,)),
        stop=StopConfig(patience=0, max_rounds=12),
        evaluate=EvaluateConfig(every_epochs=0, every_rounds=2),
        checkpoint=CheckpointConfig(every_rounds=3, keep=9),
    )


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process can grow beyond so many bytes: as on a disk that has no room for a checkpoint,
    but for a line of the event log."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def disk_is_full(monkeypatch: pytest.MonkeyPatch, when: Callable[[int, str], bool]) -> None:
    """The disk is full for these rounds and reasons; what the program does then is real."""
    save = Checkpoints._save

    def saving(self: Checkpoints, packed: Any, reason: str, *args: Any, **kwargs: Any) -> bool:
        with full_disk() if when(packed.rounds, reason) else nullcontext():
            return save(self, packed, reason, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, "_save", saving)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run / "events.jsonl") if event["event"] == kind]


def round_of(run: Path, pointer: str) -> int:
    found = checkpoint_of(run, pointer)
    assert found is not None
    return int(found.name.removeprefix("round-"))


def test_a_model_of_the_end_that_is_not_on_disk_is_an_error(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk_is_full(monkeypatch, lambda rounds, reason: rounds > 5)
    run = Path(config.runs, "r")
    with pytest.raises(CheckpointNotSaved) as caught:
        hvd_train.train(config)
    latest, best = round_of(run, "latest"), round_of(run, "best")
    assert (latest, best) == (4, 4)
    assert caught.value.agreed
    message = str(caught.value)
    assert message.startswith(f"{run}: the model of the end (round 12) and the best model (round ")
    assert "File too large. On disk: best is of round 4, latest is of round 4. Make room" in message
    (stop,) = events(run, "stop")
    assert stop["missing"] in message
    assert stop["checkpoints"] == {p: str(run / "checkpoints" / "round-4") for p in ("best", "latest")}
    said = capsys.readouterr().out
    assert f"missing   {stop['missing']}" in said
    assert "load it" not in said, "what can be loaded is not the model of the line above"
    assert f"go on     --resume {run}" in said


def test_the_exit_code_of_an_end_that_is_not_on_disk(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk_is_full(monkeypatch, lambda rounds, reason: reason == "end")
    options = ["--runs", str(tmp_path), "--name", "r", "--max-rounds", "4", "--threads", "1"]
    assert main([*options, "--evaluate.every-rounds", "2"]) == 1
    assert "the model of the end (round 4)" in capsys.readouterr().err


def validation_error(model: nn.Module, config: Config) -> float:
    catalog = open_catalog(config.data)
    rows = Rows(catalog.validation, catalog.sample.fields)
    batch = rows.read(0, len(rows))
    wrong = model(torch.from_numpy(batch["inputs"])).argmax(1) != torch.from_numpy(batch["targets"])
    return float(wrong.double().mean())


def test_the_best_model_is_written_as_soon_as_there_is_room(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: set[int] = set()

    def at_first(rounds: int, reason: str) -> bool:
        new = reason == "best" and rounds not in tried
        tried.add(rounds)
        return new

    disk_is_full(monkeypatch, at_first)
    result = hvd_train.train(config)
    late = [e["round"] for e in events(result.run, "checkpoint") if e["reason"] == "best"]
    assert late, "every one of them failed at first"
    failed = events(result.run, "fault")
    assert {e["round"] for e in failed} >= set(late)
    assert all("The best model is kept in memory until then." in e["message"] for e in failed)
    (stop,) = events(result.run, "stop")
    assert (stop["missing"], round_of(result.run, "latest")) == ("", 12)
    assert round_of(result.run, "best") == stop["best_round"]
    assert validation_error(hvd_train.load_model(result.run), config) == pytest.approx(result.best, abs=1e-9)


def test_an_interrupted_run_that_lost_its_best_model_says_so_and_goes_on(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(Classification):
        steps = 0

        def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
            self.steps += model.training
            if self.steps == 45:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().loss(model, batch)

    config = replace(config, checkpoint=CheckpointConfig())
    with monkeypatch.context() as patched:
        disk_is_full(patched, lambda rounds, reason: reason == "best")
        result = hvd_train.train(config, Interrupted(config.model))
    assert (result.reason, round_of(result.run, "latest")) == ("interrupted", 5)
    (stop,) = events(result.run, "stop")
    assert (stop["missing"], set(stop["checkpoints"])) == ("", {"latest"})
    said = capsys.readouterr().out
    assert f"best      the model of round {stop['best_round']} could not be saved and is lost" in said
    assert "load it" not in said
    with pytest.raises(RunDirectoryError, match="no checkpoint `best`"):
        hvd_train.load_model(result.run)
    with pytest.raises(RunDirectoryError, match="checkpoint = 'newest': expected best, latest or round-N"):
        hvd_train.load_model(result.run, "newest")
    again = hvd_train.train(replace(config, resume="auto"))
    assert [e["kind"] for e in events(again.run, "fault")][-1] == "best_model_lost"
    assert validation_error(hvd_train.load_model(again.run), config) == pytest.approx(again.best, abs=1e-9)


def test_the_checkpoints_were_removed_while_it_ran(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, to make room: the run goes on, and its end says what is lost."""
    run = Path(config.runs, "r")
    save = Checkpoints.save

    def saving(self: Checkpoints, rounds: int, reason: str, best: bool) -> None:
        if reason == "every":
            shutil.rmtree(run / "checkpoints")
        save(self, rounds, reason, best)

    monkeypatch.setattr(Checkpoints, "save", saving)
    worse_and_worse = replace(
        config, optim=replace(config.optim, lr=1e-9), stop=replace(config.stop, max_rounds=7)
    )
    with pytest.raises(
        CheckpointNotSaved, match=r"the best model \(round 2\).*On disk: latest is of round 7"
    ):
        hvd_train.train(worse_and_worse)
    assert round_of(run, "latest") == 7


def shard(folder: Path, scale: float = 1.0) -> Path:
    rng = np.random.default_rng(0)
    with h5py.File(folder / "a.h5", "w") as file:
        file["inputs"] = (rng.random((200, 6)) * scale).astype("f4")
        file["targets"] = np.arange(200) % 3
    return folder / "a.h5"


def test_a_training_that_diverges_at_once_recommends_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", str(shard(tmp_path, 1e30)), "--data.validation", "0.2", "--runs", str(tmp_path)]
    assert main([*options, "--name", "r", "--max-rounds", "5"]) == 3
    said = capsys.readouterr().out
    assert "stopped   the training diverged (round 1)" in said
    assert "error     never measured" in said
    assert "load it" not in said
    assert "go on" not in said
    assert "advice    a smaller learning rate" in said
    (stop,) = events(tmp_path / "r", "stop")
    assert (stop["reason"], stop["best"], stop["final"]) == ("diverged", None, None)
    assert set(stop["checkpoints"]) == {"latest"}, "the last good parameters, here the first ones"
    with pytest.raises(RunDirectoryError, match="no checkpoint `best`: the run evaluated no model"):
        hvd_train.load_model(tmp_path / "r")


def test_a_training_that_diverges_later_keeps_its_best_model(config: Config) -> None:
    class Later(Classification):
        steps = 0

        def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
            self.steps += model.training
            mean, count = super().loss(model, batch)
            return mean * (float("nan") if self.steps > 50 else 1.0), count

    result = hvd_train.train(config, Later(config.model))
    assert result.reason == "diverged"
    assert events(result.run, "stop")[0]["round"] == 6
    assert validation_error(hvd_train.load_model(result.run), config) == pytest.approx(result.best, abs=1e-9)


class Plain(hvd_train.Task):
    """No metric but the loss; `steps` counts the training steps, as `seen` does whatever is asked for."""

    def __init__(self) -> None:
        self.steps = 0

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        return nn.Linear(6, 3)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        self.steps += model.training
        return F.cross_entropy(model(batch["inputs"]), batch["targets"]), len(batch["targets"])


class Raises(Plain):
    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        raise KeyError("no such thing")


class Counts(Plain):
    """The error of a class that the validation data do not have."""

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        return {"error": (0.0, 0)}


class Sparse(Plain):
    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        model = super().build_model(spec)
        model.register_buffer("w", torch.eye(4).to_sparse())
        return model


class Named(Plain):
    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        return {"error": (0.0, 1)}

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        model = super().build_model(spec)
        model.register_buffer("__metadata__", torch.zeros(4))
        return model


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        (Plain, ConfigError, "evaluate.metric = 'error': the task gives loss; expected one of these"),
        (Raises, UserError, r"cannot be evaluated on the first batch .*\n(.*\n)*.*no such thing"),
        (
            Sparse,
            UserError,
            r"the model's state `w` is of layout torch.sparse_coo, which a checkpoint cannot hold",
        ),
        (Named, UserError, "`__metadata__` in the state of the model cannot be saved"),
    ],
)
def test_errors_that_can_be_found_before_the_first_step_are(
    task: type[Plain], kind: type[Exception], message: str, config: Config, tmp_path: Path
) -> None:
    given = task()
    data = DataConfig(path=str(shard(tmp_path)), validation=0.2)
    with pytest.raises(kind, match=message):
        hvd_train.train(replace(config, data=data), given)
    assert given.steps == 0


def test_without_validation_data_the_metrics_are_known_too(config: Config, tmp_path: Path) -> None:
    data = DataConfig(path=str(shard(tmp_path)))
    given = Plain()
    wrong = replace(config, data=data, evaluate=EvaluateConfig(metric="accuracy"))
    with pytest.raises(ConfigError, match="'accuracy': the task gives error, loss"):
        hvd_train.train(wrong, given)
    assert given.steps == 0


def test_a_metric_that_counts_nothing_ends_the_run_with_its_checkpoint(
    config: Config, tmp_path: Path
) -> None:
    data = DataConfig(path=str(shard(tmp_path)), validation=0.2, batch_size=32)
    with pytest.raises(ConfigError, match="the task counted nothing for it in the validation data"):
        hvd_train.train(replace(config, data=data), Counts())
    assert round_of(Path(config.runs, "r"), "latest") == 2


class Noisy(Plain):
    """Draws in evaluation, and counts its forward passes in a buffer: both must not be seen afterwards."""

    def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
        model = super().build_model(spec)
        model.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        return model

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
        model.passes.add_(1)  # type: ignore[operator, union-attr]
        return {"error": (float(torch.rand(())) + np.random.random() + random.random(), 1)}


def test_trying_out_the_evaluation_changes_nothing(tmp_path: Path) -> None:
    catalog = open_catalog(DataConfig(path=str(shard(tmp_path)), validation=0.2))
    task = Noisy()
    model = task.build_model(catalog.sample)
    model.register_buffer("expanded", torch.ones(1, 3).expand(4, 3))
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    rows = Rows(catalog.validation, catalog.sample.fields)
    evaluator = ValidationEvaluator(SoloCommunicator(), task, model, rows, batch_size=8)

    def drawn() -> tuple[float, ...]:
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        evaluator.try_out()
        return float(torch.rand(())), np.random.random(), random.random()

    names, first = evaluator.try_out(), drawn()
    assert names == ["error", "loss"]
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    assert first == (float(torch.rand(())), np.random.random(), random.random())
    assert (int(model.passes), model.training) == (0, True)  # type: ignore[arg-type]
    assert model.expanded.tolist() == [[1.0] * 3] * 4  # type: ignore[operator, union-attr]


def test_a_best_model_that_is_lost_is_no_longer_the_best_after_a_resume(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was removed, or the process ended while there was no room for it."""
    run = hvd_train.train(config).run
    best = events(run, "stop")[0]["best_round"]
    still = replace(config, resume="auto", optim=replace(config.optim, lr=1e-9))
    hvd_train.train(replace(still, stop=StopConfig(patience=0, max_rounds=15)))
    assert (round_of(run, "best"), round_of(run, "latest")) == (best, 15), "it did not become better"
    shutil.rmtree(run / "checkpoints" / f"round-{best}")
    capsys.readouterr()
    result = hvd_train.train(replace(still, stop=StopConfig(patience=0, max_rounds=18)))
    (fault,) = [e for e in events(run, "fault") if e["kind"] == "best_model_lost"]
    assert f"of round {best}, is not on disk, or not whole. The best from now on is " in fault["message"]
    assert fault["message"] in capsys.readouterr().out
    stop = events(run, "stop")[-1]
    assert best != stop["best_round"] == round_of(run, "best")
    assert validation_error(hvd_train.load_model(run), config) == pytest.approx(result.best, abs=1e-9)


def test_a_run_under_a_new_name_holds_what_it_goes_on_from(config: Config) -> None:
    first = hvd_train.train(config)
    best = events(first.run, "stop")[0]["best_round"]
    again = replace(config, name="second", resume=str(first.run), stop=StopConfig(patience=0, max_rounds=13))
    second = hvd_train.train(replace(again, optim=replace(config.optim, lr=1e-9)))
    assert second.run.name == "second"
    assert (second.run / "checkpoints" / "round-12" / "manifest.json").is_file()
    assert second.best == min(first.best or 1.0, second.final or 1.0)
    assert validation_error(hvd_train.load_model(second.run), config) == pytest.approx(second.best, abs=1e-9)
    assert round_of(first.run, "best") == best, "the old one is as it was"


def test_auto_goes_on_from_the_newest_whole_checkpoint_and_says_which_it_left(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    run = hvd_train.train(config).run
    newest = run / "checkpoints" / "round-12" / "rank-00000.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    longer = replace(config, stop=StopConfig(patience=0, max_rounds=14))
    with pytest.raises(UserError, match=r"damaged: .* Go on from .*round-10, which is whole"):
        hvd_train.train(replace(longer, resume=str(run)))
    capsys.readouterr()
    hvd_train.train(replace(longer, resume="auto"))
    (fault,) = [e for e in events(run, "fault") if e["kind"] == "checkpoint_left_out"]
    assert fault["message"].startswith(f"{newest}: damaged: ")
    assert fault["message"].endswith("The run goes on from round-10, which is whole.")
    assert f"warning   round 10: {fault['message']}" in capsys.readouterr().out
    assert [e["round"] for e in events(run, "header")] == [0, 10]
    assert round_of(run, "latest") == 14


def test_extra_state_that_json_can_hold_is_saved(config: Config, tmp_path: Path) -> None:
    class Net(nn.Linear):
        extra: Any = None

        def get_extra_state(self) -> Any:
            return self.extra

        def set_extra_state(self, state: Any) -> None:
            self.extra = state

    class Extra(Plain):
        def build_model(self, spec: hvd_train.SampleSpec) -> nn.Module:
            return Net(6, 3)

        def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
            model.extra = {"a": [2, 0.5]}  # type: ignore[assignment]
            return {"error": (0.0, 1)}

    data = DataConfig(path=str(shard(tmp_path)), validation=0.2)
    run = hvd_train.train(replace(config, data=data), Extra()).run
    assert hvd_train.load_model(run, task=Extra()).extra == {"a": [2, 0.5]}
    Net.extra = {"a": {1, 2}}
    with pytest.raises(UserError, match=r"the model's state `_extra_state` is dict .* cannot be saved"):
        hvd_train.train(replace(config, data=data, name="s"), Extra())
