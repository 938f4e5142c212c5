"""Optimizer state made before the first step is the state that the first step would have begun with."""

from __future__ import annotations

import copy
import operator
from typing import Any

import pytest
import torch
from torch import nn

from hvd_train.algorithm.optimizer_state import OptimizerState, materialise, sparse_parameters
from hvd_train.errors import TaskError

CLASSES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("SGD", {}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {"weight_decay": 0.1}),
    ("Adagrad", {}),
    ("Adadelta", {}),
    ("Adamax", {}),
    ("NAdam", {"weight_decay": 0.1}),
    ("RAdam", {}),
    ("RMSprop", {"momentum": 0.5, "centered": True}),
    ("Rprop", {}),
    ("ASGD", {"t0": 3}),
    ("Adafactor", {}),
]
CLASSES = [c for c in CLASSES if hasattr(torch.optim, c[0])]  # Adafactor came with torch 2.5


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2), Scale())


class Scale(nn.Module):
    """A parameter without a dimension, whose moments have none either."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * self.scale


def names(module: nn.Module) -> dict[nn.Parameter, str]:
    return {p: name for name, p in module.named_parameters()}


def make(module: nn.Module, name: str, args: dict[str, Any]) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = getattr(torch.optim, name)(module.parameters(), lr=0.01, **args)
    return optimizer


def step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    module(inputs).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(("name", "args"), CLASSES, ids=[f"{n}{len(a)}" for n, a in CLASSES])
def test_steps_are_the_same_with_state_made_beforehand(name: str, args: dict[str, Any]) -> None:
    """To the bit, over several steps: moments and counters begin where they would have begun."""
    ours, theirs = model(), model()
    mine, reference = make(ours, name, args), make(theirs, name, args)
    before = copy.deepcopy(ours.state_dict())
    made = [(n, tuple(t.shape)) for _, n, t in materialise(mine, names(ours))]
    assert all(torch.equal(before[k], v) for k, v in ours.state_dict().items()), "parameters do not move"
    for seed in range(5):
        step(ours, mine, seed)
        step(theirs, reference, seed)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in reference.state[b].items():
            same = torch.equal if torch.is_tensor(value) else operator.eq
            assert same(mine.state[a][key], value), key
    with_moments = (name, args) != ("SGD", {})
    assert bool(made) is with_moments
    assert len({id(p) for p in mine.state}) == len(reference.state), "no state of the scratch copy is left"


def test_state_that_is_there_is_kept() -> None:
    module = model()
    optimizer = make(module, "Adam", {})
    step(module, optimizer, 0)
    before = {id(p): s["exp_avg"] for p, s in optimizer.state.items()}
    given = list(materialise(optimizer, names(module)))
    assert [key for _, key, _ in given] == ["exp_avg", "exp_avg_sq"] * 5
    assert all(optimizer.state[p]["exp_avg"] is before[id(p)] for p in module.parameters())


def test_the_order_is_that_of_the_parameter_groups() -> None:
    module = model()
    first, second = list(module.parameters())[:2], list(module.parameters())[2:]
    optimizer = torch.optim.SGD([{"params": second}, {"params": first, "lr": 0.5}], lr=0.1, momentum=0.9)
    given = [p for p, _, _ in materialise(optimizer, names(module))]
    assert [id(p) for p in given] == [id(p) for p in (*second, *first)]
    assert [g["params"] for g in optimizer.param_groups] == [second, first]


def test_a_parameter_of_another_model_is_refused() -> None:
    with pytest.raises(TaskError, match="the optimizer holds a parameter that the model does not have"):
        list(materialise(make(model(), "Adam", {}), names(model())))


class Closure(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("a closure is needed")


class Counting(torch.optim.SGD):
    """Keeps a counter that nobody but it knows."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["visits"] = self.state[p].get("visits", 17) + 1


def test_optimizers_whose_state_cannot_be_known_are_refused() -> None:
    module = model()
    failing = Closure(module.parameters(), lr=0.1)
    with pytest.raises(
        TaskError, match=r"the state of Closure cannot be created.*a closure is needed.*'keep'"
    ):
        list(materialise(failing, names(module)))
    assert [id(p) for p in failing.param_groups[0]["params"]] == [id(p) for p in module.parameters()]
    with pytest.raises(TaskError, match="Counting keeps the counter `visits`"):
        list(materialise(Counting(module.parameters(), lr=0.1), names(module)))


@pytest.mark.parametrize(("name", "args"), CLASSES, ids=[f"{n}{len(a)}" for n, a in CLASSES])
def test_saved_state_is_restored_into_the_existing_tensors(name: str, args: dict[str, Any]) -> None:
    ours = model()
    optimizer = make(ours, name, args)
    list(materialise(optimizer, names(ours)))
    for seed in range(3):
        step(ours, optimizer, seed)
    saved = copy.deepcopy(OptimizerState(ours, optimizer, lambda name, value: True).state_dict())
    again = model()
    again.load_state_dict(ours.state_dict())
    other = make(again, name, args)
    held = {(p, key): t for p, key, t in materialise(other, names(again))}
    OptimizerState(again, other, lambda name, value: True).load_state_dict(saved)
    assert all(other.state[p][key] is t for (p, key), t in held.items())
    for seed in range(3, 6):
        step(ours, optimizer, seed)
        step(again, other, seed)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


def test_a_part_saves_only_what_it_is_asked_for() -> None:
    module = model()
    optimizer = make(module, "Adam", {})
    step(module, optimizer, 0)
    counters = OptimizerState(module, optimizer, lambda name, value: name.endswith("/step")).state_dict()
    assert counters.keys() == {f"{name}/step" for name, _ in module.named_parameters()}
    other = make(nn.Linear(2, 2), "Adam", {})
    with pytest.raises(TaskError, match=r"state is of parameter `0\.weight`, which the model does not have"):
        OptimizerState(nn.Linear(2, 2), other, lambda name, value: True).load_state_dict(counters)


@pytest.mark.parametrize(
    ("name", "args", "keys"),
    [
        ("SparseAdam", {}, ["exp_avg", "exp_avg_sq"]),
        ("Adagrad", {}, ["sum"]),
        ("SGD", {}, []),
        ("SGD", {"momentum": 0.9}, ["momentum_buffer"]),
    ],
)
def test_state_for_sparse_gradients_is_dense(name: str, args: dict[str, Any], keys: list[str]) -> None:
    module = nn.Embedding(7, 2, sparse=True)
    optimizer = make(module, name, args)
    assert sparse_parameters(module) == {module.weight}
    made = list(materialise(optimizer, names(module), sparse_parameters(module)))
    assert [key for _, key, _ in made] == keys
    assert all(t.layout is torch.strided and t.shape == (7, 2) for _, _, t in made)
    assert optimizer.state[module.weight].get("step", 0) == 0


def test_an_optimizer_that_takes_no_sparse_gradients_is_refused() -> None:
    module = nn.Sequential(nn.Embedding(7, 2, sparse=True), nn.Linear(2, 2))
    for name, message in (("Adam", "does not support sparse"), ("SparseAdam", "does not support dense")):
        with pytest.raises(TaskError, match=message):
            list(materialise(make(module, name, {}), names(module), sparse_parameters(module)))
    tied = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 4))
    tied[1].weight = tied[0].weight
    assert sparse_parameters(tied) == set(), "its gradient is a sum of a sparse and a dense one"


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_state_of_a_wrapped_model_has_the_names_of_the_plain_one(wrap: Any) -> None:
    plain, within = model(), model()
    for module in (plain, within):
        module[2].bias.requires_grad_(False)
    wrapped = wrap(within)
    optimizers = [make(m, "Adam", {}) for m in (plain, wrapped)]
    step(plain, optimizers[0], 0)
    theirs, ours = (
        OptimizerState(m, o, lambda *_: True) for m, o in zip((plain, wrapped), optimizers, strict=True)
    )
    list(materialise(optimizers[1], names(wrapped)))
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[k], v) for k, v in theirs.state_dict().items())
    prefix = next(iter(dict(wrapped.named_parameters()))).partition(".")[0]
    ours.load_state_dict({f"{prefix}.{key}": value for key, value in theirs.state_dict().items()})


def test_complex_state_is_saved_as_pairs() -> None:
    module = nn.Module()
    module.phase = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128))
    optimizer = make(module, "Adam", {})
    module.phase.abs().sum().backward()
    optimizer.step()
    state = OptimizerState(module, optimizer, lambda name, _: True).state_dict()
    assert state["phase/exp_avg"].dtype is torch.float64
    assert state["phase/exp_avg"].shape == (2, 2)
    saved = {key: value.clone() for key, value in state.items()}
    before = optimizer.state[module.phase]["exp_avg"].clone()
    optimizer.state[module.phase]["exp_avg"].zero_()
    OptimizerState(module, optimizer, lambda name, _: True).load_state_dict(saved)
    assert torch.equal(optimizer.state[module.phase]["exp_avg"], before)
    assert before.abs().min() > 0
