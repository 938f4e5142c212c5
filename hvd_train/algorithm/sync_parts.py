"""What the section `sync` of a configuration describes: what is averaged, and how the average is used."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import nn

from hvd_train.algorithm.averaging import Average, NoAverage, StateAverage
from hvd_train.algorithm.early_bucket import early_parameters
from hvd_train.algorithm.ema import AverageWithEma, Ema
from hvd_train.algorithm.every_step import EveryStep
from hvd_train.algorithm.flat_state import FlatState
from hvd_train.algorithm.gradient_average import GradientAverage, GradientStep
from hvd_train.algorithm.gradients import Gradients
from hvd_train.algorithm.local_step import LocalStep
from hvd_train.algorithm.outer import make_rule
from hvd_train.algorithm.outer_step import OuterStep
from hvd_train.algorithm.outliers import Outliers
from hvd_train.algorithm.own_buffers import OwnBuffers
from hvd_train.algorithm.sliced_optimizer import EVERY_STEP, IN_WARM_UP, SlicedOptimizer
from hvd_train.algorithm.synchronizer import Synchronizer
from hvd_train.algorithm.warm_up import WarmUp, WarmUpAverage, WarmUpStep
from hvd_train.algorithm.worker import Step
from hvd_train.comm.base import Communicator
from hvd_train.config import Config
from hvd_train.errors import RunDirectoryError
from hvd_train.io.stateful import State, Stateful
from hvd_train.run.restore import restore_model
from hvd_train.run.saved_checkpoint import EMA_FILE, SavedCheckpoint


class SyncParts:
    """The parts of one training, made together. The constructor is not collective.

    Raises `TaskError` for a tensor that cannot be averaged, `ConfigError` for what does not go together with
    the model.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, comm: Communicator, config: Config
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._comm = comm
        self._optim = config.optim
        self._sync = sync = config.sync
        every_step, warms_up = sync.mode == "gradients", sync.schedule == "warmup"
        self._warm_up = WarmUp(sync.warmup_rounds)
        self.flat = FlatState(
            model,
            optimizer,
            comm,
            optimizer_state="keep" if every_step else sync.optimizer_state,
            batch_norm=sync.batch_norm,
            moments=sync.moments,
            every_rounds=sync.every_rounds,
            parameters_apart=every_step or warms_up or sync.outer != "none" or sync.clip > 0,
            moments_apart=warms_up,
            early=early_parameters(model, self._optim) if every_step and comm.averages_in_background else (),
        )
        self.buffers = OwnBuffers(model, self.flat)
        self._gradients: GradientAverage | None = None
        self._sliced: SlicedOptimizer | None = None
        if every_step:
            optimizer.state.clear()  # of classes that begin with some
        if every_step or warms_up:
            asked = EVERY_STEP if every_step else IN_WARM_UP
            self._sliced = SlicedOptimizer(self.flat, comm, optimizer, asked)
            self._gradients = GradientAverage(self.flat, comm, self._sliced, config.optim.clip_norm)
        self.ema = Ema(self.flat, comm, sync.ema)
        self.outer = OuterStep(self.flat, comm, make_rule(sync), sync.clip)
        self.outliers = Outliers(
            sync.outliers,
            threshold=sync.outlier_threshold,
            decay=sync.outlier_decay,
            warmup=sync.outlier_warmup,
        )
        self._resumed = False
        self._taken = False
        """Whether the state of the slices is that of a checkpoint."""
        self.lost = ""
        """What of a checkpoint could not be taken, in words; empty if all was."""
        """What a resume could not take, in words."""

    def stateful(self) -> dict[str, Stateful]:
        """What of them a checkpoint saves; that of `buffers`, `outer` and `sliced` is each rank's own."""
        parts: dict[str, Stateful] = {
            "buffers": self.buffers,
            "ema": self.ema,
            "outer": self.outer,
            "outliers": self.outliers,
        }
        return parts if self._sliced is None else {**parts, "sliced": self._sliced}

    def step(self, gradients: Gradients) -> Step:
        """What a local step does."""
        alone = LocalStep(gradients, self._optimizer, self._optim)
        if self._gradients is None:
            return alone
        together = GradientStep(gradients, self._gradients)
        return together if self._sync.mode == "gradients" else WarmUpStep(self._warm_up, together, alone)

    def synchronizer(self) -> Synchronizer:
        """What averages after every round; made once what is resumed is restored."""
        chosen = self._average()
        if self._sync.ema:
            chosen = AverageWithEma(chosen, self.ema)
        return Synchronizer(
            chosen,
            self._comm,
            check_every=self._sync.check_every,
            measure_drift=self._sync.mode != "gradients",
            drift_at_once=self._sync.schedule == "drift",
            outliers=self.outliers,
            checked=self._checked,
        )

    def _average(self) -> Average:
        every_step = self._sync.mode == "gradients" or self._warm_up.left > 0
        average = StateAverage(
            self.flat, self._comm, self.outer, parameters=not every_step, resumed=self._resumed
        )
        if self._sync.mode == "none":
            return NoAverage(average)
        if self._gradients is None or self._sliced is None:
            return average
        gradients = EveryStep(average, self._gradients)
        if self._sync.mode == "gradients":
            return gradients
        return WarmUpAverage(
            self._warm_up,
            gradients,
            average,
            self.flat,
            self._comm,
            self._sliced,
            self._optimizer,
            taken=self._taken,
        )

    @property
    def _checked(self) -> str:
        if self._gradients is None:
            return "parameters"
        return "gradients" if self._sync.mode == "gradients" else "gradients, parameters"

    @property
    def optimizer_steps_alone(self) -> bool:
        """Whether each rank's optimizer steps all parameters, so that its state is the training's; else that
        of the slices is."""
        return self._gradients is None or (self._sync.mode != "gradients" and not self._warm_up.left)

    def goes_on(self, rounds: int) -> None:
        """The run has done so many rounds."""
        self._warm_up.goes_on(rounds)

    def divide(self, states: MutableMapping[str, State]) -> None:
        """Divides the saved state of the optimizer into what is averaged in every round now, `moments`, and
        each rank's own, `optimizer`."""
        both = {**states["moments"], **states["optimizer"]}
        shared = {name.rpartition("/")[2] for name in self.flat.moments()}
        states["moments"] = {name: v for name, v in both.items() if name.rpartition("/")[2] in shared}
        states["optimizer"] = {name: v for name, v in both.items() if name not in states["moments"]}

    def restore(
        self, saved: SavedCheckpoint, states: MutableMapping[str, State], *, optimizer_holds: bool
    ) -> None:
        """Restores what each rank holds a slice of, and removes from `states` what needs nothing more. The
        model holds other values afterwards. Not collective.

        Args:
            optimizer_holds: whether the optimizer has the class, arguments and parameters that it had.

        Raises `RunDirectoryError` for a state that does not fit.
        """
        self._resumed = True
        if self._sync.ema and saved.has_ema:
            restore_model(saved, self._model, EMA_FILE)
            self.ema.take()
        else:
            states.pop("ema", None)
        if states.pop("outer", None) is not None and not self._warm_up.left:
            self._deal(saved, "outer", self.outer)
        sliced = states.pop("sliced", None) is not None and bool(saved.part(0, "sliced")["offsets"])
        if not optimizer_holds:
            return
        if sliced and self._sliced is not None:
            self._deal(saved, "sliced", self._sliced)
            self._taken = True
        elif sliced:
            self.lost = (
                "the run was within its warm-up, which is over now: the optimizer's state begins anew."
            )
        elif self._warm_up.left and (states["moments"] or states["optimizer"]):
            self.lost = "the run goes back to its warm-up: the optimizer's state begins anew."

    def _deal(self, saved: SavedCheckpoint, name: str, part: OuterStep | SlicedOptimizer) -> None:
        own = self._comm.rank % saved.world_size  # its slice is the same if the world is
        others = (r for r in range(saved.world_size) if r != own)
        try:
            part.take(saved.part(r, name) for r in (own, *others))
        except RunDirectoryError as error:
            raise saved.refusal(
                f"rank-*.safetensors: the state of {name}: {str(error).rstrip('.')}"
            ) from error
