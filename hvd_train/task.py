"""What is trained: the `Task` that a user brings, and the three that are built in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_train.config import ModelConfig
from hvd_train.data.format import SampleSpec
from hvd_train.errors import TaskError
from hvd_train.models import build_model, build_sequence_model

Batch = dict[str, Tensor]
"""One tensor for each dataset of a sample, by name; samples along the first axis."""

Sums = dict[str, tuple[float, float]]
"""By name a sum and what it is divided by. Sums of several batches and ranks add up to the exact mean."""


class Task(ABC):
    """What to train: a model, its loss, and the figures to look at.

    One's own task derives from this class and is named by `--task mytask.py:MyTask` or
    `--task package.module:MyTask`. It is constructed without arguments, once on every rank. No method
    may communicate; every rank calls them on batches of its own, and not equally often.
    """

    @abstractmethod
    def build_model(self, spec: SampleSpec) -> nn.Module:
        """A new model for samples of this shape, on the CPU and in training mode.

        Draw random numbers from torch's global generator only: it is seeded before the call. Is called
        before every other method, also when a finished model is loaded.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """The mean loss over the samples of `batch` as a scalar tensor with a gradient, and their number n.

        The mean must be the sum over samples divided by n: then accumulated batches, and ranks with
        different numbers of samples, are weighted by n and give the exact mean of all.
        """

    def metrics(self, model: nn.Module, batch: Batch) -> Sums:
        """Further figures of an evaluation batch: name -> (sum, count). Default: none.

        The figure reported is the sum of sums over all batches and ranks divided by the sum of counts.
        The watch follows the one that `evaluate.metric` names, by default `error`.
        """
        return {}

    def transform(self, batch: Batch) -> Batch:
        """The batch as `loss`, `metrics` and `evaluate` get it; called once for each batch, before the
        model. Default: as it was read. Integers arrive with the dtype that they have in the shard."""
        return batch

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        """`loss` and `metrics` of one transformed batch as sums and counts.

        Called under `torch.inference_mode()` with the model in evaluation mode. The default runs the model
        once for `loss` and once more for `metrics`; override it where one forward pass gives both.
        """
        mean, count = self.loss(model, batch)
        sums = {name: (float(total), float(n)) for name, (total, n) in self.metrics(model, batch).items()}
        return {"loss": (mean.item() * count, float(count)), **sums}


@final
class Classification(Task):
    """Integer targets, one class a sample; the model gives one logit a class.

    Loss: cross entropy. With class weights w the loss of sample i is w[c_i] times its cross entropy, and the
    mean divides by the number of samples n, not by the sum of their weights: the divisor does not depend on
    what a batch happens to hold, so weighted batches and ranks still add up to the exact mean. Weights
    that average 1 over the samples keep the scale of the gradient, and with it the meaning of `optim.lr`.
    Metric: `error`, the share of samples whose largest logit is not that of their class, unweighted.
    """

    def __init__(self, model: ModelConfig, class_weights: Sequence[float] = ()) -> None:
        self._model = model
        self._weights = torch.tensor(class_weights, dtype=torch.float64) if class_weights else None

    def build_model(self, spec: SampleSpec) -> nn.Module:
        """Raises `TaskError` for targets that are not one integer a sample, or a wrong number of weights."""
        num_classes = _num_classes(spec, "classification")
        shape = spec.fields[spec.targets].shape
        if shape not in ((), (1,)):
            raise TaskError(
                f"task classification: `{spec.targets}` has the shape {list(shape)} a sample; expected one "
                "integer a sample. Name another dataset in data.targets, or take `regression`."
            )
        if self._weights is not None and len(self._weights) != num_classes:
            raise TaskError(
                f"class_weights has {len(self._weights)} values; expected {num_classes}, one for each class. "
                f"The classes are 0 to {num_classes - 1}."
            )
        self._spec = spec
        return build_model(self._model, spec, num_classes)

    def _forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = _at_least_float32(model(batch[self._spec.inputs]))
        return logits, batch[self._spec.targets].reshape(-1).long()

    def _mean(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self._weights is None:
            return F.cross_entropy(logits, targets)
        self._weights = self._weights.to(logits)
        return F.cross_entropy(logits, targets, self._weights, reduction="sum") / len(targets)

    def _metrics(self, logits: Tensor, targets: Tensor) -> Sums:
        wrong = (logits.argmax(dim=1) != targets).sum().item()
        return {"error": (float(wrong), float(len(targets)))}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        logits, targets = self._forward(model, batch)
        return self._mean(logits, targets), len(targets)

    def metrics(self, model: nn.Module, batch: Batch) -> Sums:
        return self._metrics(*self._forward(model, batch))

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        logits, targets = self._forward(model, batch)
        return _loss_sum(self._mean(logits, targets), len(targets)) | self._metrics(logits, targets)


@final
class Regression(Task):
    """Targets of any shape and numeric dtype; the model gives one number for each of their components.

    Loss: the squared error, averaged over the components of a sample and over the samples.
    Metrics: `error`, the same figure, and `mae`, the mean absolute error likewise.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._model = model

    def build_model(self, spec: SampleSpec) -> nn.Module:
        """Raises `TaskError` for targets without a component."""
        shape = torch.Size(spec.fields[spec.targets].shape)
        if shape.numel() == 0:
            raise TaskError(
                f"task regression: `{spec.targets}` has the shape {list(shape)} a sample; expected at least one "
                "number a sample. Name another dataset in data.targets."
            )
        self._spec = spec
        return build_model(self._model, spec, shape.numel())

    def _forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs = _at_least_float32(model(batch[self._spec.inputs]))
        return outputs, batch[self._spec.targets].reshape(outputs.shape).to(outputs.dtype)

    def _metrics(self, outputs: Tensor, targets: Tensor) -> Sums:
        n = len(targets)
        mse, mae = F.mse_loss(outputs, targets).item(), F.l1_loss(outputs, targets).item()
        return {"error": (mse * n, float(n)), "mae": (mae * n, float(n))}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        outputs, targets = self._forward(model, batch)
        return F.mse_loss(outputs, targets), len(targets)

    def metrics(self, model: nn.Module, batch: Batch) -> Sums:
        return self._metrics(*self._forward(model, batch))

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        sums = self._metrics(*self._forward(model, batch))
        return {"loss": sums["error"], **sums}


@final
class NextToken(Task):
    """Sequences of integer tokens, shape [T] a sample; the model gives one logit for each token of the
    vocabulary at each position.

    Where `data.targets` names the same dataset as `data.inputs`, the model sees all tokens but the last and
    predicts at each position the one that follows: T - 1 predictions a sample. Where it names another dataset
    of the same shape, that holds the following tokens already, and there are T predictions.

    Loss: cross entropy in nats, averaged over positions and samples; exp(loss) is the perplexity.
    Metric: `error`, the share of positions whose most probable token is not the right one.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._model = model

    def build_model(self, spec: SampleSpec) -> nn.Module:
        """Raises `TaskError` for samples that are not sequences of integers with something to predict."""
        vocabulary = _num_classes(spec, "next-token")
        inputs, targets = spec.fields[spec.inputs], spec.fields[spec.targets]
        self._shift = spec.inputs == spec.targets
        shortest = 2 if self._shift else 1
        if len(inputs.shape) != 1 or inputs.shape[0] < shortest or inputs.shape != targets.shape:
            raise TaskError(
                f"task next-token: a sample has `{spec.inputs}` of shape {list(inputs.shape)} and `{spec.targets}` of "
                f"shape {list(targets.shape)}; expected sequences [T] of one length T >= {shortest}. Cut the text "
                "into sequences of equal length."
            )
        if not _is_integer(inputs.dtype):
            raise TaskError(
                f"task next-token: `{spec.inputs}` is of type {inputs.dtype}; expected integer tokens. "
                "Write the tokens as integers, or name another dataset in data.inputs."
            )
        self._spec, self._vocabulary = spec, vocabulary
        return build_sequence_model(self._model, vocabulary)

    def transform(self, batch: Batch) -> Batch:
        """Raises `TaskError` for an input token outside the vocabulary, which the targets define."""
        tokens = batch[self._spec.inputs]
        if not self._shift and tokens.numel() and int(tokens.max()) >= self._vocabulary:
            raise TaskError(
                f"`{self._spec.inputs}` holds the token {int(tokens.max())}; expected tokens below {self._vocabulary}, "
                f"which is the largest of `{self._spec.targets}` plus one. Give such tokens smaller numbers."
            )
        return batch

    def _forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, int]:
        seen, following = batch[self._spec.inputs], batch[self._spec.targets]
        if self._shift:
            seen, following = seen[:, :-1], following[:, 1:]
        logits = _at_least_float32(model(seen))
        return logits.flatten(0, 1), following.reshape(-1).long(), len(seen)

    def _metrics(self, logits: Tensor, following: Tensor) -> Sums:
        wrong = (logits.argmax(dim=1) != following).sum().item()
        return {"error": (float(wrong), float(len(following)))}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        logits, following, n = self._forward(model, batch)
        return F.cross_entropy(logits, following), n

    def metrics(self, model: nn.Module, batch: Batch) -> Sums:
        logits, following, _ = self._forward(model, batch)
        return self._metrics(logits, following)

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        logits, following, n = self._forward(model, batch)
        return _loss_sum(F.cross_entropy(logits, following), n) | self._metrics(logits, following)


def _is_integer(dtype: str) -> bool:
    return dtype.startswith(("int", "uint"))


def _num_classes(spec: SampleSpec, task: str) -> int:
    dtype = spec.fields[spec.targets].dtype
    if spec.num_classes is None or not _is_integer(dtype):
        raise TaskError(
            f"task {task}: `{spec.targets}` is of type {dtype}; expected integers from 0 on. "
            "Name another dataset in data.targets, or take `regression`."
        )
    return spec.num_classes


def _at_least_float32(outputs: Tensor) -> Tensor:
    """Loss and metrics are summed in float32 or better, also behind a model under bf16 autocast."""
    return outputs if outputs.dtype in (torch.float32, torch.float64) else outputs.float()


def _loss_sum(mean: Tensor, n: int) -> Sums:
    return {"loss": (mean.item() * n, float(n))}
