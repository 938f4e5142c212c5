"""Post-local SGD: rounds of averaged gradients, and then local SGD (T. Lin, S. U. Stich, K. K. Patel and
M. Jaggi, "Don't Use Large Mini-Batches, Use Local SGD", ICLR 2020, arXiv:1808.07217)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch.optim import Optimizer

from hvd_train.algorithm.averaging import Inspection, StateAverage
from hvd_train.algorithm.every_step import EveryStep
from hvd_train.algorithm.flat_state import FlatState
from hvd_train.algorithm.gathering import gather_state
from hvd_train.algorithm.header import StepDone
from hvd_train.algorithm.sliced_optimizer import SlicedOptimizer
from hvd_train.algorithm.worker import Step
from hvd_train.comm.base import Communicator
from hvd_train.tasks.base import Batch


@final
class WarmUp:
    """Which rounds average gradients; the same on every rank.

    Args:
        rounds: that do, from the start of the run.
    """

    def __init__(self, rounds: int) -> None:
        self._rounds = self.left = rounds
        """Rounds of it to come."""

    def goes_on(self, rounds: int) -> None:
        """The run has done so many rounds."""
        self.left = max(0, self._rounds - rounds)


@final
class WarmUpStep:
    """The local step of a training with a warm-up. Collective in the warm-up."""

    def __init__(self, warm_up: WarmUp, together: Step, alone: Step) -> None:
        self._warm_up = warm_up
        self._together = together
        self._alone = alone

    def __call__(self, batches: Sequence[Batch]) -> StepDone:
        """One step. Raises what `Gradients` raises."""
        return self._together(batches) if self._warm_up.left else self._alone(batches)


@final
class WarmUpAverage:
    """The end of a round. After the last one of the warm-up the optimizer's state is gathered from the
    slices, and the ranks begin to average their parameters.

    Args:
        every_step: what is left for the end of a round of averaged gradients.
        local: the average of local SGD, which `every_step` uses as well.
        optimizer: of the local steps.
        taken: whether `sliced` holds the state of a checkpoint, so that it is gathered even if the warm-up is
            over.
    """

    def __init__(
        self,
        warm_up: WarmUp,
        every_step: EveryStep,
        local: StateAverage,
        flat: FlatState,
        comm: Communicator,
        sliced: SlicedOptimizer,
        optimizer: Optimizer,
        *,
        taken: bool,
    ) -> None:
        self._warm_up = warm_up
        self._every_step = every_step
        self._local = local
        self._flat = flat
        self._comm = comm
        self._sliced = sliced
        self._optimizer = optimizer
        self._taken = taken

    @property
    def _now(self) -> EveryStep | StateAverage:
        return self._every_step if self._warm_up.left else self._local

    def start(self) -> None:
        """x_0 := the state of rank 0. Collective."""
        if not self._warm_up.left:
            self._gather(self._taken)
        self._now.start()

    def _gather(self, needed: bool = True) -> None:
        if needed:
            gather_state(self._flat, self._comm, self._sliced, self._optimizer)
        self._sliced.release()

    def inspect(self, distance: bool, verify: bool) -> Inspection:
        """See `Average`."""
        return self._now.inspect(distance, verify)

    def moved(self) -> float:
        """See `Average`."""
        return self._now.moved()

    def average(self, weight: float, healthy: bool, verify: bool = True, rounds: int | None = None) -> bool:
        """See `Average`."""
        moved = self._now.average(weight, healthy, verify, rounds)
        if self._warm_up.left:
            self._warm_up.left -= 1
            if not self._warm_up.left:
                self._gather()
                self._local.begin()
        return moved

    def rebind(self, comm: Communicator) -> str:
        """See `Average`."""
        self._comm = comm
        return self._now.rebind(comm)
