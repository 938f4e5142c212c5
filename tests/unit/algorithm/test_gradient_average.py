"""Averaged gradients on ranks that are threads: which optimizers, what a rank holds, how it is dealt anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_train.algorithm.gradients import Gradients
from hvd_train.algorithm.header import Work
from hvd_train.algorithm.local_step import make_optimizer
from hvd_train.algorithm.sliced_optimizer import SlicedOptimizer
from hvd_train.algorithm.sync_parts import SyncParts
from hvd_train.comm.base import Communicator
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import Config, OptimConfig, SyncConfig
from hvd_train.data.format import SampleSpec
from hvd_train.errors import ConfigError, RunDirectoryError, TaskError
from hvd_train.tasks.base import Batch, Task
from tests.threads import ThreadCommunicator, on_ranks

CLASSES = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
    "AdamW": {},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "Adagrad": {"initial_accumulator_value": 0.1, "lr_decay": 0.1},
    "RMSprop": {"centered": True, "momentum": 0.5},
    "Rprop": {},
    "ASGD": {"t0": 2.0, "lambd": 0.01},
    "Adadelta": {},
}


class Fit(Task):
    """The mean square of what the model gives."""

    def build_model(self, spec: SampleSpec) -> nn.Module:
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return (model(batch["x"]) - 1).abs().square().mean(), len(batch["x"])


class Odd(nn.Module):
    """Parameters in columns, complex, twice, of no dimension, of no element, unused, and frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.Parameter(torch.linspace(-1, 1, 15).view(5, 3).t())
        self.complex = nn.Parameter(torch.complex(torch.linspace(0, 1, 5), torch.linspace(1, 0, 5)))
        self.shift = nn.Linear(5, 5)
        nn.init.constant_(self.shift.weight, 0.1)
        nn.init.zeros_(self.shift.bias)
        self.twin = self.shift
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.unused = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.twin(self.shift(x @ self.columns)) * self.frozen * self.scale
        return hidden + (hidden * self.complex).real


@pytest.fixture(autouse=True)
def _double_precision() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rows(step: int, rank: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return {"x": torch.randn(rank + 2, 3, generator=generator)}


def optim(name: str, **given: Any) -> OptimConfig:
    return OptimConfig(name=name, lr=0.01, args=CLASSES[name], **given)


class Trained:
    """Some steps of one rank."""

    def __init__(
        self, comm: Communicator, config: OptimConfig, model: nn.Module, start: Sequence[Any] = ()
    ) -> None:
        self.comm, self.model = comm, model
        self.optimizer = make_optimizer(model, config)
        whole = Config(optim=config, sync=SyncConfig(mode="gradients", check_every=1))
        self.parts = SyncParts(model, self.optimizer, comm, whole)
        sliced = self.parts.stateful()["sliced"]
        assert isinstance(sliced, SlicedOptimizer)
        self.sliced = sliced
        if start:
            model.load_state_dict(start[0][0])
            sliced.take(of for _, of in start)
        self.step = self.parts.step(Gradients(model, Fit(), config))
        self.synchronizer = self.parts.synchronizer()
        self.synchronizer.start()

    def run(self, steps: range) -> tuple[dict[str, Tensor], dict[str, Any]]:
        for at in steps:
            done = self.step([rows(at, self.comm.rank)])
            self.synchronizer.synchronize(at, Work(samples=done.samples, loss_sum=done.loss_sum))
        state = {k: v.clone() if torch.is_tensor(v) else v for k, v in self.sliced.state_dict().items()}
        return {k: v.clone() for k, v in self.model.state_dict().items()}, state


def reference(config: OptimConfig, ranks: int, steps: int) -> dict[str, Tensor]:
    """One process with the joint batch."""
    model = Odd()
    optimizer = make_optimizer(model, config)
    for at in range(steps):
        optimizer.zero_grad()
        joint = {"x": torch.cat([rows(at, rank)["x"] for rank in range(ranks)])}
        Fit().loss(model, joint)[0].backward()
        if config.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_steps_slices_as_it_steps_the_whole(name: str, ranks: int) -> None:
    config = optim(name)
    expected = reference(config, ranks, 6)
    for found, _ in on_ranks(ranks, lambda comm: Trained(comm, config, Odd()).run(range(6))):
        for key, value in expected.items():
            assert (found[key] - value).abs().amax() < 1e-12 if value.numel() else True, key
    assert torch.equal(expected["unused"], torch.ones(4))


@pytest.mark.parametrize("ranks", [1, 2, 5, 60])
@pytest.mark.parametrize("name", ["SGD", "NAdam", "ASGD"])
def test_its_state_is_dealt_anew_to_any_number_of_ranks(name: str, ranks: int) -> None:
    """Three ranks go on as so many; the joint batch stays the same as each of them takes part of it."""
    config = optim(name, clip_norm=0.1)
    half = on_ranks(3, lambda comm: Trained(comm, config, Odd()).run(range(4)))
    whole = on_ranks(3, lambda comm: Trained(comm, config, Odd()).run(range(8)))

    def rank(comm: ThreadCommunicator) -> dict[str, Tensor]:
        trained = Trained(comm, config, Odd(), half)
        for at in range(4, 8):
            trained.step([rows(at, r) for r in range(3) if r % comm.size == comm.rank])
        return {k: v.clone() for k, v in trained.model.state_dict().items()}

    for found in on_ranks(ranks, rank):
        for key, value in whole[0][0].items():
            assert (found[key] - value).abs().amax() < 1e-12 if value.numel() else True, key


def test_each_rank_holds_one_part_of_the_state() -> None:
    def held(comm: ThreadCommunicator) -> dict[str, int]:
        module = nn.Linear(2, 1, bias=False)
        module.weight = nn.Parameter(torch.zeros(59))
        config = OptimConfig(name="AdamW")
        optimizer = make_optimizer(module, config)
        parts = SyncParts(module, optimizer, comm, Config(optim=config, sync=SyncConfig(mode="gradients")))
        assert not optimizer.state
        assert [part.parameters for part in parts.flat.parts] == [True], "no moments are averaged"
        state = parts.stateful()["sliced"].state_dict()
        return {key: value.numel() for key, value in state.items() if torch.is_tensor(value)}

    for rank, sizes in enumerate(on_ranks(3, held)):
        numel = (20, 20, 19)[rank]
        assert sizes == {"step/weight": 1, "exp_avg/weight": numel, "exp_avg_sq/weight": numel}


@pytest.mark.parametrize("name", ["Adafactor", "Muon", "SparseAdam"])
def test_what_does_not_work_element_by_element_is_refused(name: str) -> None:
    model = nn.Linear(3, 2, bias=False)
    config = OptimConfig(name=name)
    with pytest.raises(ConfigError) as caught:
        SyncParts(
            model,
            make_optimizer(model, config),
            SoloCommunicator(),
            Config(optim=config, sync=SyncConfig(mode="gradients")),
        )
    assert str(caught.value) == (
        f"optim.name = '{name}': sync.mode = 'gradients' steps on slices of the parameters; expected an "
        "optimizer that works element by element: one of ASGD, Adadelta, Adagrad, Adam, AdamW, Adamax, "
        "NAdam, RAdam, RMSprop, Rprop, SGD. Choose one of these, or sync.mode = 'average'."
    )


def test_clipping_needs_parameters_of_one_type() -> None:
    expected = (
        r"optim\.clip_norm = 1\.0: the model has parameters of torch\.float64 and torch\.float32, whose "
        r"gradients are averaged one type after the other with sync\.mode = 'gradients'; expected parameters "
        r"of one type, so that the norm of all is known\. Set optim\.clip_norm = 0\."
    )

    def mixed() -> nn.Module:
        module = nn.Linear(3, 2)
        module.bias = nn.Parameter(torch.zeros(2, dtype=torch.float32))
        return module

    with pytest.raises(ConfigError, match=expected):
        Trained(SoloCommunicator(), optim("SGD", clip_norm=1.0), mixed())
    Trained(SoloCommunicator(), optim("SGD"), mixed()).run(range(0))


def test_two_parameters_in_the_same_memory_are_refused() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = nn.Parameter(module[0].weight.data)
    expected = (
        r"`0\.weight` and `1\.weight` are two parameters in the same memory, which sync\.mode = 'gradients' "
        r"cannot step as one\. Tie them by giving both modules the same Parameter object\."
    )
    with pytest.raises(TaskError, match=expected):
        Trained(SoloCommunicator(), optim("SGD"), module)
    module[1].weight = module[0].weight
    Trained(SoloCommunicator(), optim("SGD"), module).run(range(2))


def test_parameters_of_half_types_keep_wide_moments() -> None:
    module = nn.Linear(3, 2).bfloat16()
    trained = Trained(SoloCommunicator(), optim("AdamW"), module)
    trained.step([{"x": torch.ones(2, 3, dtype=torch.bfloat16)}])
    assert module.weight.dtype is torch.bfloat16
    state = trained.sliced.state_dict()
    assert {v.dtype for v in state.values() if torch.is_tensor(v) and v.dim()} == {torch.float32}


def test_sparse_gradients_are_made_dense() -> None:
    class Words(Fit):
        def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
            return model(batch["x"]).square().mean(), len(batch["x"])

    def trained(comm: ThreadCommunicator, sparse: bool) -> Tensor:
        torch.manual_seed(comm.rank)
        module = nn.Embedding(9, 4, sparse=sparse)
        nn.init.constant_(module.weight, 0.5)
        run = Trained(comm, optim("AdamW"), module)
        step = run.parts.step(Gradients(module, Words(), optim("AdamW")))
        for at in range(4):
            step([{"x": torch.tensor([comm.rank, at, at, 8])}])
        return module.weight.detach().clone()

    dense, sparse = (on_ranks(2, lambda comm, s=s: trained(comm, s)) for s in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(dense, sparse, strict=True))


@pytest.mark.parametrize("damage", [torch.zeros(2, 2), torch.zeros(3, dtype=torch.float16), None])
def test_a_state_of_another_form_is_refused(damage: Tensor | None) -> None:
    config = optim("AdamW")
    model, state = Trained(SoloCommunicator(), config, Odd()).run(range(1))
    state["exp_avg/shift.bias"] = damage
    if damage is None:
        del state["exp_avg/shift.bias"]
    expected = (
        r"`exp_avg/shift\.bias` is not what the optimizer has kept: expected a flat tensor of torch\.float64"
    )
    with pytest.raises(RunDirectoryError, match=expected):
        Trained(SoloCommunicator(), config, Odd(), [(model, state)])


def test_another_class_begins_anew() -> None:
    start = Trained(SoloCommunicator(), optim("AdamW"), Odd()).run(range(3))
    other = Trained(SoloCommunicator(), optim("NAdam"), Odd(), [start]).sliced.state_dict()
    assert all((value == 0).all() for key, value in other.items() if key.startswith(("exp_avg", "step")))


def test_without_any_weight_nothing_moves() -> None:
    """No samples on any rank, or no finite value: neither parameters nor moments."""

    def rank(comm: ThreadCommunicator) -> None:
        trained = Trained(comm, optim("AdamW"), Odd())
        before = trained.run(range(1))
        for batches in ([], [{"x": torch.full((2, 3), torch.inf)}]):
            trained.step(batches)
            after = trained.run(range(0))
            assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
            assert all(
                torch.equal(value, after[1][key]) if torch.is_tensor(value) else True
                for key, value in before[1].items()
            )
        header = trained.synchronizer.synchronize(1, Work(samples=2))
        assert header.unhealthy == [0, 1]
        assert trained.synchronizer.synchronize(2, Work(samples=2)).unhealthy == []

    on_ranks(2, rank)


def test_without_a_rank_the_parameters_are_those_of_the_last_step() -> None:
    """They have been averaged more often than the buffers, which go back to the end of the last round."""
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    trained = Trained(SoloCommunicator(), optim("AdamW"), model)
    at_end_of_round, _ = trained.run(range(2))
    trained.step([rows(2, 0)])
    at_last_step = model[0].weight.detach().clone()
    lost = trained.synchronizer.rebind(SoloCommunicator())
    assert lost == "the state of AdamW begins anew: that of the lost ranks was on them alone."
    assert torch.equal(model[0].weight, at_last_step)
    assert not torch.equal(model[0].weight, at_end_of_round["0.weight"])
    assert torch.equal(model[1].running_mean, at_end_of_round["1.running_mean"])
    trained.run(range(3, 5))
    assert not torch.equal(model[0].weight, at_last_step)


def test_an_average_that_fails_moves_no_parameter() -> None:
    """The next step begins from x_t again, and every rank has the same bits."""

    def rank(comm: ThreadCommunicator) -> None:
        config = OptimConfig(lr=0.1, args={"momentum": 0.0})
        failing, plain = (Trained(comm, config, Odd()) for _ in range(2))
        gather = comm.all_gather

        def broken(owned: Tensor, staged: Tensor) -> None:
            raise RuntimeError("all-gather")

        for at in range(4):
            if at == 2:
                comm.all_gather = broken  # type: ignore[method-assign]
                with pytest.raises(RuntimeError, match="all-gather"):
                    failing.step([rows(9, comm.rank)])
                comm.all_gather = gather  # type: ignore[method-assign]
                buffer = next(iter(failing.parts.flat.buffers.values()))
                buffer.live.copy_(buffer.anchor)
            for trained in (failing, plain):
                trained.step([rows(at, comm.rank)])
        for ours, theirs in zip(failing.model.parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    on_ranks(2, rank)
