"""The error on the validation data, computed by all ranks together: none waits while another evaluates."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec
import numpy as np
import torch
from torch import nn

from hvd_train.algorithm.header import Header
from hvd_train.comm.base import Communicator, Op
from hvd_train.data.batches import batch_bounds
from hvd_train.data.finite import first_not_finite
from hvd_train.data.readers.base import RowNumbers
from hvd_train.data.rows import Rows
from hvd_train.data.screen import usable
from hvd_train.errors import DataError, TaskError, UserError
from hvd_train.io.stateful import State, Stateful, checked
from hvd_train.liveness import mark
from hvd_train.run.model_state import buffers_as_they_are
from hvd_train.run.random_state import generators_as_they_are
from hvd_train.tasks.base import Batch, Task
from hvd_train.tasks.models import evaluating
from hvd_train.tasks.transforming import transform_of

if TYPE_CHECKING:
    from hvd_train.algorithm.metric_states import MetricStates, Value

T = TypeVar("T")


class _NoState(msgspec.Struct, forbid_unknown_fields=True):
    """The state of an evaluator that has none."""


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    """The training loss since the last evaluation, as a checkpoint holds it."""

    loss_sum: float
    samples: float


class Evaluator(Stateful, Protocol):
    """Computes the metrics that the watch follows. Its state is the same on every rank."""

    num_samples: int
    """Samples of validation data; 0 where there are none."""

    def after_round(self, header: Header) -> None:
        """Is called after every round."""

    def try_out(self) -> list[str]:
        """The names of the metrics, from one batch, before the first step. Changes nothing; not collective.
        Empty on a rank that has no batch. Raises `TaskError`."""

    def evaluate(self) -> dict[str, float]:
        """The metrics by name. Collective."""

    def undefined(self) -> list[str]:
        """The names of what build_metrics' metrics could not define in the last evaluation, such as the AUC
        of a class that does not occur. The same on every rank."""

    def not_finite(self) -> str:
        """Where the first value that is not finite is in this rank's part of the validation data; empty if
        all are finite. Reads the part again; returns the error message if it cannot be read."""

    def left_out(self) -> tuple[int, str]:
        """How many rows the last evaluation left out, the same on every rank; and where the first of them is
        that this rank read, empty if it read none."""


class ValidationEvaluator:
    """Evaluates the model on rows of validation data.

    Batch b holds the rows [b B, (b+1) B) of the whole validation data, and a single row that would be left
    over is in the last batch. The batches, and with them the metrics, do not depend on the number of ranks.
    Rank r takes the batches b with b mod p = r; where the ranks hold different models (`every_model`), each
    rank takes all batches, and the metrics are means over the models; those of `build_metrics` see the
    batches of all models.

    Args:
        rows: those that their screen marks are left out; the batches have fewer rows then.
        watched: a metric that is wanted though it is an entry of a vector: `recall[3]`.
        also: called in evaluations for each batch before it is evaluated, with the numbers of its rows.

    Raises `TaskError` for metrics that cannot be gathered, and `DataError` for rows in chunks that each
    evaluation would decode many times.
    """

    def __init__(
        self,
        comm: Communicator,
        task: Task,
        model: nn.Module,
        rows: Rows,
        *,
        batch_size: int,
        every_model: bool = False,
        watched: str = "",
        also: Callable[[RowNumbers, Batch], None] = lambda numbers, batch: None,
    ) -> None:
        rows.require_in_order()
        self._comm = comm
        self._task = task
        self._transform = transform_of(task)
        self._model = model
        self._rows = rows
        self.num_samples = len(rows)
        self._every_model = every_model
        every = (0, 1) if every_model else (comm.rank, comm.size)
        self._batches = batch_bounds(self.num_samples, batch_size)[every[0] :: every[1]]
        self._watched = watched
        self._also = also
        self._states = _states(comm, task, self.num_samples)
        self._left_out = 0
        self.values: dict[str, Value] = {}
        """Of the last evaluation: what the metrics of `build_metrics` gave, lists included."""

    def after_round(self, header: Header) -> None:
        """Training does not change the validation data."""

    def try_out(self) -> list[str]:
        """See `Evaluator`. Buffers of the model and the random generators are restored, so that a resumed run
        equals one that was not interrupted."""
        try:
            _, batch = next(self._usable_batches(), (None, None))
            if batch is None:
                return []
            with evaluating(self._model), buffers_as_they_are(self._model), generators_as_they_are():
                sums = self._task.evaluate(self._model, batch)
                return sorted(self._joined(sums, self._states.of_this_rank() if self._states else {}))
        except UserError:
            raise
        except Exception:
            raise TaskError(
                "the task cannot be evaluated on the first batch of the validation data:\n"
                + traceback.format_exc()
            ) from None
        finally:
            if self._states:
                self._states.reset()

    def evaluate(self) -> dict[str, float]:
        """Loss and metrics over all validation rows. Collective: a sum over the parts of all ranks."""
        totals: dict[str, np.ndarray] = {}
        self._left_out = 0
        with evaluating(self._model):
            for numbers, batch in self._usable_batches():
                self._also(numbers, batch)
                for name, pair in self._task.evaluate(self._model, batch).items():
                    totals[name] = totals.get(name, np.zeros(2)) + pair
        figures = self._reduce(totals)
        if self._rows.screen is not None:
            op = Op.MAX if self._every_model else Op.SUM
            self._left_out = int(self._comm.allreduce(np.array([float(self._left_out)]), op)[0])
        if self._states:
            self.values = self._states.compute()
            self._states.reset()
        return self._joined(figures, self.values)

    def undefined(self) -> list[str]:
        """See `Evaluator`."""
        if not self.values:
            return []
        from hvd_train.algorithm.metric_states import undefined

        return undefined(self.values)

    def not_finite(self) -> str:
        """See `Evaluator`."""
        part = [np.arange(start, stop) for start, stop in self._batches]
        try:
            return first_not_finite(self._rows, np.concatenate(part)) if part else ""
        except DataError as error:
            return str(error)

    def left_out(self) -> tuple[int, str]:
        """See `Evaluator`."""
        screen = self._rows.screen
        return self._left_out, screen.first_not_finite if screen is not None else ""

    def state_dict(self) -> dict[str, Any]:
        """Empty: an evaluation depends on nothing before it."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Raises `RunDirectoryError` for the state of another evaluator."""
        checked(state, _NoState)

    def _joined(self, figures: dict[str, T], values: dict[str, Value]) -> dict[str, T | float]:
        """The figures, the single numbers among the values, and the watched one."""
        if not values:
            return {**figures}
        from hvd_train.algorithm.metric_states import element, scalars

        twice = figures.keys() & values.keys()
        if twice:
            raise TaskError(
                f"the task gives `{min(twice)}` in `metrics` and in build_metrics; give one another name."
            )
        watched = element(values, self._watched)
        return {**figures, **scalars(values), **({} if watched is None else {self._watched: watched})}

    def _usable_batches(self) -> Iterator[tuple[RowNumbers, Batch]]:
        """This rank's batches, without the rows that are left out, and the numbers of their rows."""
        for start, stop in self._batches:
            mark()
            arrays, kept, left_out = usable(self._rows.read(start, stop))
            self._left_out += sum(left_out.values())
            if len(kept):
                batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
                yield start + kept, self._transform(batch)

    def _reduce(self, totals: dict[str, np.ndarray]) -> dict[str, float]:
        # A rank without a batch does not know the names; it contributes zeros.
        known = self._comm.allgather(sorted(totals))
        names = max(known, key=len)
        unlike = [r for r, theirs in enumerate(known) if theirs and theirs != names]
        if unlike:
            raise TaskError(
                f"the task's metrics differ between ranks: {names}, but {known[unlike[0]]} on rank "
                f"{unlike[0]}; return the same names for every batch.",
                agreed=True,
            )
        table = np.array([totals.get(name, np.zeros(2)) for name in names])
        sums = self._comm.allreduce(table, Op.SUM)
        return {name: float(total / count) for name, (total, count) in zip(names, sums, strict=True) if count}


class TrainingLossEvaluator:
    """Where there is no validation data: the mean training loss since the last evaluation."""

    num_samples = 0

    def __init__(self) -> None:
        self._loss_sum = 0.0
        self._samples = 0.0

    def after_round(self, header: Header) -> None:
        """Adds the losses that count in this round."""
        counted = header.counted
        self._loss_sum += float(header["loss_sum"][counted].sum())
        self._samples += float(header["samples"][counted].sum())

    def try_out(self) -> list[str]:
        """See `Evaluator`."""
        return ["error", "loss"]

    def evaluate(self) -> dict[str, float]:
        """The smoothed training loss as `loss`, and as the `error` that is watched; no message is sent."""
        loss = self._loss_sum / self._samples if self._samples else float("nan")
        self._loss_sum = self._samples = 0.0
        return {"loss": loss, "error": loss}

    def undefined(self) -> list[str]:
        """Empty: the loss is a sum."""
        return []

    def not_finite(self) -> str:
        """Empty: the reports of the rounds have named it."""
        return ""

    def left_out(self) -> tuple[int, str]:
        """None: there are no rows."""
        return 0, ""

    def state_dict(self) -> dict[str, Any]:
        """The sums since the last evaluation."""
        return {"loss_sum": self._loss_sum, "samples": self._samples}

    def load_state_dict(self, state: State) -> None:
        """Restores them."""
        saved = checked(state, _Saved)
        self._loss_sum, self._samples = saved.loss_sum, saved.samples


def _states(comm: Communicator, task: Task, num_samples: int) -> MetricStates | None:
    """None where the task builds no metrics: torchmetrics takes a second to load."""
    built = task.build_metrics(num_samples)
    if not built:
        return None
    from hvd_train.algorithm.metric_states import MetricStates

    return MetricStates(comm, built)
