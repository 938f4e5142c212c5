"""What the study trains: models, data, numbers of ranks and of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.study.rules import ALL, FEW, Rule
from hvd_train.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    LearningRateConfig,
    ModelConfig,
    OptimConfig,
    RecordConfig,
    StopConfig,
    SyncConfig,
    flatten,
)

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("alike", "split")
SELECTION, TEST = "selection", "test"
"""The rows by which the learning rate is chosen, and those of the final figures."""
SELECTION_SEED = 100
NEVER = 10**9
"""Rounds."""

KEY = ("problem", "ranks", "rows", "split", "rule", "lr", "part", "settings")
"""What tells trainings apart; see `Training.key`."""


_DEFAULTS = flatten(Config())


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Trainings that differ in rule, split, learning rate and seed only."""

    name: str
    ranks: int
    data: str
    """Which of `data.WRITERS` writes its rows."""
    rows: int
    """Of all ranks; a multiple of `ranks` times `batch`."""
    batch: int
    epochs: int
    rates: Sequence[float]
    """Learning rates that every rule tries. Where the best of a rule is the lowest or the highest, it tries
    half or twice as much."""
    seeds: Sequence[int]
    rules: Sequence[Rule]
    seconds: float
    """Of one training on two cores that have nothing else to do."""
    metric: str = "error"
    task: str = "classification"
    """A file of a task of your own is given relative to the root of the repository."""
    model: Mapping[str, Any] = field(default_factory=dict)
    optim: Mapping[str, Any] = field(default_factory=dict)
    warmup: float = 0.0
    """Of the learning rate, as a share of all samples."""

    @property
    def steps(self) -> int:
        """Local steps of a training."""
        return self.epochs * self.rows // (self.ranks * self.batch)

    @property
    def samples(self) -> int:
        """Of a training, on all ranks."""
        return self.epochs * self.rows


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training of a problem."""

    problem: Problem
    split: str
    rule: Rule
    rate: float
    seed: int
    part: str
    """`SELECTION` or `TEST`."""

    def config(self) -> Config:
        """Without the places of data and runs. The learning rate falls to 0 at the end: local steps of a last
        round that go beyond the epochs change nothing."""
        problem = self.problem
        samples = problem.samples
        return Config(
            task=problem.task,
            threads=1,
            seed=self.seed,
            data=DataConfig(batch_size=problem.batch, reading="memory"),
            model=ModelConfig(**problem.model),
            optim=OptimConfig(lr=self.rate, **problem.optim),
            learning_rate=LearningRateConfig(
                schedule="cosine", unit="samples", total=samples, warmup=int(problem.warmup * samples)
            ),
            sync=SyncConfig(**self.rule.settings(self.split, self.rate)),
            stop=StopConfig(patience=0, max_epochs=problem.epochs),
            evaluate=EvaluateConfig(
                metric=self.rule.metric + problem.metric, every_epochs=0, every_rounds=NEVER
            ),
            record=RecordConfig(observe=False),
        )

    def placed(self, data: Path, runs: Path) -> Config:
        """The same with its places."""
        config = self.config()
        task = f"{ROOT}/{config.task}" if "/" in config.task else config.task
        source = replace(config.data, path=str(data / self.folder))
        return replace(config, task=task, data=source, runs=str(runs), name="run")

    @property
    def folder(self) -> str:
        """Of its data, below that of all data."""
        return folder_of(self.problem, self.split, self.part)

    def key(self) -> dict[str, Any]:
        """What the training is, in values of JSON: it is not repeated as long as nothing of that changes."""
        own, problem = flatten(self.config()), self.problem
        settings = {name: value for name, value in own.items() if value != _DEFAULTS.get(name)}
        values = (problem.name, problem.ranks, problem.rows, self.split, self.rule.name)
        return dict(zip(KEY, (*values, self.rate, self.part, settings), strict=True))


def folder_of(problem: Problem, split: str, part: str) -> str:
    """Where its data are, below the folder of all data."""
    return f"{problem.data}-{problem.rows}-{problem.ranks}-{split}-{part}"


_MLP = Problem(
    name="mlp",
    ranks=4,
    data="mnist",
    rows=38_400,
    batch=32,
    epochs=10,
    rates=(0.025, 0.05, 0.1),
    seeds=range(5),
    rules=ALL,
    seconds=11,
    model={"hidden": (500, 100)},
)

PROBLEMS: tuple[Problem, ...] = (
    _MLP,
    Problem(
        name="tabular",
        ranks=4,
        data="tabular",
        rows=19_200,
        batch=64,
        epochs=20,
        rates=(0.006, 0.012, 0.024),
        seeds=range(3),
        rules=FEW,
        seconds=3,
        task="examples/tabular.py:Tabular",
        optim={"name": "AdamW"},
    ),
    Problem(
        name="cnn",
        ranks=4,
        data="mnist",
        rows=38_400,
        batch=32,
        epochs=5,
        rates=(0.025, 0.05, 0.1),
        seeds=range(3),
        rules=FEW,
        seconds=16,
        model={"name": "cnn", "channels": (8, 16), "hidden": (100,)},
    ),
    Problem(
        name="transformer",
        ranks=4,
        data="text",
        rows=25_600,
        batch=8,
        epochs=1,
        rates=(0.0015, 0.003, 0.006),
        seeds=range(3),
        rules=FEW,
        seconds=60,
        metric="perplexity",
        task="examples/characters.py:Characters",
        optim={"name": "AdamW", "args": {"weight_decay": 0.01}, "clip_norm": 1.0},
        warmup=1 / 12,
    ),
    # In 1,500 local steps three rounds of 500 would show nothing.
    replace(_MLP, ranks=8, rules=[rule for rule in ALL if rule.sync.get("period", 1) <= 100], seconds=14),
)
"""In the order in which they are trained."""
