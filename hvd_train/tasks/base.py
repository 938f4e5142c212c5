"""The `Task`: what is trained. Your own derives from it, as the built-in ones do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hvd_train.data.format import SampleSpec
from hvd_train.errors import TaskError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Concatenate

    from torchmetrics import Metric, MetricCollection

    from hvd_train.tasks.draws import Draws

    _Transform = Callable[Concatenate[Any, "Batch", ...], "Batch"]

Batch = dict[str, Tensor]
"""One tensor for each field of a sample, by name; samples along the first axis. Beside a field whose rows are
padded, such as `tokens`, is its mask, `tokens_mask`: true for values, false for padding."""

Sums = dict[str, tuple[float, float]]
"""By name a sum and what it is divided by. Sums of several batches and ranks add up to the exact mean."""


def _either_form(method: _Transform) -> _Transform:
    """For type checkers: a task may define `transform` with or without `training`."""
    return method


class Task(ABC):
    """What to train: a model, its loss, and the metrics to report.

    Your own task derives from this class. Name it by `--task mytask.py:MyTask` or
    `--task package.module:MyTask`. It is constructed without arguments, once on every rank. No method
    may communicate; each rank calls them on its own batches, and not the same number of times.
    """

    @abstractmethod
    def build_model(self, spec: SampleSpec) -> nn.Module:
        """A new model for samples of this shape, on the CPU and in training mode; modules in it that are in
        evaluation mode, such as a frozen batch norm, stay so.

        Draw random numbers from torch's global generator only: it is seeded before the call. This
        method is called before every other one, also when a finished model is loaded.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """The mean loss over the samples of `batch` as a scalar tensor with a gradient, and their number n.

        The mean must be the sum over samples divided by n: then accumulated batches, and ranks with
        different numbers of samples, are weighted by n and give the exact mean of all.
        """

    def metrics(self, model: nn.Module, batch: Batch) -> Sums:
        """Further metrics of an evaluation batch: name -> (sum, count). Default: none.

        The value reported is the sum of sums over all batches and ranks divided by the sum of counts.
        The watch follows the one that `evaluate.metric` names, by default `error`.
        """
        return {}

    def build_metrics(self, num_samples: int) -> Mapping[str, Metric | MetricCollection]:
        """Metrics that are no mean over samples, such as an AUC: torchmetrics' objects by name. Default:
        none.

        Called once on every rank, after `build_model`. Keep the objects, and call their `update` in `metrics`
        or `evaluate`, once for each batch. Their states are gathered from all ranks and reduced as they
        declare, and they are reset after each evaluation. One that gives a dictionary has its keys as names;
        the watch can follow a single number, also an entry of a vector: `recall[3]`.

        Args:
            num_samples: of the data that is evaluated. A metric that keeps every prediction needs memory for
                all of them on every rank: give it a fixed number of thresholds where there are many.
        """
        return {}

    def sample_losses(self, model: nn.Module, batch: Batch) -> Tensor | None:
        """The loss of each sample of a transformed batch, [B], not a number where a sample does not count;
        for the list of the worst samples of `hvd_train evaluate`. Default: None, no list. Called as
        `evaluate` is."""
        return None

    @_either_form
    def transform(self, batch: Batch, training: Draws | None = None) -> Batch:
        """The batch as `loss`, `metrics`, `evaluate` and `predict` get it; called once for each batch, before
        the model. Default: as it was read. Integers arrive with the dtype that they have in the shard.

        A batch to predict on has no targets, weights or mask: convert the targets `if "targets" in batch`.

        `training` is None, but for a batch to train on: then it gives the random numbers of an augmentation,
        which depend on the seed, the epoch and the row, and on nothing else (see `Draws`). Numbers that are
        drawn from other generators differ with the number of ranks and of `data.workers`. Leave the argument
        out where the transform is the same in training.

        With `data.workers` it is called in other processes: it must not depend on what `loss` did, and must
        return a dictionary of tensors.
        """
        return batch

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        """`loss` and `metrics` of one transformed batch as sums and counts; updates those of `build_metrics`.

        Called under `torch.no_grad()` with the model in evaluation mode. The default runs the model
        once for `loss` and once more for `metrics`; override it where one forward pass gives both.
        """
        mean, count = self.loss(model, batch)
        sums = {name: (float(total), float(n)) for name, (total, n) in self.metrics(model, batch).items()}
        return {"loss": (mean.item() * count, float(count)), **sums}

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What `hvd_train predict` writes for one transformed batch of inputs: name -> tensor, samples along
        the first axis; booleans, integers or floating-point numbers. Names, types and shapes of a sample are
        the same for every batch. Default: `outputs`, what the model gives for the only dataset of the batch.

        Called under `torch.no_grad()` with the model in evaluation mode. The result of a sample must not
        depend on the others in its batch.
        """
        if len(batch) != 1:
            raise TaskError(
                f"a batch has the datasets {', '.join(batch)}; the predict of hvd_train.Task expects one, "
                "which it gives to the model. Define `predict` in your task."
            )
        return {"outputs": model(*batch.values())}
