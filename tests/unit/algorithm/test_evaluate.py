"""The figures of an evaluation do not depend on the number of ranks."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAUROC, MulticlassRecall

from hvd_train.algorithm.evaluate import TrainingLossEvaluator, ValidationEvaluator
from hvd_train.algorithm.header import Header, Row
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.data.deal import Span
from hvd_train.data.format import FieldSpec
from hvd_train.data.rows import Rows
from hvd_train.errors import RunDirectoryError, TaskError
from hvd_train.tasks.base import Batch, Sums, Task
from tests.threads import ThreadCommunicator, on_ranks
from tests.unit.data.shards import inputs_of, write_foreign

ROWS = 100
FIELDS = {"inputs": FieldSpec(shape=(3,), dtype="float32"), "targets": FieldSpec(shape=(), dtype="int64")}


class Seven(Task):
    """Seven classes; figures that are divided by different counts, and a batch's rows as they were read."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.modes: list[tuple[bool, bool, bool]] = []

    def build_model(self, spec: object) -> nn.Module:
        raise AssertionError("the test builds it")

    def transform(self, batch: Batch) -> Batch:
        return {**batch, "inputs": batch["inputs"] / ROWS}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        self.modes.append((model.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        logits = model(batch["inputs"])
        return nn.functional.cross_entropy(logits, batch["targets"]), len(logits)

    def metrics(self, model: nn.Module, batch: Batch) -> Sums:
        numbers = (batch["inputs"][:, 0] * ROWS).round().long()
        self.seen.append(numbers.tolist())
        wrong = model(batch["inputs"]).argmax(1) != batch["targets"]
        even = batch["targets"] % 2 == 0
        return {
            "error": (float(wrong.sum()), float(len(wrong))),
            "error_of_even": (float((wrong & even).sum()), float(even.sum())),
            "never": (0.0, 0.0),
        }


def model(shift: float = 0.0) -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 7), nn.Dropout(0.5))
    with torch.no_grad():
        module[0].weight.copy_(torch.sin(torch.arange(21.0) * 2 + shift).reshape(7, 3) * 5)
        module[0].bias.copy_(torch.cos(torch.arange(7.0) * 3 + shift))
    return module.train()


@pytest.fixture
def spans(tmp_path: Path) -> list[Span]:
    """Three shards, 41 + 7 + 52 rows: batches reach over their ends."""
    spans, first = [], 0
    for i, rows in enumerate((41, 7, 52)):
        spans.append(Span(str(write_foreign(tmp_path / f"{i}.h5", rows, first)), 0, rows))
        first += rows
    return spans


def expected(module: nn.Module) -> dict[str, float]:
    """The means over all rows, in one piece."""
    inputs, targets = torch.from_numpy(inputs_of(0, ROWS)) / ROWS, torch.arange(ROWS) % 7
    module.eval()
    with torch.no_grad():
        logits = module(inputs)
    wrong = (logits.argmax(1) != targets).double()
    even = targets % 2 == 0
    return {
        "loss": float(nn.functional.cross_entropy(logits.double(), targets)),
        "error": float(wrong.mean()),
        "error_of_even": float(wrong[even].mean()),
    }


def evaluate(
    comm: ThreadCommunicator,
    spans: list[Span],
    batch_size: int,
    every_model: bool = False,
    shift: float = 0.0,
) -> tuple[dict[str, float], Seven]:
    task, module, rows = Seven(), model(shift), Rows(spans, FIELDS)
    evaluator = ValidationEvaluator(comm, task, module, rows, batch_size=batch_size, every_model=every_model)
    assert evaluator.num_samples == ROWS
    figures = evaluator.evaluate()
    assert evaluator.evaluate() == figures, "nothing is kept from one evaluation to the next"
    assert module.training, "the mode is given back"
    rows.close()
    return figures, task


@pytest.mark.parametrize("batch_size", [1, 16, 33, ROWS, 1000])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_figures_are_the_means_over_all_rows(ranks: int, batch_size: int, spans: list[Span]) -> None:
    results = on_ranks(ranks, lambda comm: evaluate(comm, spans, batch_size))
    reference = expected(model())
    for figures, _ in results:
        assert figures == results[0][0], "every rank has the same"
        assert figures.keys() == reference.keys(), "what was never counted has no figure"
        for name, value in reference.items():
            assert figures[name] == pytest.approx(value, rel=1e-5)
        assert figures["error"] == reference["error"], "counts are exact"
    assert 0 < reference["error"] < 1


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_batches_do_not_depend_on_the_rank(ranks: int, spans: list[Span]) -> None:
    results = on_ranks(ranks, lambda comm: evaluate(comm, spans, 16))
    once = [task.seen[: len(task.seen) // 2] for _, task in results]
    batches = [list(range(start, min(start + 16, ROWS))) for start in range(0, ROWS, 16)]
    assert [once[b % ranks][b // ranks] for b in range(len(batches))] == batches
    assert sum(map(len, once)) == len(batches)
    assert {mode for _, task in results for mode in task.modes} == {(False, False, False)}


def test_ranks_without_a_batch_take_part(spans: list[Span]) -> None:
    results = on_ranks(8, lambda comm: evaluate(comm, spans, 40))
    assert [bool(task.seen) for _, task in results] == [True] * 3 + [False] * 5
    assert all(figures == results[0][0] for figures, _ in results)
    assert results[7][0]["error"] == expected(model())["error"]


def test_where_ranks_have_models_of_their_own_each_sees_all_rows(spans: list[Span]) -> None:
    results = on_ranks(3, lambda comm: evaluate(comm, spans, 16, every_model=True, shift=comm.rank))
    alone = [expected(model(float(rank))) for rank in range(3)]
    assert len({round(a["loss"], 3) for a in alone}) == 3
    for figures, task in results:
        for name in alone[0]:
            assert figures[name] == pytest.approx(np.mean([a[name] for a in alone]), rel=1e-5)
        assert sum(map(len, task.seen)) == 2 * ROWS


class Fickle(Seven):
    """Other names on one rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def metrics(self, model: nn.Module, batch: Batch) -> Sums:
        return {"odd": (0.0, 1.0)} if self.rank == 1 else {"error": (0.0, 1.0)}


def test_names_that_differ_between_ranks_are_an_error_on_all(spans: list[Span]) -> None:
    def run(comm: ThreadCommunicator) -> str:
        evaluator = ValidationEvaluator(comm, Fickle(comm.rank), model(), Rows(spans, FIELDS), batch_size=16)
        with pytest.raises(TaskError) as caught:
            evaluator.evaluate()
        assert caught.value.agreed
        return str(caught.value)

    (message,) = set(on_ranks(3, run))
    assert "['error', 'loss'], but ['loss', 'odd'] on rank 1" in message


def test_a_single_process_needs_no_other(spans: list[Span]) -> None:
    evaluator = ValidationEvaluator(SoloCommunicator(), Seven(), model(), Rows(spans, FIELDS), batch_size=16)
    assert evaluator.evaluate()["error"] == expected(model())["error"]


def header(*rows: tuple[float, float, float]) -> Header:
    return Header(
        np.array([astuple(Row(samples=n, loss_sum=loss, finite=finite)) for n, loss, finite in rows])
    )


def test_without_validation_data_the_error_is_the_training_loss_since_the_last_evaluation() -> None:
    evaluator = TrainingLossEvaluator()
    assert evaluator.num_samples == 0
    evaluator.after_round(header((10, 20, 1), (30, 30, 1)))
    evaluator.after_round(header((10, 10, 1), (0, 0, 1)))
    assert evaluator.evaluate() == {"loss": 60 / 50, "error": 60 / 50}
    evaluator.after_round(header((10, float("nan"), 1), (10, 5, 0), (10, 40, 1)))
    assert evaluator.evaluate() == {"loss": 4.0, "error": 4.0}
    assert np.isnan(evaluator.evaluate()["error"]), "nothing was seen since"


def test_the_training_loss_goes_on_from_where_it_was_saved() -> None:
    first, second = TrainingLossEvaluator(), TrainingLossEvaluator()
    first.after_round(header((10, 20, 1), (30, 30, 1)))
    second.load_state_dict(first.state_dict())
    second.after_round(header((10, 10, 1), (0, 0, 1)))
    assert second.evaluate() == {"loss": 60 / 50, "error": 60 / 50}
    with pytest.raises(RunDirectoryError, match="samples"):
        second.load_state_dict({"loss_sum": 1.0})


def test_a_single_row_is_evaluated_with_the_batch_before_it(spans: list[Span]) -> None:
    for size, count in ((33, 3), (99, 1), (100, 1), (1, 100)):
        (_, task), *_ = on_ranks(1, lambda comm, size=size: evaluate(comm, spans, size))
        batches = task.seen[: len(task.seen) // 2]
        assert [n for batch in batches for n in batch] == list(range(ROWS))
        assert len(batches) == count


class Measured(Seven):
    """Metrics of build_metrics beside the sums."""

    def build_metrics(self, num_samples: int) -> dict[str, Metric]:
        assert num_samples == ROWS
        self.recall = MulticlassRecall(7, average=None)
        self.area = MulticlassAUROC(7)
        return {"recall": self.recall, "area": self.area}

    def metrics(self, model: nn.Module, batch: Batch) -> Sums:
        logits = model(batch["inputs"])
        self.recall.update(logits, batch["targets"])
        self.area.update(logits, batch["targets"])
        return super().metrics(model, batch)


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_metrics_of_torchmetrics_are_figures(ranks: int, spans: list[Span]) -> None:
    def work(comm: ThreadCommunicator) -> tuple[dict[str, float], dict[str, Any], list[str]]:
        rows = Rows(spans, FIELDS)
        evaluator = ValidationEvaluator(comm, Measured(), model(), rows, batch_size=16, watched="recall[3]")
        names = evaluator.try_out()
        first = evaluator.evaluate()
        assert evaluator.evaluate() == first, "neither the trial nor an evaluation leaves anything"
        rows.close()
        return first, evaluator.values, names

    results = on_ranks(ranks, work)
    inputs, targets = torch.from_numpy(inputs_of(0, ROWS)) / ROWS, torch.arange(ROWS) % 7
    logits = model().eval()(inputs)
    recall = MulticlassRecall(7, average=None)(logits, targets).tolist()
    for figures, values, names in results:
        assert values["recall"] == pytest.approx(recall)
        assert figures["recall[3]"] == values["recall"][3]
        assert figures["area"] == pytest.approx(float(MulticlassAUROC(7)(logits, targets)), rel=1e-6)
        assert figures["error"] == expected(model())["error"]
        assert set(names) in ({*figures, "never"}, set()), "of a rank without a batch"


def test_a_name_in_both_ways_is_refused(spans: list[Span]) -> None:
    class Twice(Measured):
        def build_metrics(self, num_samples: int) -> dict[str, Metric]:
            return {**super().build_metrics(num_samples), "error": self.area}

    evaluator = ValidationEvaluator(SoloCommunicator(), Twice(), model(), Rows(spans, FIELDS), batch_size=16)
    with pytest.raises(TaskError, match="gives `error` in `metrics` and in build_metrics"):
        evaluator.try_out()
