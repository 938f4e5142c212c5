"""What a run reports: plain values, the same for the event log, the console and whatever comes later.

All figures are of the whole world unless a field says otherwise; where they differ between ranks they
come as a `Spread`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    import numpy.typing as npt

PHASES = ("data", "compute", "communication", "wait")
"""Where the time of a round goes: reading batches, local steps, moving data between ranks (the average,
its hash and finiteness check), and waiting for slower ranks. A phase that is not measured is absent."""


@final
@dataclass(frozen=True)
class Spread:
    """One figure over the ranks."""

    min: float
    median: float
    max: float

    def __add__(self, other: Spread) -> Spread:
        """The spread of several rounds together, as far as it is known: each part is summed by itself."""
        return Spread(self.min + other.min, self.median + other.median, self.max + other.max)


@final
@dataclass(frozen=True, kw_only=True)
class RunStart:
    """What will run: reported once at every start."""

    run: str
    """The run's folder."""

    round: int = 0
    """Rounds done before this start: 0, or the round that was resumed. Events of later rounds that
    precede this header in the same log were undone by the resume."""

    task: str
    model: str
    """The model in a few words, for example `mlp 64-128-64-10`."""

    num_parameters: int
    num_frozen: int = 0
    """Elements of the parameters that are not trained."""

    init: str = ""
    """What the model starts from; empty: its own initial values, or the checkpoint that is resumed."""

    layers: Sequence[str] = ()
    """The trainable parameters by name, in the order of `LayerReport`."""

    layer_sizes: Sequence[int] = ()
    """Their elements."""

    world_size: int
    hosts: tuple[str, ...]
    """Names of the hosts, each once."""

    host_of_rank: Sequence[int] = ()
    """The index in `hosts` of each rank's host."""

    backend: str
    lost_rank: str
    """If a rank is killed, it `ends the job` or `is survived`."""

    stall_timeout_s: float = 300.0
    """Seconds without progress after which a rank that others wait for is given up."""

    sees_signs: bool = True
    """Whether ranks see that others still work; if not, a healthy rank whose round is much longer than
    `stall_timeout_s`, and than all rounds before it, is given up, too."""

    compile_s: Sequence[float] = ()
    """Seconds that compiling the model took on each rank; empty: it is not compiled."""

    threads: Sequence[int]
    """Threads of torch on each rank."""

    period: int | None
    """Local steps between two averages, or of a round of averaged gradients, as configured; None: the ranks
    are never averaged."""

    schedule: str = ""
    """How the period changes, in words; empty: it does not."""

    mode: str = "average"
    """What is averaged: `average`: the parameters, after each round; `gradients`: the gradients, in every
    local step; `none`: nothing."""

    batch_size: int
    """Samples of one local step on one rank."""

    data: str
    """Where the samples come from, as configured."""

    shards_per_rank: Sequence[int]
    samples_per_rank: Sequence[int]
    reading: Sequence[str] = ()
    """How each rank reads its rows, `memory`, `mmap` or `stream`, and after a colon why so."""

    validation_samples: int
    """0: there are none, and the watch follows the smoothed training loss."""

    values: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """What the values of each dataset are, from some of the training rows."""

    remarks: Sequence[str] = ()
    """What looks wrong in them, one sentence each."""

    metric: str
    """The metric that the watch follows."""

    stop_rules: Mapping[str, float]
    """The stop rules that are on, by the names of `StopConfig`."""

    config_hash: str
    task_is_given: bool = False
    """Whether the program gave its task as an object, which no option can name."""

    versions: Mapping[str, str]
    """Versions of `hvd_train`, `python`, `torch`, `mpi`, ..."""


@final
@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """One round."""

    round: int
    """Rounds done, this one included: the first round is 1."""

    epoch: float
    """Passes over all shards done."""

    samples: int
    """Samples used in this round."""

    loss: float
    """Mean over the samples of this round; not a number if there were none."""

    seconds: Mapping[str, Spread]
    """Seconds in each of `PHASES`."""

    by_rank: npt.NDArray[Any] | None = None
    """The same of each rank: float64 [len(PHASES), size]."""

    period: int
    """Local steps of this round; where the ranks take different numbers their mean, rounded."""

    steps: Sequence[int] | None = None
    """Local steps of each rank, where every rank passes epochs of its own; else None."""

    lr: float
    """Learning rate of the first parameter group."""

    drift: float | None = None
    """Mean squared distance of the ranks' parameters from their mean, where it was measured."""

    zero_weight: tuple[int, ...] = ()
    """Ranks that did not count in the average: out of data, not finite, or left out as outliers."""


@final
@dataclass(frozen=True, kw_only=True)
class MachineReport:
    """What the ranks use of their hosts."""

    round: int
    rss_bytes: Sequence[int]
    """Resident memory of each rank, shared memory included."""

    cpu: Sequence[float]
    """Cores that each rank has kept busy since the last report."""

    throttled: Sequence[float]
    """The share of the time since the last report in which the limit of its cgroup held each rank back."""

    available_bytes: Sequence[int]
    """Memory that each host can still give, in the order of `RunStart.hosts`."""

    sent_bytes: int | None
    """Bytes that all ranks together have given to MPI for other hosts, in averages since this start; None
    where the backend cannot count them."""


@final
@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """Figures of each trainable parameter, in the order of `RunStart.layers`."""

    round: int
    period: int
    """Local steps of `update`: those of this round, or 1 with averaged gradients."""

    norm: Sequence[float]
    """||x_(t+1)||, the Euclidean norm after the average."""

    update: Sequence[float]
    """||x_(t+1) - x_t||, with averaged gradients of the last local step. Its ratio to `norm`, divided by
    `period`, is the relative step of one local step."""

    gradient: Mapping[str, Sequence[float]]
    """Root mean square of the gradient in the last local step: `min`, `mean` and `max` over the ranks that
    have one. Not a number if no rank has."""

    gradient_peak: Sequence[float]
    """The largest absolute value of the gradients of all ranks."""


@final
@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """One evaluation on the validation data, or of the smoothed training loss."""

    round: int
    epoch: float
    samples: int
    """Samples used for training so far, those before a resume included."""

    error: float
    """Value of the metric that the watch follows."""

    metrics: Mapping[str, float]
    best: float
    """Best value so far, this one included."""

    best_round: int
    seconds: float
    """Wall-clock seconds of this evaluation."""

    passes: Sequence[float] = ()
    """How often the rows of each rank have counted, where every rank passes epochs of its own."""


@final
@dataclass(frozen=True, kw_only=True)
class CheckpointReport:
    """A checkpoint was written."""

    round: int
    path: str
    reason: str
    """`best`, `every`, `end` or `interrupted`."""

    num_bytes: int
    seconds: float


@final
@dataclass(frozen=True, kw_only=True)
class FaultReport:
    """Something went wrong that the run outlived, or that ended it."""

    round: int
    kind: str
    """For example `not_finite` or `outlier`."""

    ranks: tuple[int, ...]
    message: str

    rows: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Training rows of an epoch that were left out, by reason: one number for each rank."""


@final
@dataclass(frozen=True, kw_only=True)
class PeriodReport:
    """What the user should know of the period: why it changes, or cannot, or should."""

    round: int
    period: int
    """Local steps of the next round, as far as they are known: else of this one."""

    message: str


@final
@dataclass(frozen=True, kw_only=True)
class StopReport:
    """The end of the run."""

    round: int
    reason: str
    """The name of the rule in `StopConfig` that held, or `diverged` or `interrupted`."""

    best: float | None
    """Best value of the metric that the watch follows; None if nothing was evaluated."""

    best_round: int | None
    final: float | None
    """Its last value."""

    samples: int
    """Samples used since this start."""

    seconds: float
    """Wall-clock seconds of training since this start."""

    left_out: Mapping[str, int] = field(default_factory=dict)
    """Rows that were drawn since this start and not used, by reason; a row counts in every epoch."""

    checkpoints: Mapping[str, str] = field(default_factory=dict)
    """Folder of the `best` and of the `latest` checkpoint, where there is one."""

    passes: Sequence[float] = ()
    """How often the rows of each rank have counted, where every rank passes epochs of its own."""

    missing: str = ""
    """What should be on disk and could not be written, with the reason and what is there instead: the run has
    failed. Empty if all is there."""


Report = (
    RoundReport
    | MachineReport
    | LayerReport
    | EvaluationReport
    | CheckpointReport
    | FaultReport
    | PeriodReport
    | StopReport
)


class Recorder(ABC):
    """Takes the reports of a run. Rank 0 has real ones, every other rank `NullRecorder`.

    No method communicates: whatever needs other ranks was reduced before it was reported.
    """

    @abstractmethod
    def header(self, header: RunStart) -> None:
        """What will run; comes first."""

    @abstractmethod
    def report(self, report: Report) -> None:
        """One thing that happened."""

    @abstractmethod
    def close(self) -> None:
        """Writes what is held back; comes last, also after an error. May be called twice."""


@final
class NullRecorder(Recorder):
    """For the ranks that record nothing."""

    def header(self, header: RunStart) -> None: ...

    def report(self, report: Report) -> None: ...

    def close(self) -> None: ...


@final
class Recorders(Recorder):
    """Hands every report to several recorders, in the order given."""

    def __init__(self, *recorders: Recorder) -> None:
        self._recorders = recorders

    def header(self, header: RunStart) -> None:
        for recorder in self._recorders:
            recorder.header(header)

    def report(self, report: Report) -> None:
        for recorder in self._recorders:
            recorder.report(report)

    def close(self) -> None:
        for recorder in self._recorders:
            recorder.close()
