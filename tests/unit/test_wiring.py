"""Whole trainings of several ranks in one process: what must agree between ranks when a run goes on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from hvd_train.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    StopConfig,
    SyncConfig,
)
from hvd_train.errors import HvdTrainError
from hvd_train.record.reports import EvaluationReport, Recorder, Report, RoundReport, RunHeader, StopReport
from hvd_train.rundir import RunDirectory, open_run
from hvd_train.signals import StopRequest
from hvd_train.wiring import Wiring
from tests.threads import ThreadCommunicator, on_ranks
from tests.unit.data.shards import write_foreign


@dataclass
class Remembered(Recorder):
    """What one rank was told."""

    reports: list[Report]

    def header(self, header: RunHeader) -> None: ...

    def report(self, report: Report) -> None:
        self.reports.append(report)

    def close(self) -> None: ...

    def of(self, kind: type[Report]) -> list[Report]:
        return [r for r in self.reports if isinstance(r, kind)]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A small shard and a large one: with three ranks the large one is cut, and rank 0 keeps what it had."""
    write_foreign(tmp_path / "a.h5", 40)
    write_foreign(tmp_path / "b.h5", 200, 40)
    return Config(
        name="r",
        runs=str(tmp_path / "runs"),
        threads=torch.get_num_threads(),
        data=DataConfig(path=str(tmp_path / "*.h5"), batch_size=4),
        model=ModelConfig(hidden=(4,)),
        sync=SyncConfig(period=5),
        stop=StopConfig(patience=0, max_rounds=3),
        evaluate=EvaluateConfig(every_epochs=1, every_rounds=0),
        checkpoint=CheckpointConfig(keep=5),
    )


def train(config: Config, ranks: int) -> list[Remembered]:
    """What the ranks report of a training, each for itself."""
    run = open_run(config)

    def rank(comm: ThreadCommunicator) -> Remembered:
        recorder = Remembered([])
        wiring = Wiring(config, None, comm)
        training = wiring.assemble(
            RunDirectory(folder=run.folder, checkpoint=run.checkpoint), recorder, StopRequest()
        )
        recorder.header(wiring.header(run, training))
        training.run()
        wiring.reader.close()
        return recorder

    return on_ranks(ranks, rank)


def resumed(config: Config, **stop: int) -> Config:
    return replace(config, resume="auto", stop=StopConfig(patience=0, **stop))


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_a_run_goes_on_with_another_number_of_ranks(ranks: int, config: Config) -> None:
    """Stopped within an epoch. All ranks then pass from one epoch to the next in the same round: if one did
    not, it would not take part in the evaluation that the others begin."""
    before = sum(r.samples for r in train(config, 2)[0].of(RoundReport))  # type: ignore[union-attr]
    recorders = train(resumed(config, max_epochs=3), ranks)
    rounds = [[(r.round, r.epoch) for r in rec.of(RoundReport)] for rec in recorders]  # type: ignore[union-attr]
    assert all(other == rounds[0] for other in rounds)
    assert rounds[0][0][0] == 4
    assert rounds[0][-1][1] >= 3
    if ranks == 2:
        assert rounds[0][0][1] == pytest.approx(20 / 50), "it goes on in the middle of the epoch"
    else:
        assert rounds[0][0][1] < 1, "the epoch begins anew"
    used = sum(r.samples for r in recorders[0].of(RoundReport))  # type: ignore[union-attr]
    assert used == 3 * 240 - (before if ranks == 2 else 0)
    for rec in recorders:
        assert len(rec.of(EvaluationReport)) == 3
        (stop,) = rec.of(StopReport)
        assert (stop.reason, stop.best) == ("max_epochs", recorders[0].of(StopReport)[0].best)  # type: ignore[union-attr]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_row_is_used_once_an_epoch(ranks: int, config: Config) -> None:
    recorder = train(replace(config, stop=StopConfig(patience=0, max_epochs=2)), ranks)[0]
    used = [r.samples for r in recorder.of(RoundReport)]  # type: ignore[union-attr]
    assert sum(used) == 2 * 240
    assert recorder.of(RoundReport)[-1].epoch == 2  # type: ignore[union-attr]


def test_another_data_set_is_refused_on_every_rank(config: Config, tmp_path: Path) -> None:
    train(config, 2)
    again = Config(
        **{**vars(resumed(config, max_rounds=9)), "data": DataConfig(path=str(tmp_path / "*.h5"), scale=0.5)}
    )
    with pytest.raises(
        HvdTrainError, match=r"was trained on samples .* Give the data that the run began with"
    ):
        train(again, 2)


def test_another_model_is_refused_on_every_rank(config: Config) -> None:
    train(config, 2)
    again = replace(resumed(config, max_rounds=9), model=ModelConfig(hidden=(5,)))
    with pytest.raises(HvdTrainError, match=r"size mismatch .* Resume with the model that"):
        train(again, 2)


@pytest.mark.parametrize("limit", [{"max_rounds": 3}, {"max_rounds": 2}])
def test_a_run_that_is_over_is_refused(limit: dict[str, int], config: Config) -> None:
    train(config, 2)
    with pytest.raises(
        HvdTrainError, match=r"max_rounds = .: the run has done 3; expected a higher limit to go on"
    ):
        train(resumed(config, **limit), 2)
