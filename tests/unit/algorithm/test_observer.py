"""Observations against figures worked out from the whole model, and how often they are taken."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvd_train.algorithm import observer as module
from hvd_train.algorithm.averaging import StateAverage
from hvd_train.algorithm.flat_state import FlatState
from hvd_train.algorithm.observer import Observer
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.record.reports import LayerReport, MachineReport
from tests.threads import ThreadCommunicator, on_ranks

Loss = Callable[[nn.Module, int], Tensor]


class Model(nn.Module):
    """A tied weight, a bias that is frozen, parameters of four dtypes, and one larger than a block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 7)
        self.tied = nn.Linear(7, 7)
        self.tied.weight = self.first.weight
        self.tied.bias.requires_grad = False
        self.large = nn.Parameter(torch.empty(300, 300))
        self.wide = nn.Parameter(torch.empty(5, dtype=torch.float64))
        self.narrow = nn.Parameter(torch.empty(11, dtype=torch.float16))
        self.pairs = nn.Parameter(torch.empty(2, dtype=torch.complex64))
        random = torch.Generator().manual_seed(1)  # of its own: the ranks are threads
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=random, dtype=p.dtype))
            self.narrow.fill_(300.0)  # the square is not finite in float16


def train_step(model: nn.Module, rank: int) -> None:
    """Gradients and a step that differ by rank."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = sum((p.abs().double() ** 2).sum() * (rank + 1) * (i + 1) for i, p in enumerate(parameters))
    assert isinstance(loss, Tensor)
    loss.backward()
    optimizer.step()


def averaged(comm: ThreadCommunicator, step: bool = True) -> tuple[Observer, Model, dict[str, Tensor]]:
    """An observer after one round; the model, and its parameters before the round."""
    model = Model()
    state = FlatState(model, torch.optim.SGD(model.parameters(), 0.1), comm, optimizer_state="keep")
    average = StateAverage(state, comm)
    average.start()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if step:
        train_step(model, comm.rank)
    average.average(1.0, healthy=True)
    return Observer(comm, state, [0] * comm.size), model, before


def norm(tensor: Tensor) -> float:
    return float(torch.view_as_real(tensor).norm() if tensor.is_complex() else tensor.double().norm())


@pytest.mark.parametrize("size", [1, 3])
def test_layers_are_those_of_the_whole_model(size: int) -> None:
    def rank(comm: ThreadCommunicator) -> tuple[LayerReport, list[str], dict[str, float], dict[str, float]]:
        observer, model, before = averaged(comm)
        _, report = observer.observe(4, period=10)
        assert isinstance(report, LayerReport)
        now = {name: p.detach() for name, p in model.named_parameters()}
        norms = {name: norm(p) for name, p in now.items()}
        moved = {name: norm(p.to(torch.complex128) - before[name]) for name, p in now.items()}
        return report, [entry.name for entry in observer.layers], norms, moved

    results = on_ranks(size, rank)
    report, names, norms, moved = results[0]
    assert all(other == report for other, *_ in results[1:]), "every rank has the same"
    assert names == ["large", "wide", "narrow", "pairs", "first.weight", "first.bias"]
    assert (report.round, report.period) == (4, 10)
    np.testing.assert_allclose(report.norm, [norms[name] for name in names], rtol=1e-4)
    np.testing.assert_allclose(report.update, [moved[name] for name in names], rtol=1e-4)
    assert all(update > 0 for update in report.update)


def test_gradients_are_spread_over_the_ranks_that_have_one() -> None:
    def rank(comm: ThreadCommunicator) -> LayerReport:
        observer, model, _ = averaged(comm, step=comm.rank != 1)
        if comm.rank == 2:
            model.wide.grad = None
        model.first.bias.grad = None
        _, report = observer.observe(1, period=1)
        assert isinstance(report, LayerReport)
        assert model.large.grad is None or comm.rank != 1
        return report

    report, *_ = on_ranks(3, rank)
    model = Model()
    large, wide = model.large.detach(), model.wide.detach()
    # The gradients of ranks 0 and 2 are 2 w (rank + 1), of the layer that is first in the model.
    rms = 2 * float(large.norm()) / math.sqrt(large.numel())
    gradient = {name: np.array(values) for name, values in report.gradient.items()}
    np.testing.assert_allclose(
        [gradient[k][0] for k in ("min", "mean", "max")], [rms, 2 * rms, 3 * rms], 1e-5
    )
    assert report.gradient_peak[0] == pytest.approx(6 * float(large.abs().max()), rel=1e-5)
    # Of the second layer rank 0 alone has one; of the last none.
    alone = 4 * float(wide.norm()) / math.sqrt(5)
    np.testing.assert_allclose([gradient[k][1] for k in ("min", "mean", "max")], [alone] * 3, 1e-6)
    assert all(math.isnan(gradient[k][5]) for k in ("min", "mean", "max"))
    assert math.isnan(report.gradient_peak[5])


def test_a_gradient_that_is_not_a_number_is_infinite() -> None:
    def rank(comm: ThreadCommunicator) -> LayerReport:
        observer, model, _ = averaged(comm)
        assert model.large.grad is not None
        model.large.grad[0, 0] = math.nan
        return observer.observe(1, period=1)[1]  # type: ignore[return-value]

    (report,) = on_ranks(1, rank)
    assert report.gradient["max"][0] == report.gradient_peak[0] == math.inf


def test_sparse_gradients_are_of_the_whole_layer() -> None:
    model = nn.Embedding(8, 4, sparse=True)
    comm = SoloCommunicator()
    state = FlatState(model, torch.optim.SGD(model.parameters(), 0.1), comm, optimizer_state="keep")
    average = StateAverage(state, comm)
    average.start()
    model(torch.tensor([1, 1, 5])).sum().backward()
    average.average(1.0, healthy=True)
    _, report = Observer(comm, state, [0]).observe(1, period=1)
    assert isinstance(report, LayerReport)
    assert report.gradient["mean"] == pytest.approx([math.sqrt((4 * 2**2 + 4) / 32)])
    assert report.gradient_peak == pytest.approx([2.0])
    assert report.update == [0.0]


def test_machines_are_in_the_order_of_ranks_and_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ThreadCommunicator, "payload_bytes", property(lambda comm: 10 * comm.rank))

    def rank(comm: ThreadCommunicator) -> MachineReport:
        model = nn.Linear(2, 2)
        state = FlatState(model, torch.optim.SGD(model.parameters(), 0.1), comm, optimizer_state="keep")
        observer = Observer(comm, state, [0, 1, 0], layers=False)
        assert observer.layers == []
        sum(i * i for i in range(100_000))  # this process is busy
        (report,) = observer.observe(7, period=1)
        assert isinstance(report, MachineReport)
        return report

    report, *others = on_ranks(3, rank)
    assert all(other == report for other in others)
    assert report.round == 7
    assert len(report.rss_bytes) == len(report.cpu) == len(report.throttled) == 3
    assert min(report.rss_bytes) > 10 << 20
    assert min(report.cpu) > 0
    assert all(0 <= share <= 1 for share in report.throttled)
    assert len(report.available_bytes) == 2
    assert report.sent_bytes == 30


def test_without_a_count_of_some_rank_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ThreadCommunicator, "payload_bytes", property(lambda comm: None if comm.rank else 10))

    def rank(comm: ThreadCommunicator) -> int | None:
        observer, *_ = averaged(comm)
        report = observer.observe(1, period=1)[0]
        assert isinstance(report, MachineReport)
        return report.sent_bytes

    assert on_ranks(2, rank) == [None, None]


def test_observations_take_a_small_part_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    cost = 0.0

    class Slow(SoloCommunicator):
        def allreduce(self, *args: object) -> np.ndarray:
            nonlocal now
            now += cost
            return super().allreduce(*args)  # type: ignore[arg-type]

    comm, model = Slow(), nn.Linear(2, 2)
    state = FlatState(model, torch.optim.SGD(model.parameters(), 0.1), comm, optimizer_state="keep")
    observer = Observer(comm, state, [0], layers=False)
    assert observer.is_due(), "the first at once"
    for cost, pause in ((0.0, 2.0), (0.009, 2.0), (0.02, 4.0), (0.5, 100.0)):
        observer.observe(1, period=1)
        now += 0.98 * pause
        assert not observer.is_due(), cost
        now += 0.04 * pause
        assert observer.is_due(), cost
    observer.enabled = False
    assert not observer.is_due()
