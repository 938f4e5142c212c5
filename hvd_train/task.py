"""What is trained: the `Task` that a user brings, and the three that are built in."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_train.config import Config, ModelConfig
from hvd_train.data.format import SampleSpec, is_class_dtype
from hvd_train.data.labels import IGNORED, misfit
from hvd_train.environment import machine
from hvd_train.errors import TaskError
from hvd_train.models import build_model, build_sequence_model
from hvd_train.values import refuse_utf16

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
        """A new model for samples of this shape, on the CPU and in training mode; modules in it that are in
        evaluation mode, such as a frozen batch norm, stay so.

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

        Called under `torch.no_grad()` with the model in evaluation mode. The default runs the model
        once for `loss` and once more for `metrics`; override it where one forward pass gives both.
        """
        mean, count = self.loss(model, batch)
        sums = {name: (float(total), float(n)) for name, (total, n) in self.metrics(model, batch).items()}
        return {"loss": (mean.item() * count, float(count)), **sums}


@final
class Classification(Task):
    """Integer or boolean targets, one class a sample; the model gives one logit a class. Samples with the
    target -100 have no class: they count neither in the loss nor as samples.

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
        return build_model(self._model, spec, num_classes)

    def _forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = _at_least_float32(model(batch[self._spec.inputs]))
        return _that_count(logits, batch[self._spec.targets].reshape(-1).long())

    def _mean(self, logits: Tensor, targets: Tensor) -> Tensor:
        if not len(targets):
            return logits.sum()  # 0, with a gradient
        if self._weights is None:
            return F.cross_entropy(logits, targets)
        self._weights = self._weights.to(logits)
        return F.cross_entropy(logits, targets, self._weights, reduction="sum") / len(targets)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        logits, targets = self._forward(model, batch)
        return self._mean(logits, targets), len(targets)

    def metrics(self, model: nn.Module, batch: Batch) -> Sums:
        return _wrong(*self._forward(model, batch))

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        logits, targets = self._forward(model, batch)
        return _loss(self._mean(logits, targets), len(targets)) | _wrong(logits, targets)


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
                f"task regression: `{spec.targets}` has the shape {list(shape)} a sample; expected one "
                "number or more. Name another dataset in data.targets."
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

    Loss: cross entropy in nats, averaged over positions and samples; exp(loss) is the perplexity. In a
    dataset of targets, -100 marks positions that do not count: the loss of a sample is the mean over its
    others, and a sample without any other is none.
    Metric: `error`, the share of positions that count whose most probable token is not the right one.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._model = model

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
        return build_sequence_model(self._model, vocabulary)

    def _forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        seen, following = batch[self._spec.inputs], batch[self._spec.targets]
        if self._shift:
            seen, following = seen[:, :-1], following[:, 1:]
        return _at_least_float32(model(seen)), following.long()

    def _mean(self, logits: Tensor, following: Tensor) -> tuple[Tensor, int]:
        counts = following != IGNORED
        if counts.all():
            return F.cross_entropy(logits.flatten(0, 1), following.reshape(-1)), len(following)
        losses = F.cross_entropy(
            logits.transpose(1, 2), following, ignore_index=IGNORED, reduction="none"
        )  # [B, T], 0 where ignored
        n = int(counts.any(dim=1).sum())
        return (losses.sum(dim=1) / counts.sum(dim=1).clamp(min=1)).sum() / max(1, n), n

    def _wrong(self, logits: Tensor, following: Tensor) -> Sums:
        return _wrong(*_that_count(logits.flatten(0, 1), following.flatten()))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return self._mean(*self._forward(model, batch))

    def metrics(self, model: nn.Module, batch: Batch) -> Sums:
        return self._wrong(*self._forward(model, batch))

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        logits, following = self._forward(model, batch)
        return _loss(*self._mean(logits, following)) | self._wrong(logits, following)


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


def _that_count(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `logits` [n, classes] and `targets` [n] that are not ignored."""
    counts = targets != IGNORED
    return (logits, targets) if counts.all() else (logits[counts], targets[counts])


def _at_least_float32(outputs: Tensor) -> Tensor:
    """Loss and metrics are summed in float32 or better, also behind a model under bf16 autocast."""
    return outputs if outputs.dtype in (torch.float32, torch.float64) else outputs.float()


def _loss(mean: Tensor, n: int) -> Sums:
    return {"loss": (mean.item() * n, float(n))}


def _wrong(logits: Tensor, targets: Tensor) -> Sums:
    wrong = (logits.argmax(dim=1) != targets).sum().item()
    return {"error": (float(wrong), float(len(targets)))}


_BUILT_IN: dict[str, Callable[[Config], Task]] = {
    "classification": lambda config: Classification(config.model, config.class_weights),
    "regression": lambda config: Regression(config.model),
    "next-token": lambda config: NextToken(config.model),
}


def is_built_in(task: Task) -> bool:
    """Whether it is one of this module, whose models torch can lay out without memory for them."""
    return isinstance(task, (Classification, Regression, NextToken))


def make_task(config: Config) -> Task:
    """The task that `config.task` names. Not collective: every rank makes its own.

    Raises `TaskError` for a name, a file, a module or a class that cannot be used.
    """
    name = config.task
    if name in _BUILT_IN:
        return _BUILT_IN[name](config)
    source, colon, class_name = name.rpartition(":")
    if not colon:
        raise TaskError(_unknown(name))
    module = _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
    return _construct(module, source, class_name)


def takes_tokens(task: Task) -> bool:
    """Whether the inputs of `task` are numbered as its targets are."""
    return isinstance(task, NextToken)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, _BUILT_IN, n=1)
    if name.endswith(".py"):
        remedy = f"Name the class as well: `{name}:MyTask`."
    else:
        remedy = f"Did you mean `{near[0]}`?" if near else "A task of one's own is named with its class."
    known = ", ".join(_BUILT_IN)
    return f"task = {name!r}: expected {known}, file.py:Class or package.module:Class. {remedy}"


def _load_file(path: Path) -> ModuleType:
    """The module in `path`, always from its source: n ranks that write bytecode beside it, or find bytecode
    of an edit made in the same second, would not agree on what they run."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, sorted(p.name for p in path.parent.glob("*.py")), n=1)
        start = f"Relative paths start at {Path.cwd()}."
        remedy = f"Did you mean `{path.with_name(near[0])}`?" if near else start
        raise TaskError(f"task: there is no file {path}; expected the Python file of the task. {remedy}")
    name = f"hvd_train_task_{path.stem}"
    loader = SourceFileLoader(name, str(path))
    spec = spec_from_file_location(name, path, loader=loader)
    assert spec is not None  # a loader was given
    module = module_from_spec(spec)
    _make_importable(path.parent)
    sys.modules[name] = module  # dataclasses and pickle look the module up by its name
    try:
        source = path.read_bytes()
        refuse_utf16(source)
        exec(loader.source_to_code(source, str(path)), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise TaskError(_cannot_load(str(path), error)) from error
    return module


def _load_module(name: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise TaskError(
                f"task: there is no module {error.name}; expected an installed package, or one in "
                f"{Path.cwd()}. Install it, or name a file: `file.py:Class`."
            ) from None
        raise TaskError(_cannot_load(name, error)) from error
    except (Exception, SystemExit) as error:
        raise TaskError(_cannot_load(name, error)) from error


def _make_importable(directory: Path) -> None:
    """Lets a task import what lies beside it; last in the search, so that it hides no installed package."""
    place = str(directory.resolve())
    if place not in sys.path:
        sys.path.append(place)


def _cannot_load(source: str, error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = [frame for frame in frames if frame.filename == source] or frames
    line = "" if isinstance(error, SyntaxError) else f" ({where[-1].filename}, line {where[-1].lineno})"
    return (
        f"task: {source} cannot be loaded: {type(error).__name__}: {error}{line}; expected a module that "
        "can be imported. Correct it, or install what it needs."
    )


def _construct(module: ModuleType, source: str, class_name: str) -> Task:
    cls = getattr(module, class_name, None)
    if cls is None:
        tasks = [name for name, value in vars(module).items() if _is_task(value) and value is not Task]
        near = difflib.get_close_matches(class_name, tasks, n=1) or tasks
        remedy = f"Did you mean `{source}:{near[0]}`?" if near else "It has none; derive one from Task."
        raise TaskError(
            f"task: {source} has no class {class_name!r}; expected one derived from hvd_train.Task. {remedy}"
        )
    if not _is_task(cls):
        raise TaskError(
            f"task: {source}:{class_name} is {cls!r}; expected a class derived from hvd_train.Task. "
            f"Write `class {class_name}(hvd_train.Task)`."
        )
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise TaskError(
            f"task: {source}:{class_name} does not define {' and '.join(missing)}; expected build_model and "
            "loss. Define what is missing."
        )
    needed = [
        p.name
        for p in inspect.signature(cls).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise TaskError(
            f"task: {source}:{class_name} needs the arguments {', '.join(needed)}; expected a class that is "
            "constructed without arguments. Give them default values."
        )
    task: Task = cls()
    return task


def _is_task(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, Task)
