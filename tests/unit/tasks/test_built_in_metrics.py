"""The metrics of the built-in tasks are those of scikit-learn; what is not defined is not a number."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import Tensor

from hvd_train.algorithm.metric_states import MetricStates
from hvd_train.errors import TaskError
from hvd_train.tasks import metrics
from hvd_train.tasks.metric_names import GROUPS, PROVIDED, groups_for
from tests.threads import ThreadCommunicator, on_ranks

CLASSES = 6


def samples(n: int = 500, absent: int | None = None) -> tuple[Tensor, Tensor]:
    """Logits, some of them equal, and targets that they know something of."""
    generator = torch.Generator().manual_seed(n)
    targets = torch.randint(CLASSES, (n,), generator=generator)
    if absent is not None:
        targets[targets == absent] = (absent + 1) % CLASSES
    logits = torch.randn(n, CLASSES, generator=generator).mul(4).round() / 4
    logits[torch.arange(n), targets] += 0.5
    return logits, targets


def values_of(built: Any, *columns: Tensor, ranks: int = 1, size: int = 33) -> dict[str, Any]:
    def work(comm: ThreadCommunicator) -> dict[str, Any]:
        objects = built()
        states = MetricStates(comm, objects)
        parts = list(zip(*(column.split(size) for column in columns), strict=True))
        for part in parts[comm.rank :: comm.size]:
            for metric in objects.values():
                metric.update(*part)
        return states.compute()

    results = on_ranks(ranks, work)
    assert all(values == results[0] for values in results) or any_nan(results[0])
    return results[0]


def any_nan(values: dict[str, Any]) -> bool:
    return bool(np.isnan([v for v in values.values() if isinstance(v, float)]).any())


def of_classes(n: int) -> Any:
    return lambda: metrics.for_classes(CLASSES, n)


@pytest.mark.parametrize("ranks", [1, 3])
def test_classification_equals_scikit_learn(ranks: int) -> None:
    logits, targets = samples()
    found = values_of(of_classes(len(targets)), logits, targets, ranks=ranks)
    predicted, probabilities = logits.argmax(1).numpy(), logits.softmax(1).numpy()
    truth = targets.numpy()
    precision, recall, f1, support = sk.precision_recall_fscore_support(truth, predicted)
    assert found["accuracy"] == sk.accuracy_score(truth, predicted)
    for name, expected in (("precision", precision), ("recall", recall), ("f1", f1), ("support", support)):
        assert found[f"{name}_by_class"] == pytest.approx(expected.tolist(), rel=1e-12), name
    assert found["f1"] == pytest.approx(f1.mean(), rel=1e-12)
    assert found["confusion"] == sk.confusion_matrix(truth, predicted).tolist()
    areas = sk.roc_auc_score(truth, probabilities, multi_class="ovr", average=None)
    assert found["roc_auc_by_class"] == pytest.approx(areas.tolist(), abs=1e-9)
    assert found["roc_auc"] == pytest.approx(areas.mean(), abs=1e-9)
    for c, (false, true) in enumerate(found["roc_curves"]):
        assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
        assert np.trapezoid(true, false) == pytest.approx(areas[c], abs=0.02)


def test_calibration_equals_its_definition() -> None:
    logits, targets = samples()
    found = values_of(of_classes(len(targets)), logits, targets)
    confidence, predicted = logits.softmax(1).double().max(1)
    bins = np.ceil(confidence.numpy() * 15).astype(int) - 1
    right = (predicted == targets).numpy()
    expected = 0.0
    for b in range(15):
        inside = bins == b
        assert found["reliability"][b][0] == inside.sum()
        if inside.any():
            expected += inside.mean() * abs(confidence.numpy()[inside].mean() - right[inside].mean())
    assert found["calibration_error"] == pytest.approx(expected, rel=1e-9)
    assert expected > 0.01


@pytest.mark.parametrize("ranks", [1, 4])
def test_many_samples_are_counted_in_bins(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = samples(2000)
    logits += torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    exact = values_of(of_classes(len(targets)), logits, targets)
    monkeypatch.setattr(metrics, "EXACT_VALUES", 1000)
    binned = values_of(of_classes(len(targets)), logits, targets, ranks=ranks)
    assert isinstance(of_classes(len(targets))()["roc"], metrics.BinnedRoc)
    assert binned["roc_auc_by_class"] == pytest.approx(exact["roc_auc_by_class"], abs=1e-3)
    assert binned["roc_auc_by_class"] != exact["roc_auc_by_class"]


def test_a_class_that_does_not_occur_has_no_value() -> None:
    logits, targets = samples(absent=2)
    found = values_of(of_classes(len(targets)), logits, targets)
    assert np.isnan(found["recall_by_class"]).tolist() == [c == 2 for c in range(CLASSES)]
    assert np.isnan(found["roc_auc_by_class"]).tolist() == [c == 2 for c in range(CLASSES)]
    assert np.isnan([found["recall"], found["roc_auc"]]).all(), "no mean without it"
    assert found["accuracy"] == sk.accuracy_score(targets.numpy(), logits.argmax(1).numpy())
    assert found["roc_curves"][2] == [[], []]


def test_logits_that_are_infinite_count_at_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "EXACT_VALUES", 0)
    logits = torch.tensor([[100.0, -100.0], [-100.0, 100.0], [0.0, 0.0], [-100.0, 100.0]])
    found = values_of(lambda: metrics.for_classes(2, 4), logits, torch.tensor([0, 1, 1, 0]))
    assert found["roc_auc_by_class"] == pytest.approx([0.625, 0.625])


@pytest.mark.parametrize("ranks", [1, 3, 5])
@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_regression_equals_scikit_learn(ranks: int, offset: float) -> None:
    """Also with targets far from 0, where a difference of large sums would lose the spread."""
    generator = torch.Generator().manual_seed(3)
    targets = torch.randn(101, 3, generator=generator, dtype=torch.float64) + offset
    outputs = targets + 0.3 * torch.randn(101, 3, generator=generator, dtype=torch.float64)
    found = values_of(lambda: {"errors": metrics.RegressionErrors(3)}, outputs, targets, ranks=ranks)
    pair = targets.numpy(), outputs.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {
            "mse": sk.mean_squared_error(*pair, multioutput="raw_values"),
            "mae": sk.mean_absolute_error(*pair, multioutput="raw_values"),
            "r2": sk.r2_score(*pair, multioutput="raw_values"),
        }
    for name, values in expected.items():
        assert found[f"{name}_by_output"] == pytest.approx(values.tolist(), rel=1e-6), name
    assert found["rmse_by_output"] == pytest.approx(np.sqrt(expected["mse"]).tolist(), rel=1e-6)
    assert found["r2"] == pytest.approx(expected["r2"].mean(), rel=1e-6)


def test_a_constant_target_has_no_r2() -> None:
    targets = torch.tensor([[1.0, 2.0], [1.0, 3.0], [1.0, 5.0]])
    found = values_of(lambda: {"errors": metrics.RegressionErrors(2)}, targets + 0.5, targets)
    assert np.isnan(found["r2_by_output"]).tolist() == [True, False]
    assert found["mse_by_output"] == [0.25, 0.25]


def test_perplexity_is_the_mean_over_tokens() -> None:
    losses = torch.rand(100) * 3
    found = values_of(lambda: {"perplexity": metrics.Perplexity()}, losses, ranks=3)
    assert found["perplexity"] == pytest.approx(float(losses.double().mean().exp()), rel=1e-12)


def test_names_are_those_that_the_metrics_give() -> None:
    logits, targets = samples(50)
    outputs = torch.rand(50, 2)
    given = {
        "classification": values_of(of_classes(50), logits, targets),
        "regression": values_of(lambda: {"errors": metrics.RegressionErrors(2)}, outputs, outputs**2),
        "next-token": values_of(lambda: {"perplexity": metrics.Perplexity()}, outputs[:, 0]),
    }
    for task, groups in GROUPS.items():
        assert {name for group in groups for name in PROVIDED[group]} == set(given[task]), task


def test_groups_are_chosen_by_the_names_of_metrics() -> None:
    assert groups_for("classification", (), "error") == ()
    assert groups_for("classification", (), "recall_by_class[3]") == ("counts",)
    assert groups_for("classification", ("roc_auc",), "f1") == ("counts", "roc")
    assert groups_for("regression", ("all",), "error") == ("errors",)
    with pytest.raises(TaskError, match=r"has no `roc-auc`; expected all, or some of .* mean `roc_auc`\?"):
        groups_for("classification", ("roc-auc",), "error")
