"""The three built-in tasks: classification, regression and next-token prediction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_train.config import ModelConfig
from hvd_train.data.format import SampleSpec, is_class_dtype
from hvd_train.data.labels import IGNORED, Unclassed, misfit
from hvd_train.data.remarks import Targets
from hvd_train.environment import machine
from hvd_train.errors import TaskError
from hvd_train.tasks.base import Batch, Sums, Task
from hvd_train.tasks.counting import Counting
from hvd_train.tasks.models import build_model, build_sequence_model

if TYPE_CHECKING:
    from torchmetrics import Metric


@final
class Classification(Task):
    """Integer or boolean targets, one class a sample; the model gives one logit a class. Samples with the
    target -100 have no class: they count neither in the loss nor as samples.

    Loss: cross entropy. With class weights w the loss of sample i is w[c_i] times its cross entropy, and the
    mean divides by the number of samples n, not by the sum of their weights: the divisor does not depend on
    what a batch happens to hold, so weighted batches and ranks still add up to the exact mean. Weights
    that average 1 over the samples keep the scale of the gradient, and with it the meaning of `optim.lr`. The
    weights of samples, `data.weights`, multiply the loss in the same way.
    Metric: `error`, the share of samples whose largest logit is not that of their class, each with the weight
    of the sample; and those of the `groups` in `tasks.metric_names`, without weights.
    Predictions: `class`, int64 [B], and the `probability` of each class, float32 [B, classes].
    """

    def __init__(
        self, model: ModelConfig, class_weights: Sequence[float] = (), groups: Sequence[str] = ()
    ) -> None:
        self._model = model
        self._groups = groups
        self._metrics: Mapping[str, Metric] = {}
        self._weights = torch.tensor(class_weights, dtype=torch.float64) if class_weights else None

    def build_model(self, spec: SampleSpec) -> nn.Module:
        """Raises `TaskError` for targets that are not one integer a sample, or a wrong number of weights."""
        unfit = misfit(spec.targets, spec.fields[spec.targets])
        if unfit:
            raise TaskError(f"task classification: {unfit}")
        num_classes = _num_classes(spec, "classification", self._model)
        if self._weights is not None and len(self._weights) != num_classes:
            raise TaskError(
                f"class_weights has {len(self._weights)} values; expected {num_classes}, one for each class. "
                f"The classes are 0 to {num_classes - 1}."
            )
        self._spec = spec
        self._counting = Counting(spec)
        self._num_classes = num_classes
        return build_model(self._model, spec, num_classes)

    def build_metrics(self, num_samples: int) -> Mapping[str, Metric]:
        if self._groups:
            from hvd_train.tasks.metrics import for_classes

            every = for_classes(self._num_classes, num_samples)
            self._metrics = {group: every[group] for group in self._groups if group in every}
        return self._metrics

    def sample_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = _at_least_float32(model(batch[self._spec.inputs]))
        targets = self._counting.classes(batch).reshape(-1)
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        return losses.masked_fill(targets == IGNORED, torch.nan)

    def _forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        logits = _at_least_float32(model(batch[self._spec.inputs]))
        return _that_count(logits, self._counting.classes(batch).reshape(-1), self._counting.weights(batch))

    def _mean(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        if not len(targets):
            return logits.sum()  # 0, with a gradient
        if self._weights is not None:
            self._weights = self._weights.to(logits)
        if weights is not None:
            losses = F.cross_entropy(logits, targets, self._weights, reduction="none")
            return (losses * weights.to(losses)).sum() / len(targets)
        if self._weights is None:
            return F.cross_entropy(logits, targets)
        return F.cross_entropy(logits, targets, self._weights, reduction="sum") / len(targets)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        logits, targets, weights = self._forward(model, batch)
        return self._mean(logits, targets, weights), len(targets)

    def metrics(self, model: nn.Module, batch: Batch) -> Sums:
        return _wrong(*self._forward(model, batch))

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        logits, targets, weights = self._forward(model, batch)
        for metric in self._metrics.values() if len(targets) else ():
            metric.update(logits, targets)
        return _loss(self._mean(logits, targets, weights), len(targets)) | _wrong(logits, targets, weights)

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = model(batch[self._spec.inputs]).float()
        return {"class": logits.argmax(dim=1), "probability": logits.softmax(dim=1)}


@final
class Regression(Task):
    """Targets of any shape and numeric dtype; the model gives one number for each of their components.

    Loss: the squared error, averaged over the components of a sample that count and over the samples, each
    multiplied by its weight (`data.weights`, `data.mask`). A sample of which nothing counts is none.
    Metrics: `error`, the same figure, and `mae`, the mean absolute error likewise; and those of the
    `groups` in `tasks.metric_names`.
    Predictions: `outputs`, in the shape of the targets.
    """

    def __init__(self, model: ModelConfig, groups: Sequence[str] = ()) -> None:
        self._model = model
        self._groups = groups
        self._metrics: Mapping[str, Metric] = {}

    def build_model(self, spec: SampleSpec) -> nn.Module:
        """Raises `TaskError` for targets without a component."""
        shape = torch.Size(spec.fields[spec.targets].shape)
        if shape.numel() == 0:
            raise TaskError(
                f"task regression: `{spec.targets}` has the shape {list(shape)} a sample; expected one "
                "number or more. Name another dataset in data.targets."
            )
        self._spec = spec
        self._counting = Counting(spec)
        self._num_outputs = shape.numel()
        return build_model(self._model, spec, shape.numel())

    def build_metrics(self, num_samples: int) -> Mapping[str, Metric]:
        if self._groups:
            from hvd_train.tasks.metrics import RegressionErrors

            self._metrics = {"errors": RegressionErrors(self._num_outputs)}
        return self._metrics

    def sample_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs, targets, counts = self._forward(model, batch)
        losses = _of_samples(F.mse_loss(outputs, targets, reduction="none"), counts)
        return losses if counts is None else losses.masked_fill(~counts.flatten(1).any(dim=1), torch.nan)

    def _forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Outputs, targets, and which of them count, [B, ...]; None if all do."""
        outputs = _at_least_float32(model(batch[self._spec.inputs]))
        targets = batch[self._spec.targets].reshape(outputs.shape).to(outputs.dtype)
        if self._counting.is_plain:
            return outputs, targets, None
        counts = self._counting.counts(batch).reshape(outputs.shape)
        # What does not count may be no number: with the output as its target it has no loss and no gradient.
        return outputs, torch.where(counts, targets, outputs.detach()), counts

    def _errors(
        self, outputs: Tensor, targets: Tensor, counts: Tensor | None, weights: Tensor | None
    ) -> Sums:
        if counts is None:
            n = len(targets)
            mse, mae = F.mse_loss(outputs, targets).item(), F.l1_loss(outputs, targets).item()
            return {"error": (mse * n, float(n)), "mae": (mae * n, float(n))}
        has = counts.flatten(1).any(dim=1)
        share = has.to(outputs) if weights is None else torch.where(has, weights, 0).to(outputs)
        squared, absolute = (
            _of_samples(error(outputs, targets, reduction="none"), counts)[has] * share[has]
            for error in (F.mse_loss, F.l1_loss)
        )
        total = share.sum().item()
        return {"error": (squared.sum().item(), total), "mae": (absolute.sum().item(), total)}

    def _mean(
        self, outputs: Tensor, targets: Tensor, counts: Tensor | None, weights: Tensor | None
    ) -> tuple[Tensor, int]:
        if counts is None:
            return F.mse_loss(outputs, targets), len(targets)
        has = counts.flatten(1).any(dim=1)
        losses, n = _of_samples(F.mse_loss(outputs, targets, reduction="none"), counts)[has], int(has.sum())
        if weights is not None:
            losses = losses * weights[has].to(losses)
        return (losses.sum() / n if n else outputs.sum() * 0), n

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return self._mean(*self._forward(model, batch), self._counting.weights(batch))

    def metrics(self, model: nn.Module, batch: Batch) -> Sums:
        return self._errors(*self._forward(model, batch), self._counting.weights(batch))

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        outputs, targets, counts = self._forward(model, batch)
        for metric in self._metrics.values():
            metric.update(
                outputs.flatten(1), targets.flatten(1), None if counts is None else counts.flatten(1)
            )
        weights = self._counting.weights(batch)
        sums = self._errors(outputs, targets, counts, weights)
        return _loss(*self._mean(outputs, targets, counts, weights)) | sums

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        outputs = _at_least_float32(model(batch[self._spec.inputs]))
        return {"outputs": outputs.reshape(-1, *self._spec.fields[self._spec.targets].shape)}


@final
class NextToken(Task):
    """Sequences of integer tokens, shape [T] a sample; the model gives one logit for each token of the
    vocabulary at each position.

    Where `data.targets` names the same dataset as `data.inputs`, the model sees all tokens but the last and
    predicts at each position the one that follows: T - 1 predictions a sample. Where it names another dataset
    of the same shape, that holds the following tokens already, and there are T predictions.

    Loss: cross entropy in nats, averaged over positions and samples; exp(loss) is the perplexity. In a
    dataset of targets, -100 marks positions that do not count: the loss of a sample is the mean over its
    others, and a sample without any other does not count. So does `data.mask`; the weights of samples,
    `data.weights`, multiply their losses.
    Metric: `error`, the share of positions that count whose most probable token is not the right one; and
    `perplexity`, if `groups` has it.
    Predictions, of a sequence in `data.inputs`: `token`, int64 [B], the most probable one after its last
    token, and `log_likelihood`, float64 [B], of all its tokens but the first, in nats, each given those
    before it. Of a row that is padded, its own tokens count.
    """

    def __init__(self, model: ModelConfig, groups: Sequence[str] = ()) -> None:
        self._model = model
        self._groups = groups
        self._metrics: Mapping[str, Metric] = {}

    def build_model(self, spec: SampleSpec) -> nn.Module:
        """Raises `TaskError` for samples that are not sequences of integers with something to predict."""
        vocabulary = _num_classes(spec, "next-token", self._model)
        inputs, targets = spec.fields[spec.inputs], spec.fields[spec.targets]
        self._shift = spec.inputs == spec.targets
        shortest = 2 if self._shift else 1
        if len(inputs.shape) != 1 or inputs.shape[0] < shortest or inputs.shape != targets.shape:
            raise TaskError(
                f"task next-token: a sample has `{spec.inputs}` of shape {list(inputs.shape)} and "
                f"`{spec.targets}` of shape {list(targets.shape)}; expected sequences [T] of one length T >= "
                f"{shortest}. Cut the text into sequences of equal length."
            )
        if not is_class_dtype(inputs.dtype):
            raise TaskError(
                f"task next-token: `{spec.inputs}` is of type {inputs.dtype}; expected integer tokens. "
                "Write the tokens as integers, or name another dataset in data.inputs."
            )
        self._spec = spec
        self._counting = Counting(spec)
        return build_sequence_model(self._model, vocabulary)

    def build_metrics(self, num_samples: int) -> Mapping[str, Metric]:
        if self._groups:
            from hvd_train.tasks.metrics import Perplexity

            self._metrics = {"perplexity": Perplexity()}
        return self._metrics

    def sample_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        losses, counts = self._losses(*self._forward(model, batch))
        return losses.sum(dim=1) / counts.sum(dim=1)  # 0 / 0 where nothing counts

    def _forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        seen, following = batch[self._spec.inputs], self._counting.classes(batch)
        if self._shift:
            seen, following = seen[:, :-1], following[:, 1:]
        return _at_least_float32(model(seen)), following

    def _mean(self, logits: Tensor, following: Tensor, weights: Tensor | None) -> tuple[Tensor, int]:
        counts = following != IGNORED
        if counts.all() and weights is None:
            return F.cross_entropy(logits.flatten(0, 1), following.reshape(-1)), len(following)
        losses, _ = self._losses(logits, following)
        n = int(counts.any(dim=1).sum())
        of_samples = losses.sum(dim=1) / counts.sum(dim=1).clamp(min=1)
        if weights is not None:
            of_samples = of_samples * weights.to(of_samples)
        return of_samples.sum() / max(1, n), n

    def _losses(self, logits: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """The cross entropy of each token, [B, T], 0 where it does not count; and where it counts."""
        losses = F.cross_entropy(logits.transpose(1, 2), following, ignore_index=IGNORED, reduction="none")
        return losses, following != IGNORED

    def _wrong(self, logits: Tensor, following: Tensor, weights: Tensor | None) -> Sums:
        of_tokens = None if weights is None else weights.repeat_interleave(following.shape[1])
        return _wrong(*_that_count(logits.flatten(0, 1), following.flatten(), of_tokens))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return self._mean(*self._forward(model, batch), self._counting.weights(batch))

    def metrics(self, model: nn.Module, batch: Batch) -> Sums:
        return self._wrong(*self._forward(model, batch), self._counting.weights(batch))

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        logits, following = self._forward(model, batch)
        if self._metrics:
            losses, counts = self._losses(logits, following)
            self._metrics["perplexity"].update(losses[counts])
        weights = self._counting.weights(batch)
        return _loss(*self._mean(logits, following, weights)) | self._wrong(logits, following, weights)

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        tokens = batch[self._spec.inputs]
        logits = _at_least_float32(model(tokens))
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:].long(), reduction="none")
        last = logits[:, -1]
        if mask := self._spec.mask_of(self._spec.inputs):
            losses = losses * batch[mask][:, 1:]
            ends = batch[mask].sum(dim=1).clamp(min=1) - 1
            last = logits[torch.arange(len(logits), device=logits.device), ends]
        return {"token": last.argmax(dim=1), "log_likelihood": -losses.sum(dim=1, dtype=torch.float64)}


def _num_classes(spec: SampleSpec, task: str, model: ModelConfig) -> int:
    """Raises `DataError` for values that cannot be class numbers, `TaskError` for another type or so many
    classes that their layer does not fit into the memory."""
    dtype, num_classes = spec.fields[spec.targets].dtype, spec.num_classes
    if num_classes is None or not is_class_dtype(dtype):
        raise TaskError(
            f"task {task}: `{spec.targets}` is of type {dtype}; expected integers from 0 on. "
            "Name another dataset in data.targets, or take `regression`."
        )
    width = model.hidden[-1] if model.hidden else 1
    needed, free = 4 * width * num_classes, machine.available_memory()
    if needed > free:
        raise TaskError(
            f"task {task}: `{spec.targets}` has {num_classes:,} classes, and the last layer for them takes "
            f"{needed >> 20:,} MiB, but {free >> 20:,} MiB are free. Expected a model that fits: number the "
            "classes without gaps, or lower the last of model.hidden."
        )
    return num_classes


def _that_count(
    logits: Tensor, targets: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows of `logits` [n, classes], `targets` [n] and `weights` [n] that are not ignored."""
    counts = targets != IGNORED
    if counts.all():
        return logits, targets, weights
    return logits[counts], targets[counts], None if weights is None else weights[counts]


def _of_samples(errors: Tensor, counts: Tensor | None) -> Tensor:
    """The mean of the errors [B, ...] of each sample that count, which are the only ones that are not 0."""
    if counts is None:
        return errors.flatten(1).mean(dim=1)
    # A division by 0 would also make the gradient of the others no number.
    return errors.flatten(1).sum(dim=1) / counts.flatten(1).sum(dim=1).clamp(min=1)


def _at_least_float32(outputs: Tensor) -> Tensor:
    """Loss and metrics are summed in float32 or better, also after a model under bf16 autocast."""
    return outputs if outputs.dtype in (torch.float32, torch.float64) else outputs.float()


def _loss(mean: Tensor, n: int) -> Sums:
    return {"loss": (mean.item() * n, float(n))}


def _wrong(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Sums:
    wrong = logits.argmax(dim=1) != targets
    if weights is not None:
        return {"error": (weights[wrong].sum().item(), weights.sum().item())}
    return {"error": (float(wrong.sum().item()), float(len(targets)))}


def is_built_in(task: Task) -> bool:
    """Whether it is a task of this module, whose models can be built on the meta device, without memory."""
    return isinstance(task, (Classification, Regression, NextToken))


def takes_tokens(task: Task) -> bool:
    """Whether the inputs of `task` are numbered as its targets are."""
    return isinstance(task, NextToken)


def targets_of(task: Task, sample: SampleSpec) -> Targets:
    """What `task` takes its targets as. One integer a sample is taken for a class number where a task that is
    not built in decides, unless the values of all samples cannot be such numbers."""
    if isinstance(task, (Regression, NextToken)):
        return "tokens" if takes_tokens(task) else "quantities"
    field = sample.fields[sample.targets]
    one_integer = is_class_dtype(field.dtype) and math.prod(field.shape) == 1
    return "classes" if one_integer and not isinstance(sample, Unclassed) else "unknown"
