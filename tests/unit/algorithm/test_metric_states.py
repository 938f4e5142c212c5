"""Metrics of torchmetrics: the value over several ranks is that of one process with all batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torchmetrics as tm
from torch import Tensor
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassF1Score

from hvd_train.algorithm.metric_states import MetricStates, element, scalars, undefined
from hvd_train.environment import machine
from hvd_train.errors import TaskError
from tests.threads import ThreadCommunicator, on_ranks

Built = Mapping[str, Any]
CLASSES = 5


def batch(b: int) -> tuple[Tensor, Tensor]:
    """Logits and targets of batch b; the batches differ in size."""
    generator = torch.Generator().manual_seed(b)
    n = 3 + 4 * (b % 3)
    return torch.randn(n, CLASSES, generator=generator), torch.randint(CLASSES, (n,), generator=generator)


class Several(tm.Metric):
    """A state for each reduction, of which each value is known."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(2), dist_reduce_fx="sum")
        self.add_state("mean", torch.zeros(()), dist_reduce_fx="mean")
        self.add_state("least", torch.tensor(math.inf), dist_reduce_fx="min")
        self.add_state("largest", torch.tensor(-math.inf), dist_reduce_fx="max")
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("kept", [], dist_reduce_fx=None)
        self.add_state("each", torch.zeros(1), dist_reduce_fx=None)
        self.add_state("flags", torch.zeros(2, dtype=torch.bool), dist_reduce_fx="max")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        first = logits[0, 0]
        self.mean = (self.mean * (self._update_count - 1) + first) / self._update_count
        self.total += logits[0, :2]
        self.least, self.largest = torch.minimum(self.least, first), torch.maximum(self.largest, first)
        self.rows.append(targets)
        self.kept.append(targets[:1])
        self.each += 1
        self.flags[targets[0] % 2] = True

    def compute(self) -> dict[str, Tensor]:
        assert self.total.dtype == self.mean.dtype == torch.float64
        return {
            "total": self.total,
            "mean": self.mean,
            "least": self.least,
            "largest": self.largest,
            "rows": torch.cat(self.rows),
            "kept": torch.cat(self.kept),
            "each": self.each.sum(),
            "flags": self.flags,
        }


def build() -> Built:
    """Fixed states, growing ones, a stacked one, composed metrics, and a collection that shares states."""
    accuracy = MulticlassAccuracy(CLASSES, average="micro")
    return {
        "accuracy": accuracy,
        "auc": Binary(BinaryAUROC()),
        "binned": Binary(BinaryAUROC(thresholds=50)),
        "pearson": Columns(tm.PearsonCorrCoef()),
        "spearman": Columns(tm.SpearmanCorrCoef()),
        "error": 1 - MulticlassAccuracy(CLASSES, average="micro"),
        "both": tm.MetricCollection(
            {"f1": MulticlassF1Score(CLASSES), "recall": tm.Recall(task="multiclass", num_classes=CLASSES)}
        ),
        "several": Several(),
    }


class Binary(tm.wrappers.abstract.WrapperMetric):
    """A metric inside another one."""

    def __init__(self, inner: tm.Metric) -> None:
        super().__init__()
        self.inner = inner

    def update(self, logits: Tensor, targets: Tensor) -> None:
        self.inner.update(*self.shown(logits, targets))

    def shown(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return logits[:, 0].sigmoid(), (targets == 0).long()

    def compute(self) -> Tensor:
        value: Tensor = self.inner.compute()
        return value

    def reset(self) -> None:
        super().reset()
        self.inner.reset()


class Columns(Binary):
    def shown(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return logits[:, 0], logits[:, 1] + targets


def values_on(ranks: int, batches: int, built: Callable[[], Built] = build) -> list[dict[str, Any]]:
    def work(comm: ThreadCommunicator) -> dict[str, Any]:
        metrics = built()
        states = MetricStates(comm, metrics)
        for _ in range(2):
            for b in range(comm.rank, batches, comm.size):
                for metric in metrics.values():
                    metric.update(*batch(b))
            values = states.compute()
            states.reset()
        return values

    return on_ranks(ranks, work)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 9])
def test_values_do_not_depend_on_the_ranks(ranks: int) -> None:
    """Seven batches: with nine ranks two have none."""
    (reference,) = values_on(1, 7)
    for values in values_on(ranks, 7):
        assert values.keys() == reference.keys()
        for name, value in reference.items():
            assert values[name] == pytest.approx(value, rel=1e-6 if name == "pearson" else 1e-12), name
    assert reference["rows"] == torch.cat([batch(b)[1] for b in range(7)]).tolist(), "in their order"


def test_values_are_those_of_torchmetrics() -> None:
    (found,) = values_on(1, 7)
    alone = build()
    for b in range(7):
        for metric in alone.values():
            metric.update(*batch(b))
    assert found["auc"] == pytest.approx(float(alone["auc"].compute()), rel=1e-6)
    assert found["accuracy"] == pytest.approx(float(alone["accuracy"].compute()), rel=1e-6)
    assert found["error"] == pytest.approx(1 - found["accuracy"], rel=1e-6)
    assert found["pearson"] == pytest.approx(float(alone["pearson"].compute()), rel=1e-5)
    both = alone["both"].compute()
    assert (found["f1"], found["recall"]) == pytest.approx((float(both["f1"]), float(both["recall"])))
    assert found["each"] == 7


def test_a_mean_is_weighted_by_the_updates_of_each_rank() -> None:
    """Five batches on two ranks are three and two; the mean of two means would be another number."""
    firsts = [float(batch(b)[0][0, 0]) for b in range(5)]
    for values in values_on(2, 5, lambda: {"several": Several()}):
        assert values["mean"] == pytest.approx(sum(firsts) / 5, rel=1e-6)


class Strange(tm.Metric):
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("product", torch.ones(()), dist_reduce_fx=torch.prod)

    def update(self, *_: Tensor) -> None: ...

    def compute(self) -> Tensor:
        return self.product


def test_a_reduction_of_its_own_is_refused_by_name() -> None:
    (message,) = on_ranks(1, lambda comm: refused(lambda: MetricStates(comm, {"odd": Strange()})))
    assert "metric `odd`: the state `product` of Strange has the reduction 'prod'; expected sum" in message
    (message,) = on_ranks(1, lambda comm: refused(lambda: MetricStates(comm, {"odd": 3})))  # type: ignore[dict-item]
    assert "build_metrics gave 3 for `odd`; expected a torchmetrics.Metric" in message


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(TaskError) as caught:
        action()
    return str(caught.value)


def test_a_metric_without_any_update_is_an_error_on_all_ranks() -> None:
    def work(comm: ThreadCommunicator) -> str:
        return refused(MetricStates(comm, {"f1": MulticlassF1Score(CLASSES)}).compute)

    (message,) = set(on_ranks(3, work))
    assert "metric `f1` of build_metrics was not updated with any batch" in message


def test_metrics_that_differ_between_ranks_are_an_error_on_all_ranks() -> None:
    def work(comm: ThreadCommunicator) -> str:
        built = {"f1": MulticlassF1Score(CLASSES)} if comm.rank else {"auc": BinaryAUROC()}
        return refused(MetricStates(comm, built).compute)

    (message,) = set(on_ranks(2, work))
    assert "differ between rank 0 and rank 1" in message


class Grown(tm.Metric):
    """A sum whose length depends on the rank."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(1), dist_reduce_fx="sum")

    def update(self, length: int) -> None:
        self.sums = torch.ones(length)

    def compute(self) -> Tensor:
        return self.sums


def test_states_of_other_shapes_are_an_error_on_all_ranks() -> None:
    def work(comm: ThreadCommunicator) -> str:
        metric = Grown()
        states = MetricStates(comm, {"grown": metric})
        metric.update(comm.rank + 1)
        return refused(states.compute)

    (message,) = set(on_ranks(2, work))
    assert "metric `grown`: the state `sums` has the shapes ['(1,)', '(2,)'] on different ranks" in message


def test_predictions_that_do_not_fit_are_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "share_of_memory", lambda ranks: 4 * 100)

    def work(comm: ThreadCommunicator) -> str:
        metric = BinaryAUROC()
        states = MetricStates(comm, {"auc": metric})
        metric.update(torch.rand(20), torch.randint(2, (20,)))
        return refused(states.compute)

    (message,) = set(on_ranks(2, work))
    assert "metric `auc` keeps every prediction in `preds`: 160 bytes of all ranks, but 100 may" in message
    assert "number of thresholds" in message


def test_large_states_arrive_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_train.algorithm.metric_states._FOLDED_BYTES", 1)

    class Large(tm.Metric):
        full_state_update = False

        def __init__(self) -> None:
            super().__init__()
            self.add_state("counts", torch.zeros(100, 123, dtype=torch.int64), dist_reduce_fx="sum")
            self.add_state("rows", [], dist_reduce_fx="cat")

        def update(self, b: int) -> None:
            self.counts += torch.arange(12_300).view(100, 123) * (b + 1)
            self.rows.append(torch.full((20_000,), float(b)))

        def compute(self) -> dict[str, Tensor]:
            rows = torch.cat(self.rows)
            return {"counts": self.counts, "rows": rows[::20_000], "length": torch.tensor(len(rows))}

    def work(comm: ThreadCommunicator) -> dict[str, Any]:
        metric = Large()
        states = MetricStates(comm, {"large": metric})
        for b in range(comm.rank, 5, comm.size):
            metric.update(b)
        return states.compute()

    for values in on_ranks(2, work):
        assert values["counts"] == (torch.arange(12_300).view(100, 123) * 15).double().tolist()
        assert (values["rows"], values["length"]) == ([0.0, 1.0, 2.0, 3.0, 4.0], 100_000.0)


def test_two_metrics_of_one_name_are_refused() -> None:
    built = {
        "f1": MulticlassF1Score(CLASSES),
        "all": tm.MetricCollection({"f1": MulticlassAccuracy(CLASSES)}),
    }

    def work(comm: ThreadCommunicator) -> str:
        states = MetricStates(comm, built)
        for metric in built.values():
            metric.update(*batch(0))
        return refused(states.of_this_rank)

    assert on_ranks(1, work) == ["two metrics of build_metrics are named `f1`; give one another name."]


def test_numbers_of_values() -> None:
    values = {"a": 1.0, "b": [2.0, math.nan], "c": [[1.0], [2.0]], "d": math.nan}
    assert scalars(values).keys() == {"a", "d"}
    assert element(values, "b[0]") == 2.0
    for name in ("b", "b[2]", "b[-1]", "b[x]", "c[0]", "e[0]", "a[0]"):
        assert element(values, name) is None
    assert undefined(values) == ["b[1]", "d"]
