"""Whole trainings of several ranks in one process."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from hvd_train.algorithm.local_sgd import LocalSGD
from hvd_train.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    StopConfig,
    SyncConfig,
)
from hvd_train.data.format import SampleSpec
from hvd_train.preparation import prepare
from hvd_train.record.reports import Recorder, Report, RoundReport, RunStart
from hvd_train.run.claim import NoClaim
from hvd_train.run.directory import open_run
from hvd_train.run.signals import StopRequest
from hvd_train.tasks.base import Task
from hvd_train.tasks.built_in import Classification
from hvd_train.wiring import Wiring
from tests.threads import ThreadCommunicator, on_ranks
from tests.unit.data.shards import write_foreign

AnyReport = TypeVar("AnyReport", bound=Report)


@dataclass
class Remembered(Recorder):
    """What one rank reported, and its training at the end."""

    reports: list[Report]
    training: LocalSGD | None = None
    interrupted_in: int = 0
    """Round after which the run is to stop as if by a signal."""
    request: StopRequest = field(default_factory=StopRequest)
    start: RunStart = field(init=False)

    def header(self, header: RunStart) -> None:
        self.start = header

    def report(self, report: Report) -> None:
        self.reports.append(report)
        if isinstance(report, RoundReport) and report.round == self.interrupted_in - 1:
            self.request.asked = True  # the next header carries it

    def close(self) -> None: ...

    def of(self, kind: type[AnyReport]) -> list[AnyReport]:
        return [r for r in self.reports if isinstance(r, kind)]


def small(tmp_path: Path) -> Config:
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


def train(
    config: Config, ranks: int, task: Task | None = None, *, interrupted_in: int = 0
) -> list[Remembered]:
    """What the ranks report of a training, each for itself."""
    run, claim = open_run(config)

    def rank(comm: ThreadCommunicator) -> Remembered:
        recorder = Remembered([], interrupted_in=interrupted_in)
        wiring = Wiring(prepared=prepare(config, task, comm))
        mine = claim if comm.rank == 0 else NoClaim()
        recorder.training = wiring.assemble(run, recorder, recorder.request, mine)
        recorder.header(wiring.header(run, recorder.training))
        recorder.training.run()
        wiring.reader.close()
        return recorder

    with claim:
        return on_ranks(ranks, rank)


def resumed(config: Config, **stop: Any) -> Config:
    """The same going on, with these limits."""
    return replace(config, resume="auto", stop=StopConfig(**{"patience": 0, **stop}))


class Same(Classification):
    """The built-in task of `small`, under another name."""

    def __init__(self) -> None:
        super().__init__(ModelConfig(hidden=(4,)))


class Drawn(Same):
    """With initial values of its own: the ranks are threads, which share torch's generator."""

    def build_model(self, spec: SampleSpec) -> nn.Module:
        model = super().build_model(spec)
        generator = torch.Generator().manual_seed(3)
        for p in model.parameters():
            p.detach().normal_(0, 0.3, generator=generator)
        return model
