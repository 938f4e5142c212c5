"""The running statistics of batch norm layers, computed anew for the averaged parameters.

The mean of the ranks' running statistics is not that of the averaged model: each rank has gathered them while
its parameters moved, and a mean of variances lacks how far the means of the ranks are apart. Here mean and
variance are those of all values that the batches of all ranks give, by the law of total variance; batches are
joined as in T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances", 1979. Compare Y. Wu and J. Johnson, "Rethinking 'Batch' in BatchNorm", 2021,
arXiv:2105.07576, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hvd_train.algorithm.evaluate import Evaluator
from hvd_train.algorithm.header import Header
from hvd_train.comm.base import Communicator, Op
from hvd_train.config import Config
from hvd_train.data.batches import batch_bounds
from hvd_train.data.catalog import Catalog
from hvd_train.data.format import Array
from hvd_train.data.rows import Rows
from hvd_train.data.screen import training_screen, usable
from hvd_train.errors import ConfigError, TaskError
from hvd_train.io.stateful import State
from hvd_train.liveness import mark
from hvd_train.run.model_state import buffers_as_they_are
from hvd_train.run.random_state import generators_as_they_are
from hvd_train.tasks.base import Batch, Task
from hvd_train.tasks.models import evaluating
from hvd_train.tasks.transforming import transform_of

_Values = npt.NDArray[np.float64]


class _Gathered:
    """Mean and variance, for each channel of a layer, of the values that it has seen."""

    def __init__(self, layer: _BatchNorm) -> None:
        self.layer = layer
        self.count = 0.0
        self.mean = np.zeros(layer.num_features)
        self.squares = np.zeros(layer.num_features)
        """The sum of the squared distances from the mean."""

    def after_forward(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        """Takes in the batch that the layer has just seen: with a momentum of 1 its running statistics are
        those of the batch. A batch that is not finite is left out."""
        count = inputs[0].numel() / self.layer.num_features
        mean, variance = (_float64(of) for of in (self.layer.running_mean, self.layer.running_var))
        if not np.isfinite([mean, variance]).all():
            return
        apart, total = mean - self.mean, self.count + count
        self.mean = self.mean + apart * (count / total)
        self.squares = self.squares + variance * (count - 1) + apart**2 * (self.count * count / total)
        self.count = total


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norm layers of a model that keep running statistics, without those that are in evaluation
    mode in a model that is not: they are frozen."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and isinstance(module.running_mean, Tensor)
        and (module.training or not model.training)
    ]


def update_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    comm: Communicator,
    forward: Callable[[Any], object] | None = None,
) -> None:
    """Replaces the running statistics of all batch norm layers by mean and unbiased variance of what they see
    in the `batches` of all ranks; the same on every rank afterwards. Collective.

    Batch norm normalises by each batch, as in training; every other module is in evaluation mode, so that
    dropout changes nothing. Other buffers, the counts of batches and the random generators are as before. A
    layer that sees fewer than two values keeps what it has.

    Args:
        batches: of this rank, each of two samples or more; there may be none. Ranks may have different
            numbers.
        forward: passes a batch through the model; by default `model(batch)`.

    Raises `TaskError` for a model without such layers.
    """
    layers = batch_norms(model)
    if not layers:
        raise TaskError(
            f"{type(model).__name__} has no batch norm with running statistics in training mode; expected at "
            "least one layer such as torch.nn.BatchNorm2d."
        )
    gathered = _gather(model, layers, batches, model if forward is None else forward)
    for layer, mean, variance in _merge(gathered, comm):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        with torch.no_grad():
            layer.running_mean.copy_(torch.from_numpy(mean))
            layer.running_var.copy_(torch.from_numpy(variance))


def _gather(
    model: nn.Module, layers: list[_BatchNorm], batches: Iterable[Any], forward: Callable[[Any], object]
) -> list[_Gathered]:
    """What the layers see on this rank."""
    gathered = [_Gathered(layer) for layer in layers]
    momenta = [layer.momentum for layer in layers]
    hooks = [one.layer.register_forward_hook(one.after_forward) for one in gathered]
    try:
        with evaluating(model), buffers_as_they_are(model), generators_as_they_are():
            for layer in layers:
                layer.train()
                layer.momentum = 1.0
                layer.reset_running_stats()  # 0 times a value that is not finite would not be 0
            for batch in batches:
                forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    return gathered


def _merge(gathered: list[_Gathered], comm: Communicator) -> Iterator[tuple[_BatchNorm, _Values, _Values]]:
    """Mean and variance over all ranks, of the layers that saw enough. Collective: two messages of as many
    numbers as there are channels, and one that makes sure that all ranks have the same bits."""
    widths = [one.layer.num_features for one in gathered]
    counts = np.repeat([one.count for one in gathered], widths)
    means, squares = (np.concatenate([getattr(o, of) for o in gathered]) for of in ("mean", "squares"))
    totals, sums = comm.allreduce(np.stack([counts, counts * means]), Op.SUM)
    mean = sums / np.maximum(totals, 1)
    within = comm.allreduce(squares + counts * (means - mean) ** 2, Op.SUM)
    totals, mean, variance = comm.broadcast((totals, mean, within / np.maximum(totals - 1, 1)))
    ends = np.cumsum(widths)
    for one, stop, width in zip(gathered, ends, widths, strict=True):
        start = stop - width
        if totals[start] > 1:
            yield one.layer, mean[start:stop], variance[start:stop]


def _float64(values: Tensor | None) -> _Values:
    assert values is not None
    return np.asarray(values.double().numpy(), np.float64)


class TrainingBatches:
    """Some training batches of a rank, the same in every evaluation: of evenly spaced rows of its part, each
    batch from one end of it to the other, so that rows that are sorted by class are mixed. How, and in which
    order, the training reads the rows does not matter. Transformed as for an evaluation, without
    augmentation.

    Args:
        rows: of this rank; those that their screen marks are left out.
        count: batches at most.
    """

    def __init__(self, rows: Rows, task: Task, *, batch_size: int, count: int) -> None:
        self._rows = rows
        self._transform = transform_of(task)
        bounds = batch_bounds(len(rows), batch_size)[:count] if len(rows) else []
        self._count = len(bounds)
        self._total = bounds[-1][1] if bounds else 0

    def __iter__(self) -> Iterator[Batch]:
        try:
            for batch in range(self._count):
                mark()
                numbers = np.arange(batch, self._total, self._count) * len(self._rows) // self._total
                arrays, kept, _ = usable(self._read(numbers.tolist()))
                if len(kept) > 1:  # batch norm needs two
                    yield self._transform({name: torch.from_numpy(array) for name, array in arrays.items()})
        finally:
            self._rows.close()

    def _read(self, numbers: Sequence[int]) -> dict[str, Array]:
        arrays = self._rows.empty(len(numbers))
        for at, row in enumerate(numbers):
            self._rows.read_into(arrays, at, row, row + 1)
        return arrays


def training_batches(
    catalog: Catalog, config: Config, task: Task, comm: Communicator, copies: Mapping[str, str]
) -> TrainingBatches:
    """Those that a run's configuration asks of this rank; `copies` of files are read in their place. Not
    collective."""
    data, size = config.data, config.data.batch_size
    rows = Rows(
        catalog.parts(comm.size, size)[comm.rank],
        catalog.sample.fields,
        screen=training_screen(data, catalog.sample),
        known=catalog.shards,
        copies=copies,
    )
    return TrainingBatches(rows, task, batch_size=size, count=config.evaluate.batch_norm_batches)


def require_batch_norm(model: nn.Module) -> None:
    """Raises `ConfigError` for a model without batch norm whose statistics are to be computed anew."""
    if not batch_norms(model):
        raise ConfigError(
            f"evaluate.batch_norm_batches: expected 0 with the model {type(model).__name__}, which has "
            "no batch norm layer with running statistics in training mode."
        )


class BatchNormEvaluator:
    """Computes the running statistics of batch norm anew before each evaluation. They stay in the model.

    Args:
        inner: evaluates the model.
        batches: of this rank.

    Raises `ConfigError` for a model without batch norm.
    """

    def __init__(
        self, inner: Evaluator, comm: Communicator, task: Task, model: nn.Module, batches: TrainingBatches
    ) -> None:
        require_batch_norm(model)
        self._inner = inner
        self._comm = comm
        self._task = task
        self._model = model
        self._batches = batches
        self.num_samples = inner.num_samples

    def after_round(self, header: Header) -> None:
        """See `Evaluator`."""
        self._inner.after_round(header)

    def try_out(self) -> list[str]:
        """See `Evaluator`."""
        return self._inner.try_out()

    def evaluate(self) -> dict[str, float]:
        """See `Evaluator`."""
        update_batch_norm(
            self._model, self._batches, self._comm, lambda batch: self._task.loss(self._model, batch)
        )
        return self._inner.evaluate()

    def undefined(self) -> list[str]:
        """See `Evaluator`."""
        return self._inner.undefined()

    def not_finite(self) -> str:
        """See `Evaluator`."""
        return self._inner.not_finite()

    def left_out(self) -> tuple[int, str]:
        """See `Evaluator`."""
        return self._inner.left_out()

    def state_dict(self) -> dict[str, Any]:
        """That of the evaluation: the statistics are in the model."""
        return self._inner.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Restores it."""
        self._inner.load_state_dict(state)
