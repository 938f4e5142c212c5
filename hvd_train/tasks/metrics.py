"""The metrics of the built-in tasks, as torchmetrics' objects with states that do not depend on the order of
the batches: counts, and sums in float64."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassStatScores

EXACT_VALUES = 1 << 24
"""Probabilities of all samples and classes up to which the areas under the ROC curves are exact: 64 MiB."""
MOST_CLASSES = 1000
"""Up to here there is a confusion matrix, and there are ROC curves."""
_BINS = 4096
_LARGEST_LOG_ODDS = 20.0
_CURVE_POINTS = 200
_CONFIDENCE_BINS = 15

Values = dict[str, Any]


def for_classes(num_classes: int, num_samples: int) -> dict[str, Metric]:
    """The metrics of a classification, by group; each is updated with logits [n, classes] and targets [n]."""
    groups: dict[str, Metric] = {
        "counts": ClassCounts(num_classes=num_classes, average=None, validate_args=False),
        "calibration": Calibration(),
    }
    if num_classes <= MOST_CLASSES:
        groups["confusion"] = MulticlassConfusionMatrix(num_classes, validate_args=False)
        exact = not is_binned(num_classes, num_samples)
        groups["roc"] = ExactRoc(num_classes) if exact else BinnedRoc(num_classes)
    return groups


def is_binned(num_classes: int, num_samples: int) -> bool:
    """Whether the areas under the ROC curves are from counts in bins, as there are too many samples."""
    return num_classes * num_samples > EXACT_VALUES


@final
class ClassCounts(MulticlassStatScores):
    """Accuracy; precision, recall, F1 and support of each class, and the means over the classes. What has no
    sample to be divided by is not a number, and so is a mean over it."""

    def compute(self) -> Values:  # type: ignore[override]
        """Vectors [classes] and numbers, float64."""
        tp, fp, _, fn = (count.double() for count in self._final_state())
        precision, recall, f1 = tp / (tp + fp), tp / (tp + fn), 2 * tp / (2 * tp + fp + fn)
        return {
            "accuracy": tp.sum() / (tp + fn).sum(),
            "precision": precision.mean(),
            "recall": recall.mean(),
            "f1": f1.mean(),
            "precision_by_class": precision,
            "recall_by_class": recall,
            "f1_by_class": f1,
            "support_by_class": tp + fn,
        }


@final
class Calibration(Metric):
    """The expected calibration error (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017): the
    mean distance of the confidence from the accuracy, over 15 bins of the confidence of equal width."""

    full_state_update = False
    count: Tensor
    confidence: Tensor
    correct: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "confidence", "correct"):
            self.add_state(name, torch.zeros(_CONFIDENCE_BINS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        confidence, predicted = logits.softmax(dim=1).double().max(dim=1)
        bins = (confidence * _CONFIDENCE_BINS).ceil().long().clamp(1, _CONFIDENCE_BINS) - 1
        right = (predicted == targets).double()
        for state, values in (
            (self.count, torch.ones_like(right)),
            (self.confidence, confidence),
            (self.correct, right),
        ):
            state += torch.bincount(bins, values, minlength=_CONFIDENCE_BINS)

    def compute(self) -> Values:
        """`reliability` has a row for each bin: samples, mean confidence, accuracy."""
        gap = (self.confidence - self.correct).abs().sum() / self.count.sum()
        rows = [self.count, self.confidence / self.count, self.correct / self.count]
        return {"calibration_error": gap, "reliability": torch.stack(rows, dim=1).nan_to_num(0.0)}


class _Roc(Metric):
    """The ROC curve of each class against the rest, and the area under it: the probability that a sample of
    the class gets a larger probability of it than one of another class, ties counting one half (Hanley and
    McNeil, Radiology 143, 1982). Not a number for a class without samples, or with all of them."""

    full_state_update = False

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def compute(self) -> Values:
        """`roc_curves` has two lists for each class: false and true positive rates of at most 201 points."""
        curves = [self.counts_of(c) for c in range(self.num_classes)]
        areas = torch.tensor([_area(*counts) for counts in curves], dtype=torch.float64)
        return {
            "roc_auc": areas.mean(),
            "roc_auc_by_class": areas,
            "roc_curves": [_curve(*counts) for counts in curves],
        }

    @abstractmethod
    def counts_of(self, c: int) -> tuple[np.ndarray, np.ndarray]:
        """For each distinct probability of class `c`, ascending: samples of the class, and of the others."""


@final
class ExactRoc(_Roc):
    """Keeps the probabilities of all samples, float32."""

    scores: list[Tensor]
    targets: list[Tensor]

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        self.scores.append(logits.softmax(dim=1).float())
        self.targets.append(targets)

    def counts_of(self, c: int) -> tuple[np.ndarray, np.ndarray]:
        scores = torch.cat([block[:, c] for block in self.scores]).numpy()
        is_c = torch.cat(self.targets).numpy() == c
        distinct, place = np.unique(scores, return_inverse=True)
        every = np.bincount(place, minlength=len(distinct))
        own = np.bincount(place[is_c], minlength=len(distinct))
        return own, every - own


@final
class BinnedRoc(_Roc):
    """Counts the samples in 4,096 bins of the log-odds of each class: two samples are told apart whose
    log-odds differ by more than 0.01."""

    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        empty = torch.zeros(2, num_classes, _BINS, dtype=torch.int64)
        self.add_state("counts", empty, dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        scores = torch.logit(logits.softmax(dim=1).double())
        scaled = (scores / _LARGEST_LOG_ODDS + 1) * (_BINS / 2)
        bins = scaled.clamp(0, _BINS - 1).long()  # [n, classes]
        own = torch.nn.functional.one_hot(targets, self.num_classes)
        for c in range(self.num_classes):
            for i in (0, 1):
                found = bins[own[:, c] == 1 - i, c]
                self.counts[i, c] += torch.bincount(found, minlength=_BINS)

    def counts_of(self, c: int) -> tuple[np.ndarray, np.ndarray]:
        own, rest = self.counts[:, c].numpy()
        return own, rest


@final
class RegressionErrors(Metric):
    """Mean squared error, its root, mean absolute error and R2 of each component of the targets, and means
    over the components. R2 of a component that is constant is not a number.

    The mean and the sum of squares of the targets are kept for each rank, and joined as Chan, Golub and
    LeVeque ("Updating Formulae and a Pairwise Algorithm", 1979) do: without their formula, targets far from 0
    lose their digits.
    """

    full_state_update = False
    samples: Tensor
    squared: Tensor
    absolute: Tensor
    moments: Tensor

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        zeros = torch.zeros(num_outputs, dtype=torch.float64)
        self.add_state("samples", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("squared", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("absolute", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("moments", torch.stack([zeros, zeros, zeros]), dist_reduce_fx=None)

    def update(self, outputs: Tensor, targets: Tensor, counts: Tensor | None = None) -> None:
        """All [n, outputs]; `counts`: which of the targets count, all without it."""
        outputs, targets = outputs.double(), targets.double()
        used = torch.ones_like(targets) if counts is None else counts.double()
        difference = (outputs - targets) * used
        samples = used.sum(dim=0)
        self.samples += samples
        self.squared += difference.square().sum(dim=0)
        self.absolute += difference.abs().sum(dim=0)
        mean = (targets * used).sum(dim=0) / samples.clamp(min=1)
        spread = ((targets - mean) * used).square().sum(dim=0)
        self.moments = _joined(self.moments, torch.stack([samples, mean, spread]))

    def compute(self) -> Values:
        """Vectors [outputs] and numbers, float64."""
        moments = self.moments
        if moments.ndim == 3:  # of several ranks
            total = moments[0]
            for other in moments[1:]:
                total = _joined(total, other)
            moments = total
        mse, mae = self.squared / self.samples, self.absolute / self.samples
        spread = moments[2]
        r2 = torch.where(spread > 0, 1 - self.squared / spread, torch.nan)
        return {
            "mse": mse.mean(),
            "rmse": mse.sqrt().mean(),
            "r2": r2.mean(),
            "mse_by_output": mse,
            "rmse_by_output": mse.sqrt(),
            "mae_by_output": mae,
            "r2_by_output": r2,
        }


@final
class Perplexity(Metric):
    """exp of the mean cross entropy over all tokens that count; of sequences with different numbers of them
    it is not exp(loss), which is a mean over sequences."""

    full_state_update = False
    nats: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: Tensor) -> None:
        """The cross entropies of the tokens that count, [n]."""
        self.nats += losses.double().sum()
        self.tokens += losses.numel()

    def compute(self) -> Values:
        """One number."""
        return {"perplexity": (self.nats / self.tokens).exp()}


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """Number, mean and sum of squared distances from the mean, [3, outputs], of two sets together."""
    n = a[0] + b[0]
    difference = b[1] - a[1]
    share = b[0] / n.clamp(min=1)
    return torch.stack([n, a[1] + difference * share, a[2] + b[2] + difference.square() * a[0] * share])


def _area(own: np.ndarray, rest: np.ndarray) -> float:
    """Of samples of a class and of others at ascending scores."""
    pairs = float(own.sum()) * float(rest.sum())
    if not pairs:
        return float("nan")
    below = np.cumsum(rest) - rest
    return float((own * (below + rest / 2)).sum() / pairs)


def _curve(own: np.ndarray, rest: np.ndarray) -> list[list[float]]:
    """False and true positive rates from (0, 0) to (1, 1); empty where one of them is not defined."""
    if not own.sum() or not rest.sum():
        return [[], []]
    rates = [np.concatenate([[0.0], np.cumsum(c[::-1]) / c.sum()]) for c in (rest, own)]
    length = len(rates[0])
    shown = np.unique(np.linspace(0, length - 1, min(length, _CURVE_POINTS + 1)).round().astype(int))
    return [rate[shown].tolist() for rate in rates]
