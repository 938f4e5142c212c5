"""A run goes on with another configuration: what each key that changed does, or that it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

import hvd_train
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    LearningRateConfig,
    ModelConfig,
    OptimConfig,
    SyncConfig,
    flatten,
)
from hvd_train.config_file import from_mapping, to_mapping
from hvd_train.errors import HvdTrainError
from hvd_train.record.reports import EvaluationReport, RoundReport, StopReport
from hvd_train.run.layout import saved_config
from hvd_train.run.resuming import RULES, Rule
from hvd_train.run.saved_checkpoint import SavedCheckpoint
from tests.launching import ROOT
from tests.markdown import tables
from tests.unit.data.shards import write_foreign
from tests.unit.trainings import Remembered, resumed, small, train

DOCUMENT = ROOT / "docs" / "resuming.md"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small(tmp_path)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """The lines on standard error since it was last asked."""

    def lines() -> list[str]:
        return [line.removeprefix("hvd_train: ") for line in capsys.readouterr().err.splitlines()]

    return lines


def changed(config: Config, key: str, value: Any) -> Config:
    """With one key changed, by its path."""
    table = to_mapping(config)
    section, _, name = key.rpartition(".")
    (table[section] if section else table)[name] = value
    return from_mapping(table, "test")


def samples(recorder: Remembered) -> int:
    return sum(r.samples for r in recorder.of(RoundReport))


def test_a_run_without_validation_data_is_the_uninterrupted_one(config: Config) -> None:
    """What is watched then is the training loss between two evaluations: the interruption falls between."""
    config = replace(config, evaluate=EvaluateConfig(every_epochs=0, every_rounds=4))
    curves = []
    for name, interrupted_in in (("whole", 0), ("parts", 6)):
        one = replace(config, name=name, stop=replace(config.stop, max_rounds=9))
        recorders = train(one, 1, interrupted_in=interrupted_in)
        if interrupted_in:
            (stop,) = recorders[0].of(StopReport)
            assert (stop.reason, stop.round) == ("interrupted", 6)
            recorders += train(resumed(one, max_rounds=9), 1)
        curves.append([(e.round, e.error) for r in recorders for e in r.of(EvaluationReport)])
    assert curves[0] == curves[1]
    assert [round_ for round_, _ in curves[0]] == [4, 8, 9]


def test_every_key_has_a_rule() -> None:
    assert list(RULES) == sorted(RULES, key=list(flatten(Config())).index)
    assert RULES.keys() == flatten(Config()).keys()


def test_the_documented_rules_are_those_of_the_code() -> None:
    (table,) = [t for t in tables(DOCUMENT) if t[0][0] == "key"]
    assert [(cells[0].strip("`"), cells[1]) for cells in table[1:]] == [
        (k, r.value) for k, r in RULES.items()
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.standardize", "component"),
        ("model.hidden", [5]),
        ("model.channels", [7]),
        ("model.embedding", 31),
        ("model.context", 9),
        ("model.dropout", 0.5),
        ("sync.mode", "none"),
    ],
)
def test_a_change_that_is_not_allowed_is_refused_with_its_key(key: str, value: Any, config: Config) -> None:
    assert {k for k, rule in RULES.items() if rule is Rule.REFUSED} == {
        "data.standardize",
        "model.name",
        "model.hidden",
        "model.channels",
        "model.embedding",
        "model.context",
    }
    train(config, 1)
    kept = saved_config(Path(config.runs) / "r")
    with pytest.raises(HvdTrainError, match=f"{key} = ") as caught:
        train(changed(resumed(config, max_rounds=9), key, value), 1)
    if key != "sync.mode":
        before = json.loads(json.dumps(flatten(config)))[key]
        assert f"{key} = {value!r}: the run was trained with {before!r}" in str(caught.value)
    assert saved_config(Path(config.runs) / "r") == kept, "what was refused is not the next start's"
    train(resumed(config, max_rounds=9), 1)


def test_a_run_that_was_never_averaged_cannot_be_resumed_from(config: Config) -> None:
    apart = replace(config, sync=SyncConfig(mode="none", period=5))
    train(apart, 1)
    with pytest.raises(HvdTrainError, match=r"sync\.mode = 'average': the run was trained with 'none'"):
        train(replace(resumed(config, max_rounds=9)), 1)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((4, 1), (64, 1)),
        ((4, 1), (3, 1)),
        ((4, 1), (7, 5)),
        ((2, 6), (5, 1)),
        ((64, 1), (1, 1)),
        ((4, 2), (4, 1)),
    ],
)
def test_an_epoch_goes_on_with_the_rows_that_it_has_left(
    before: tuple[int, int], after: tuple[int, int], ranks: int, config: Config
) -> None:
    """No row twice and none missed, however the batches change, and change again, within an epoch."""

    def with_batches(config: Config, size: int, accumulate: int) -> Config:
        data, optim = replace(config.data, batch_size=size), replace(config.optim, accumulate=accumulate)
        return replace(config, data=data, optim=optim, sync=SyncConfig(period=1))

    first = train(with_batches(config, *before), ranks)[0]
    second = train(with_batches(resumed(config, max_rounds=4), *after), ranks)[0]
    third = train(with_batches(resumed(config, max_epochs=2), *before), ranks)
    assert sum(map(samples, (first, second, third[0]))) == 2 * 240
    for recorder in third:
        assert [r.epoch for r in recorder.of(RoundReport)] == [r.epoch for r in third[0].of(RoundReport)]
        assert recorder.of(RoundReport)[-1].epoch == 2
    assert second.of(RoundReport)[0].epoch > first.of(RoundReport)[-1].epoch


def test_an_epoch_that_is_nearly_done_ends(config: Config) -> None:
    """57 steps of four rows are done of 60, and an epoch now has four steps of 64."""
    one = replace(config, data=replace(config.data, batch_size=4), sync=SyncConfig(period=19))
    assert samples(train(one, 1)[0]) == 228
    large = replace(resumed(one, max_epochs=1), data=replace(one.data, batch_size=64))
    (recorder,) = train(replace(large, sync=SyncConfig(period=1)), 1)
    assert [(r.samples, r.epoch) for r in recorder.of(RoundReport)] == [(12, 1.0)]


@pytest.mark.parametrize(
    ("key", "value"), [("seed", 8), ("data.reading", "stream"), ("data.path", "other"), ("ranks", 3)]
)
def test_an_epoch_goes_on_in_another_order_and_says_so(
    key: str, value: Any, config: Config, tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    """With the rows that it has left; with all of other data."""
    before = samples(train(config, 2)[0])
    again = replace(resumed(config, max_epochs=1), sync=SyncConfig(period=1))
    if key == "data.path":
        (tmp_path / "other").mkdir()
        value = str(write_foreign(tmp_path / "other" / "c.h5", 240))
    if key != "ranks":
        again = changed(again, key, value)
    said()
    recorders = train(again, value if key == "ranks" else 2)
    left = 240 if key == "data.path" else 240 - before
    assert samples(recorders[0]) == left
    (line,) = said()
    assert line.startswith("the rows of the ranks, or their order, are not those of the checkpoint")
    goes_on = f"epoch 1 goes on with the {left} rows that it has left."
    assert line.endswith("epoch 1 begins anew." if key == "data.path" else goes_on)


def test_data_that_were_moved_are_the_same(
    config: Config, tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    before = samples(train(config, 2)[0])
    (tmp_path / "moved").mkdir()
    for name in ("a.h5", "b.h5"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    again = changed(resumed(config, max_epochs=1), "data.path", str(tmp_path / "moved"))
    assert samples(train(again, 2)[0]) == 240 - before
    assert said() == []


def first_value(recorder: Remembered) -> EvaluationReport:
    return recorder.of(EvaluationReport)[0]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("evaluate.metric", "loss", "evaluate.metric was 'error' and is 'loss'"),
        ("evaluate.mode", "max", "evaluate.mode was 'min' and is 'max'"),
        ("data.validation", 0.5, "the validation rows differ"),
        ("class_weights", [1.0] * 6 + [2.0], ""),
        ("task", "tests/unit/trainings.py:Same", "task was "),
    ],
)
def test_a_best_that_cannot_be_compared_is_not(
    key: str, value: Any, reason: str, config: Config, tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    config = changed(config, "data.validation", 0.25)
    best = train(config, 2)[0].of(StopReport)[0]
    assert best.best is not None
    said()
    recorder, _ = train(changed(resumed(config, max_rounds=5), key, value), 2)
    lines = [line for line in said() if "best, curve and patience begin anew" in line]
    watch = recorder.training.watch  # type: ignore[union-attr]
    rounds = [round_ for round_, _ in watch.curve]
    if not reason:
        assert lines == [], "the error does not depend on it"
        assert rounds == [3, 5]
        return
    (line,) = lines
    assert reason in line
    assert rounds == [5], "the curve has no value of the other kind"
    assert (watch.best, watch.best_round) == (first_value(recorder).error, 5)
    assert (tmp_path / "runs" / "r" / "checkpoints" / "best").read_text() == "round-5\n"


def test_class_weights_change_the_loss_of_the_watch(config: Config, said: Callable[[], list[str]]) -> None:
    train(config, 1)  # without validation data: the training loss
    said()
    train(changed(resumed(config, max_rounds=5), "class_weights", [1.0] * 6 + [2.0]), 1)
    assert "class_weights was [] and is [1.0, " in said()[0]


def test_a_task_whose_file_was_moved_is_the_same(config: Config, tmp_path: Path) -> None:
    code = "from hvd_train.config import ModelConfig\nfrom hvd_train.tasks.built_in import Classification\n"
    code += (
        "class Mine(Classification):\n    def __init__(self): super().__init__(ModelConfig(hidden=(4,)))\n"
    )
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(code)
    train(replace(config, task=f"{tmp_path}/here/mine.py:Mine"), 1)
    (recorder,) = train(replace(resumed(config, max_rounds=5), task=f"{tmp_path}/there/mine.py:Mine"), 1)
    assert [r for r, _ in recorder.training.watch.curve] == [3, 5]  # type: ignore[union-attr]


def moments(recorder: Remembered) -> dict[str, torch.Tensor]:
    return dict(recorder.training.checkpoints.parts["moments"].state_dict())  # type: ignore[union-attr]


def saved_moments(tmp_path: Path, rounds: int) -> dict[str, Any]:
    folder = tmp_path / "runs" / "r" / "checkpoints" / f"round-{rounds}"
    return SavedCheckpoint.open(folder).parts(0)["moments"]


def test_another_optimizer_begins_with_its_own_state(
    config: Config, tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    train(config, 2)
    said()
    adam = OptimConfig(name="AdamW", lr=0.001)
    train(replace(resumed(config, max_rounds=4), optim=adam), 2)
    assert "optim.name was 'SGD' and is 'AdamW': the optimizer's state begins anew." in said()
    assert {key.rpartition("/")[2] for key in saved_moments(tmp_path, 4)} == {"exp_avg", "exp_avg_sq"}
    more = replace(adam, args={"amsgrad": True})
    train(replace(resumed(config, max_rounds=5), optim=more), 2)
    kinds = {key.rpartition("/")[2] for key in saved_moments(tmp_path, 5)}
    assert kinds == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    train(replace(resumed(config, max_rounds=6), optim=adam), 2)
    assert {key.rpartition("/")[2] for key in saved_moments(tmp_path, 6)} == {"exp_avg", "exp_avg_sq"}


def test_state_that_the_optimizer_keeps_no_longer_is_dropped(config: Config, tmp_path: Path) -> None:
    train(config, 2)
    assert saved_moments(tmp_path, 3)
    plain = replace(config.optim, args={"momentum": 0.0})
    train(replace(resumed(config, max_rounds=4), optim=plain), 2)
    parts = SavedCheckpoint.open(tmp_path / "runs" / "r" / "checkpoints" / "round-4").parts(0)
    assert parts["moments"] == {}
    assert not [key for key in parts["optimizer"] if "momentum" in key]


@pytest.mark.parametrize("policies", [("average", "keep"), ("keep", "average"), ("average", "reset")])
def test_moments_continue_if_averaging_them_is_switched(
    policies: tuple[str, str], config: Config, tmp_path: Path
) -> None:
    before, after = policies
    train(changed(config, "sync.optimizer_state", before), 2)
    recorders = train(changed(resumed(config, max_rounds=6), "sync.optimizer_state", after), 2)
    assert recorders[0].of(StopReport)[0].round == 6
    parts = SavedCheckpoint.open(tmp_path / "runs" / "r" / "checkpoints" / "round-6").parts(0)
    averaged = [key for key in parts["moments"] if key.endswith("momentum_buffer")]
    assert bool(averaged) is (after == "average")


def test_the_rate_is_that_of_the_new_schedule_at_this_round(config: Config) -> None:
    train(config, 1)
    cosine = LearningRateConfig(schedule="cosine", total=8)
    (recorder,) = train(replace(resumed(config, max_rounds=9), learning_rate=cosine), 1)
    whole = replace(config, name="whole", learning_rate=cosine, stop=replace(config.stop, max_rounds=9))
    (expected,) = train(whole, 1)
    assert [r.lr for r in recorder.of(RoundReport)] == [r.lr for r in expected.of(RoundReport)][3:]
    by_samples = replace(cosine, unit="samples", total=480)
    (other,) = train(replace(resumed(config, max_rounds=12), learning_rate=by_samples), 1)
    assert other.of(RoundReport)[0].lr == pytest.approx(
        0.05 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 180 / 480)))
    )


def test_settings_for_later_rounds_take_effect(config: Config) -> None:
    config = changed(config, "model.dropout", 0.3)
    train(config, 2)
    again = resumed(config, max_rounds=6, patience=2, min_delta=0.5, target_error=0.001)
    again = replace(
        again,
        optim=replace(config.optim, lr=0.01, clip_norm=1.0, precision="bf16"),
        model=replace(config.model, dropout=0.6),
        sync=SyncConfig(period=3, check_every=1, batch_norm="keep"),
        evaluate=EvaluateConfig(every_epochs=0, every_rounds=2, batch_size=7),
        checkpoint=replace(config.checkpoint, every_rounds=1, keep=1),
    )
    recorder, _ = train(again, 2)
    assert [(r.round, r.period, r.lr) for r in recorder.of(RoundReport)] == [
        (4, 3, 0.01),
        (5, 3, 0.01),
        (6, 3, 0.01),
    ]
    assert [e.round for e in recorder.of(EvaluationReport)] == [4, 6]


def as_before(folder: Path, size: int) -> None:
    """Makes a checkpoint one of before it held its settings, and counted steps of so many rows."""

    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        if name.startswith("rank-"):
            content = (folder / name).read_bytes()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            state = json.loads(header["__metadata__"]["state"])
            state.pop("settings", None)
            worker = state["worker"]
            worker["steps"] = worker.pop("rows") // size
            save_file(load_file(folder / name), folder / name, metadata={"state": json.dumps(state)})
            content = (folder / name).read_bytes()
            manifest["files"][name] = {
                "num_bytes": len(content),
                "xxh3_64": xxhash.xxh3_64_hexdigest(content),
            }
    del manifest["checksum"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "schema": 1}))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("size", [4, 9])
def test_a_checkpoint_without_settings_is_compared_with_the_runs_configuration(
    size: int, ranks: int, config: Config, tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    before = samples(train(config, ranks)[0])
    as_before(tmp_path / "runs" / "r" / "checkpoints" / "round-3", 4)
    with pytest.raises(HvdTrainError, match=r"model.hidden = \[5\]: the run was trained with \[4\]"):
        train(replace(resumed(config, max_rounds=9), model=ModelConfig(hidden=(5,))), ranks)
    said()
    again = changed(resumed(config, max_epochs=1), "data.batch_size", size)
    again = replace(again, sync=SyncConfig(period=1))
    assert samples(train(again, ranks)[0]) == 240 - before
    assert ("rows that it has left" in "".join(said())) is (size != 4)


def test_the_configuration_of_the_checkpoint_takes_precedence_over_the_file(
    config: Config, tmp_path: Path
) -> None:
    """Edited since, or of a start that was killed before it saved anything."""
    train(config, 1)
    file = tmp_path / "runs" / "r" / "config.toml"
    file.write_text(file.read_text().replace("batch_size = 4\n", "batch_size = 64\n"))
    edited = saved_config(tmp_path / "runs" / "r")
    assert edited.data == DataConfig(path=str(tmp_path / "*.h5"), batch_size=64)
    again = replace(
        edited,
        resume=str(tmp_path / "runs" / "r"),
        stop=replace(config.stop, max_rounds=None, max_epochs=1),
        sync=SyncConfig(period=1),
    )
    assert samples(train(again, 1)[0]) == 240 - 60
    file.write_text("not TOML")
    train(resumed(config, max_rounds=30), 1)


def test_a_new_name_whose_start_was_refused_is_free(config: Config, tmp_path: Path) -> None:
    train(config, 1)
    again = replace(resumed(config, max_rounds=5), name="other", resume=str(tmp_path / "runs" / "r"))
    with pytest.raises(HvdTrainError, match=r"model\.hidden = "):
        hvd_train.train(replace(again, model=ModelConfig(hidden=(5,))), comm=SoloCommunicator())
    assert not (tmp_path / "runs" / "other").exists()
    result = hvd_train.train(again, comm=SoloCommunicator())
    assert (result.run, result.reason) == (tmp_path / "runs" / "other", "max_rounds")
    with pytest.raises(HvdTrainError, match="the run has done 5"):
        hvd_train.train(replace(again, name="other", resume="auto"), comm=SoloCommunicator())
    assert (tmp_path / "runs" / "other" / "checkpoints" / "round-5").is_dir(), "a run that was there stays"
