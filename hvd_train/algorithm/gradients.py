"""The gradient of one local step: forward, loss and backward on this rank's batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import cast, final

import numpy as np
import torch
from torch import Tensor, nn

from hvd_train.algorithm.optimizer_state import as_real
from hvd_train.config import OptimConfig
from hvd_train.errors import TaskError
from hvd_train.run.model_state import buffers_as_they_are
from hvd_train.run.random_state import generators_as_they_are
from hvd_train.tasks.base import Batch, Task

BeforeLast = Callable[[float, int, int], None]
"""Is given the sum of the loss and the number of samples of a step, and what its gradients will be divided by
after the backward pass."""


@final
class Gradients:
    """Computes the gradient of the mean loss over some transformed batches. Never communicates.

    The model must be in training mode. Its gradients may be sparse. They are discarded at the start of the
    next call.

    Args:
        compiled_rows: batches of this many rows pass through the model compiled by torch.compile. The last
            one of an epoch may have another number, and passes through the plain model.
    """

    def __init__(
        self, model: nn.Module, task: Task, config: OptimConfig, compiled_rows: int | None = None
    ) -> None:
        self._model = model
        self._compiled_rows = compiled_rows
        # It shares all tensors with the model.
        self._compiled = model if compiled_rows is None else cast("nn.Module", torch.compile(model))
        self._task = task
        self._params = [p for p in model.parameters() if p.requires_grad]
        self._precision = (
            torch.autocast(self._params[0].device.type, torch.bfloat16)
            if config.precision == "bf16"
            else contextlib.nullcontext()
        )
        self._loss_is_checked = False

    def __call__(self, batches: Sequence[Batch], before_last: BeforeLast | None = None) -> tuple[float, int]:
        """Leaves the gradient of the mean over all samples of `batches`, which may differ in size, in `grad`
        of the parameters.

        Args:
            batches: of the step.
            before_last: called before the backward pass of the last one, if that has samples.

        Returns the sum of the loss over the samples, and their number; without a sample there is no gradient.
        Raises `TaskError` if the task's loss is not what `Task.loss` promises.
        """
        for p in self._params:
            p.grad = None
        loss_sum, num_samples = 0.0, 0
        several = len(batches) > 1
        for number, batch in enumerate(batches, 1):
            mean, n = self._loss(batch)
            if n:
                loss_sum += mean.item() * n
                num_samples += n
                if before_last is not None and number == len(batches):
                    before_last(loss_sum, num_samples, num_samples if several else 1)
                # The number of samples is known only after the last batch: sum now, divide below.
                (mean * n if several else mean).backward()  # type: ignore[no-untyped-call]
        if num_samples and several:
            for p in self._params:
                if p.grad is not None:
                    p.grad.div_(num_samples)
        return loss_sum, num_samples

    def warm_up(self, batch: Batch) -> None:
        """A forward and a backward pass on a transformed batch, in which the model is compiled. Buffers and
        generators are as before it, and there are no gradients."""
        with buffers_as_they_are(self._model), generators_as_they_are():
            mean, _ = self._loss(batch)
            mean.backward()  # type: ignore[no-untyped-call]
        for p in self._params:
            p.grad = None

    def _loss(self, batch: Batch) -> tuple[Tensor, int]:
        rows = next((len(tensor) for tensor in batch.values() if tensor.ndim), 0)
        model = self._compiled if rows == self._compiled_rows else self._model
        with self._precision:
            loss = self._task.loss(model, batch)
        if not self._loss_is_checked:
            _check_loss(loss, type(self._task).__name__)
            self._loss_is_checked = True
        return loss


@torch.no_grad()
def copy_gradients(params: Sequence[Tensor], places: Sequence[Tensor]) -> np.ndarray:
    """Copies gradients, dense and in their real types, to `places`, which have the shapes of the parameters;
    zeros where a parameter has none. Returns by parameter 1 where it has one, else 0, as float64."""
    found = [p.grad for p in params]
    filled = [place for place, gradient in zip(places, found, strict=True) if gradient is not None]
    torch._foreach_copy_(filled, [_dense(gradient) for gradient in found if gradient is not None])
    for place, gradient in zip(places, found, strict=True):
        if gradient is None:
            place.zero_()
    return np.array([gradient is not None for gradient in found], dtype=float)


def _dense(gradient: Tensor) -> Tensor:
    return as_real(gradient.to_dense() if gradient.is_sparse else gradient)


def _check_loss(loss: object, task: str) -> None:
    expected = "expected (mean loss, number of samples): a scalar tensor with a gradient and an int"
    if not (isinstance(loss, tuple) and len(loss) == 2):
        raise TaskError(f"{task}.loss returned {type(loss).__name__}; {expected}.")
    mean, n = loss
    if not isinstance(n, int) or n < 0:
        raise TaskError(
            f"{task}.loss returned {n!r} as the number of samples; {expected}. Take len of the batch."
        )
    if not (isinstance(mean, Tensor) and mean.numel() == 1 and mean.requires_grad):
        seen = f"a tensor of shape {list(mean.shape)}" if isinstance(mean, Tensor) else type(mean).__name__
        without = " without a gradient" if isinstance(mean, Tensor) and not mean.requires_grad else ""
        raise TaskError(f"{task}.loss returned {seen}{without} as the loss; {expected}. Take the mean.")
