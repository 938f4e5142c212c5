"""Whole trainings of several ranks in one process: what must agree when a run goes on, and data that are
refused or warned of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from torch import Tensor, nn

from hvd_train.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    StopConfig,
    SyncConfig,
)
from hvd_train.data.format import SampleSpec
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from hvd_train.errors import HvdTrainError
from hvd_train.preparation import prepare
from hvd_train.record.reports import EvaluationReport, FaultReport, LayerReport, RoundReport, StopReport
from hvd_train.tasks.base import Batch, Task
from hvd_train.tasks.built_in import Classification
from tests.threads import on_ranks
from tests.unit.data.shards import write_foreign
from tests.unit.trainings import resumed, small, train


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small(tmp_path)


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_a_run_goes_on_with_another_number_of_ranks(ranks: int, config: Config) -> None:
    """Stopped within an epoch. All ranks then pass from one epoch to the next in the same round: if one did
    not, it would not take part in the evaluation that the others begin."""
    before = sum(r.samples for r in train(config, 2)[0].of(RoundReport))
    recorders = train(replace(resumed(config, max_epochs=3), sync=SyncConfig(period=1)), ranks)
    rounds = [[(r.round, r.epoch) for r in rec.of(RoundReport)] for rec in recorders]
    assert all(other == rounds[0] for other in rounds)
    assert rounds[0][0][0] == 4
    assert rounds[0][-1][1] >= 3
    if ranks == 2:
        assert rounds[0][0][1] == pytest.approx(16 / 30), "it goes on in the middle of the epoch"
    else:
        assert before / 240 < rounds[0][0][1] < 1, "it goes on with what is left"
    assert sum(r.samples for r in recorders[0].of(RoundReport)) == 3 * 240 - before
    for rec in recorders:
        assert len(rec.of(EvaluationReport)) == 3
        (stop,) = rec.of(StopReport)
        assert (stop.reason, stop.best) == ("max_epochs", recorders[0].of(StopReport)[0].best)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_row_is_used_once_an_epoch(ranks: int, config: Config) -> None:
    recorder = train(replace(config, stop=StopConfig(patience=0, max_epochs=2)), ranks)[0]
    used = [r.samples for r in recorder.of(RoundReport)]
    assert sum(used) == 2 * 240
    assert recorder.of(RoundReport)[-1].epoch == 2


def test_another_data_set_is_refused_on_every_rank(config: Config, tmp_path: Path) -> None:
    train(config, 2)
    again = Config(
        **{**vars(resumed(config, max_rounds=9)), "data": DataConfig(path=str(tmp_path / "*.h5"), scale=0.5)}
    )
    with pytest.raises(
        HvdTrainError, match=r"was trained on samples .* Give the data that the run began with"
    ):
        train(again, 2)


class Wider(Classification):
    """Builds another model than its configuration says."""

    def build_model(self, spec: SampleSpec) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3, 9), nn.Linear(9, 3))


def test_another_model_is_refused_on_every_rank(config: Config) -> None:
    train(config, 2)
    again = resumed(config, max_rounds=9)
    with pytest.raises(HvdTrainError, match=r"Resume with the model that the run began with"):
        train(again, 2, Wider(ModelConfig()))


@pytest.mark.parametrize("limit", [{"max_rounds": 3}, {"max_rounds": 2}])
def test_a_run_that_is_over_is_refused(limit: dict[str, int], config: Config) -> None:
    train(config, 2)
    with pytest.raises(
        HvdTrainError, match=r"max_rounds = .: the run has done 3; expected a higher limit to go on"
    ):
        train(resumed(config, **limit), 2)


def spoil(path: Path, row: int, value: float) -> None:
    with h5py.File(path, "r+") as file:
        file["inputs"][row, 1] = value


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_fault_names_the_file_and_the_row_that_is_not_finite(
    ranks: int, config: Config, tmp_path: Path
) -> None:
    spoil(tmp_path / "b.h5", 150, float("nan"))
    once = replace(config, sync=SyncConfig(period=60), stop=StopConfig(patience=0, max_rounds=1))
    for recorder in train(once, ranks):
        (fault,) = recorder.of(FaultReport)
        message = fault.message  # type: ignore[union-attr]
        assert f"were not finite: {tmp_path}/b.h5: `inputs` holds nan in row 150. " in message
        assert fault.ranks == ((0,) if ranks == 1 else (2,)), "of three ranks the last has it"  # type: ignore[union-attr]
        assert len(recorder.of(LayerReport)) == (ranks > 1), "without an average no layer has moved"


def test_a_rank_that_stays_not_finite_reads_its_rows_again_once(config: Config, tmp_path: Path) -> None:
    for row in (3, 150):
        spoil(tmp_path / "b.h5", row, float("nan"))
    alone = replace(config, sync=SyncConfig(mode="none", period=60))
    for recorder in train(alone, 3):
        first, *others = (fault.message for fault in recorder.of(FaultReport))  # type: ignore[union-attr]
        assert "b.h5: `inputs` holds nan in row 3; " in first, "of rank 1"
        assert "b.h5: `inputs` holds nan in row 150. " in first, "of rank 2"
        assert len(others) == 2
        assert all("were not finite, as in the round before. " in message for message in others)


def test_a_training_that_diverges_on_finite_rows_says_so(config: Config) -> None:
    wild = replace(config, optim=OptimConfig(lr=1e30))
    for recorder in train(wild, 2):
        first = recorder.of(FaultReport)[0]
        assert "were not finite, though every row was. Lower optim.lr" in first.message  # type: ignore[union-attr]


@pytest.mark.parametrize("ranks", [1, 2])
def test_validation_data_that_are_not_finite_are_named_once(
    ranks: int, config: Config, tmp_path: Path
) -> None:
    write_foreign(tmp_path / "val.hdf5", 30, 240)
    spoil(tmp_path / "val.hdf5", 17, float("inf"))
    watched = replace(
        config,
        model=ModelConfig(hidden=()),  # a hidden unit may be 0 there, whatever its input
        data=replace(config.data, validation=str(tmp_path / "val.hdf5")),
        evaluate=EvaluateConfig(every_rounds=1, batch_size=4),
    )
    for recorder in train(watched, ranks):
        assert len(recorder.of(EvaluationReport)) == 3, "the error of the other rows is still followed"
        (fault,) = recorder.of(FaultReport)
        assert fault.message == (  # type: ignore[union-attr]
            f"not finite on the validation data: loss. {tmp_path}/val.hdf5: `inputs` holds inf in row 17."
        )


class Counts(Task):
    """Takes integer targets as quantities; asks for the number of classes only if it is told to."""

    def __init__(self, ask: bool) -> None:
        self.ask = ask

    def build_model(self, spec: SampleSpec) -> nn.Module:
        return nn.Linear(3, spec.num_classes or 1 if self.ask else 1)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        difference = model(batch["inputs"] / 240)[:, 0] - batch["targets"]
        return difference.square().mean(), len(difference)


def relabel(path: Path, row: int, value: int) -> None:
    with h5py.File(path, "r+") as file:
        file["targets"][row] = value


@pytest.mark.parametrize("value", [-7, 1 << 50])
def test_targets_that_are_not_classes_are_refused_only_where_classes_are_needed(
    value: int, config: Config, tmp_path: Path
) -> None:
    """Whichever rank has the row: with three, the second reads it, and all say the same."""
    relabel(tmp_path / "b.h5", 30, value)
    refusal = rf"^{tmp_path}/b\.h5: `targets` holds {value} in row 30[;:] .*class numbers"
    for task in (None, Counts(ask=True)):
        with pytest.raises(HvdTrainError, match=refusal):
            on_ranks(3, lambda comm, task=task: prepare(config, task, comm).config)  # type: ignore[misc]
    on_ranks(3, lambda comm: prepare(config, Counts(ask=False), comm).config)
    regression = replace(config, task="regression")
    on_ranks(3, lambda comm: prepare(regression, None, comm).config)


def test_a_built_in_task_names_a_file_with_what_does_not_fit(config: Config, tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5"):
        with h5py.File(tmp_path / name, "r+") as file:
            one_hot = np.eye(7, dtype="f4")[file["targets"][()]]
            del file["targets"]
            file["targets"] = one_hot
    with pytest.raises(HvdTrainError, match=r"a\.h5: task classification: `targets` has the shape \[7\]"):
        on_ranks(2, lambda comm: prepare(config, None, comm).config)


def replace_inputs(path: Path, values: Any) -> None:
    with h5py.File(path, "r+") as file:
        kept = file["inputs"][()]
        del file["inputs"]
        file["inputs"] = values(kept)


def test_integers_without_a_scale_are_warned_of_once_a_job(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.h5", "b.h5"):
        replace_inputs(tmp_path / name, lambda kept: kept.astype("u1"))
    on_ranks(2, lambda comm: prepare(config, None, comm).config)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"hvd_train: {tmp_path}/b.h5: `inputs` is uint8 with values up to 239, and no scale is"
    )
    for task, data in ((Counts(ask=False), config.data), (None, replace(config.data, scale=0.01))):
        quiet = replace(config, data=data)
        on_ranks(2, lambda comm, task=task, quiet=quiet: prepare(quiet, task, comm).config)  # type: ignore[misc]
    for values in (lambda kept: kept % 2, lambda kept: kept > 0):
        for name in ("a.h5", "b.h5"):
            replace_inputs(tmp_path / name, values)
        on_ranks(2, lambda comm: prepare(config, None, comm).config)
    arrays = Arrays(np.array([[3, 200], [0, 1]] * 10, "u1"), np.array([0, 1] * 10), 1 / 255)
    write_part(tmp_path / "own", arrays)
    recorded = replace(config, data=replace(config.data, path=str(tmp_path / "own")))
    on_ranks(2, lambda comm: prepare(recorded, None, comm).config)
    assert capsys.readouterr().err == "", "zeros and ones, booleans, and a scale that the shard records"


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_what_looks_wrong_is_named_of_the_rows_of_all_ranks(
    ranks: int, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(tmp_path / "b.h5", 150, float("nan"))
    with h5py.File(tmp_path / "a.h5") as a, h5py.File(tmp_path / "b.h5") as b:
        inputs = np.concatenate([file["inputs"][()] for file in (a, b)])
    for name in ("a.h5", "b.h5"):
        with h5py.File(tmp_path / name, "r+") as file:
            file["targets"][...] = file["targets"][()] % 7 + 1
    recorders = train(config, ranks)
    lines = [line for line in capsys.readouterr().err.splitlines() if "expected" in line]
    assert [line.partition(";")[0] for line in lines] == [
        f"hvd_train: {tmp_path}/b.h5: `inputs` holds 1 NaN among 720 values, a share of 0.0014",
        f"hvd_train: {tmp_path}/a.h5: the classes of `targets` are 1 to 7",
    ]
    header = recorders[0].start
    assert [f"hvd_train: {line}" for line in header.remarks] == lines
    found = header.values["inputs"]
    assert (found["rows"], found["nan"], found["highest"]) == (240, 1, np.nanmax(inputs))
    assert found["deviation"] == pytest.approx(np.nanstd(inputs, dtype="f8"))
    assert header.values["targets"]["mean"] == np.mean(np.arange(240) % 7 + 1)
    assert all(not recorder.start.values for recorder in recorders[1:])


def test_nothing_looks_wrong_in_the_embedded_digits(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though each of two ranks has classes of its own: they are split so on purpose."""
    digits = replace(config, data=DataConfig())
    prepared = on_ranks(2, lambda comm: prepare(digits, None, comm))
    assert (capsys.readouterr().err, prepared[0].remarks) == ("", [])
    assert prepared[0].surveys["inputs"].values.highest == 16


class Scaling(Counts):
    """Scales its inputs itself."""

    def transform(self, batch: Batch) -> Batch:
        return {**batch, "inputs": batch["inputs"] / 1e6}


def test_a_task_that_transforms_its_inputs_may_have_any(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.h5", "b.h5"):
        replace_inputs(tmp_path / name, lambda kept: kept * 1e6)
    for task, said in ((Scaling(ask=False), 0), (Counts(ask=False), 1), (None, 1)):
        on_ranks(2, lambda comm, task=task: prepare(config, task, comm).config)  # type: ignore[misc]
        assert capsys.readouterr().err.count("which no --data.scale gives") == said


def test_targets_are_what_the_task_takes_them_as(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.h5", "b.h5"):
        with h5py.File(tmp_path / name, "r+") as file:
            file["targets"][...] = file["targets"][()] % 2
    for task, said in (("regression", 1), ("classification", 0)):
        chosen = replace(config, task=task)
        on_ranks(2, lambda comm, chosen=chosen: prepare(chosen, None, comm).config)  # type: ignore[misc]
        assert (
            capsys.readouterr().err.count("a.h5: `targets` holds only 0 and 1. If these are classes") == said
        )
    for name in ("a.h5", "b.h5"):
        with h5py.File(tmp_path / name, "r+") as file:
            file["targets"][...] = (np.arange(len(file["targets"])) % 2) * (1 << 40) - 5
    on_ranks(2, lambda comm: prepare(config, Counts(ask=False), comm).config)
    assert capsys.readouterr().err == "", "quantities, of a task that does not ask for classes"


def test_numbers_that_are_none_are_named_in_every_field_but_masked_targets(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.h5", "b.h5"):
        with h5py.File(tmp_path / name, "r+") as file:
            rows = len(file["targets"])
            targets = np.arange(rows, dtype="f4")
            targets[3] = np.nan
            file["y"], file["m"], file["more"] = targets, np.isfinite(targets), np.full(rows, np.inf, "f4")
    data = replace(config.data, targets="y", fields={"more": "more"})
    for mask in ("", "m"):
        chosen = replace(config, task="regression", data=replace(data, mask=mask))
        on_ranks(2, lambda comm, chosen=chosen: prepare(chosen, None, comm).config)  # type: ignore[misc]
        said = capsys.readouterr().err
        assert said.count("`y` holds 2 NaN among 240 values") == (mask == "")
        assert said.count("`more` holds 240 inf among 240 values") == 1
