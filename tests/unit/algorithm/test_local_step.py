"""The optimizer that a name and arguments give, and the local step against plain torch."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from hvd_train.algorithm.flat_state import FlatState
from hvd_train.algorithm.gradients import Gradients
from hvd_train.algorithm.local_step import LocalStep, make_optimizer
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import ModelConfig, OptimConfig
from hvd_train.data.format import FieldSpec, SampleSpec
from hvd_train.errors import ConfigError, TaskError
from hvd_train.tasks.base import Batch, Task
from hvd_train.tasks.built_in import Classification

SPEC = SampleSpec(
    inputs="x",
    targets="y",
    fields={"x": FieldSpec(shape=(6,), dtype="float64"), "y": FieldSpec(shape=(), dtype="int64")},
    num_classes=3,
)
WEIGHTS = (0.5, 2.0, 1.0)


def batches(*sizes: int) -> list[Batch]:
    rng = torch.Generator().manual_seed(7)
    return [
        {
            "x": torch.randn(n, 6, generator=rng, dtype=torch.float64),
            "y": torch.randint(3, (n,), generator=rng),
        }
        for n in sizes
    ]


def together(parts: list[Batch]) -> Batch:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def start(config: OptimConfig) -> tuple[nn.Module, LocalStep, Task]:
    torch.manual_seed(3)
    task = Classification(ModelConfig(hidden=(5,)), WEIGHTS)
    model = task.build_model(SPEC).double()
    return model, LocalStep(Gradients(model, task, config), make_optimizer(model, config), config), task


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_accumulated_batches_equal_one_large_batch(name: str, clip_norm: float) -> None:
    config = OptimConfig(name=name, lr=0.1, clip_norm=clip_norm, accumulate=3)
    accumulated, step, _ = start(config)
    large, large_step, _ = start(config)
    for _ in range(5):
        parts = batches(4, 7, 2)
        loss_sum, n, _ = step(parts)
        assert n == 13
        assert loss_sum == pytest.approx(large_step([together(parts)])[0], rel=1e-12)
    torch.testing.assert_close(flat(accumulated), flat(large), rtol=0, atol=1e-13)


def test_sgd_without_arguments_is_nesterov_momentum() -> None:
    model, step, task = start(OptimConfig(lr=0.1))
    reference = task.build_model(SPEC).double()
    reference.load_state_dict(model.state_dict())
    velocity = [torch.zeros_like(p) for p in reference.parameters()]
    for batch in batches(8, 8, 5):
        step([batch])
        loss, _ = task.loss(reference, batch)
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        with torch.no_grad():
            for p, g, v in zip(reference.parameters(), gradients, velocity, strict=True):
                v.mul_(0.9).add_(g)
                p.sub_(0.1 * (g + 0.9 * v))
    torch.testing.assert_close(flat(model), flat(reference), rtol=0, atol=1e-14)


def test_clipping_scales_the_gradient_down_to_the_norm() -> None:
    plain = {"momentum": 0.0}
    model, step, task = start(OptimConfig(lr=1.0, clip_norm=0.01, args=plain))
    before = flat(model).clone()
    batch = batches(9)[0]
    gradients = torch.autograd.grad(task.loss(model, batch)[0], list(model.parameters()))
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    assert norm > 0.01
    step([batch])
    assert (flat(model) - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_bf16_keeps_parameters_and_gradients_in_float32() -> None:
    torch.manual_seed(3)
    seen = []

    class Spy(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            outputs = super().forward(inputs)
            seen.append(outputs.dtype)
            return outputs

    class Own(Task):
        def build_model(self, spec: SampleSpec) -> nn.Module:
            return Spy(6, 3)

        def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
            return nn.functional.cross_entropy(model(batch["x"]), batch["y"]), len(batch["y"])

    config = OptimConfig(precision="bf16")
    task = Own()
    model = task.build_model(SPEC)
    before = flat(model).clone()
    loss_sum, n, _ = LocalStep(Gradients(model, task, config), make_optimizer(model, config), config)(
        [{**batch, "x": batch["x"].float()} for batch in batches(8)]
    )
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {
        p.grad.dtype for p in model.parameters() if p.grad is not None
    }
    assert not torch.equal(flat(model), before)
    assert 0 < loss_sum / n < 5


def test_frozen_parameters_stay_and_a_model_of_them_alone_is_refused() -> None:
    torch.manual_seed(3)
    task = Classification(ModelConfig(hidden=(5,)))
    model = task.build_model(SPEC).double()
    frozen = next(model.parameters()).requires_grad_(False)
    before = frozen.clone()
    config = OptimConfig(args={"weight_decay": 0.1})
    optimizer = make_optimizer(model, config)
    LocalStep(Gradients(model, task, config), optimizer, config)(batches(8))
    assert all(p is not frozen for p in optimizer.param_groups[0]["params"])
    assert torch.equal(frozen, before)
    with pytest.raises(TaskError, match="Mlp has no parameter that requires a gradient"):
        make_optimizer(model.requires_grad_(False), config)


def test_no_sample_no_step() -> None:
    model, step, _ = start(OptimConfig(lr=0.1))
    step(batches(4))
    before = flat(model).clone()
    assert step([]) == (0.0, 0, 0.0)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize(
    "name",
    [n for n in dir(torch.optim) if n[0].isupper() and n not in ("LBFGS", "SparseAdam", "Muon", "Optimizer")],
)
def test_every_class_of_torch_optim_takes_the_learning_rate_and_steps(name: str) -> None:
    model, step, _ = start(OptimConfig(name=name, lr=0.01))
    before = flat(model).clone()
    first, n, _ = step(batches(16))
    for _ in range(60):
        last, _, _ = step(batches(16))
    assert torch.isfinite(flat(model)).all()
    assert not torch.equal(flat(model), before)
    assert last / n < first / n


def test_arguments_reach_the_class() -> None:
    model, _, _ = start(OptimConfig())
    args = {"betas": (0.8, 0.95), "weight_decay": 0.2, "amsgrad": True}
    group = make_optimizer(model, OptimConfig(name="AdamW", lr=0.02, args=args)).param_groups[0]
    assert {key: group[key] for key in (*args, "lr", "fused")} == {**args, "lr": 0.02, "fused": True}
    looped = make_optimizer(model, OptimConfig(args={"foreach": False})).param_groups[0]
    assert (looped["momentum"], looped["foreach"], looped["fused"]) == (0, False, None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimConfig(name="sgd"), "optim.name = 'sgd': expected a class of torch.optim. Did you mean `SGD`?"),
        (OptimConfig(name="AdaMW2"), "Did you mean `AdamW`?"),
        (OptimConfig(name="Optimizer"), "expected a class of torch.optim."),
        (OptimConfig(name="lr_scheduler"), "There are ASGD, Adadelta,"),
        (
            OptimConfig(name="LBFGS"),
            "optim.name = 'LBFGS' cannot be used: it evaluates the loss several times",
        ),
        (
            OptimConfig(args={"momentun": 0.9}),
            "optim.args.momentun is unknown; expected an argument of torch.optim.SGD",
        ),
        (OptimConfig(args={"momentun": 0.9}), "Did you mean `momentum`?"),
        (OptimConfig(args={"lr": 0.9}), "optim.args.lr = 0.9: expected the rate in optim.lr. Move it there."),
        (OptimConfig(args={"params": 1}), "optim.args.params is unknown"),
        (
            OptimConfig(args={"nesterov": True}),
            "torch.optim.SGD cannot be made with lr = 0.05, args = {'nesterov': True}",
        ),
        (OptimConfig(name="Adam", args={"betas": "high"}), "torch.optim.Adam cannot be made with"),
    ],
)
def test_invalid_optimizers(config: OptimConfig, message: str) -> None:
    model, _, _ = start(OptimConfig())
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_optimizer(model, config)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.ones(()), "Own.loss returned Tensor; expected (mean loss, number of samples)"),
        ((torch.ones((), requires_grad=True), 2.0), "Own.loss returned 2.0 as the number of samples;"),
        ((torch.ones(3, requires_grad=True), 3), "Own.loss returned a tensor of shape [3] as the loss;"),
        ((torch.ones(()), 3), "Own.loss returned a tensor of shape [] without a gradient as the loss;"),
        ((0.5, 3), "Own.loss returned float as the loss;"),
    ],
)
def test_a_loss_that_is_not_a_tensor(result: object, message: str) -> None:
    class Own(Task):
        def build_model(self, spec: SampleSpec) -> nn.Module:
            return nn.Linear(6, 3)

        def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
            return result  # type: ignore[return-value]

    task = Own()
    model = task.build_model(SPEC)
    step = LocalStep(
        Gradients(model, task, OptimConfig()), make_optimizer(model, OptimConfig()), OptimConfig()
    )
    with pytest.raises(TaskError, match=re.escape(message)):
        step(batches(3))


class Embedded(Task):
    """Rows of a table: with sparse gradients or with dense ones, which must train alike."""

    def __init__(self, sparse: bool, announced: bool = True) -> None:
        self._sparse, self._announced = sparse, announced

    def build_model(self, spec: SampleSpec) -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(
            nn.Embedding(20, 3, sparse=self._sparse and self._announced), nn.Flatten(), nn.Linear(12, 2)
        )

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        if self._sparse and not self._announced:
            rows = nn.functional.embedding(batch["x"], model[0].weight, sparse=True)
            return model[2](rows.flatten(1)).square().mean(), len(batch["x"])
        return model(batch["x"]).square().mean(), len(batch["x"])


def trained(task: Embedded, config: OptimConfig) -> Tensor:
    model = task.build_model(SPEC).double()
    optimizer = make_optimizer(model, config)
    FlatState(model, optimizer, SoloCommunicator()).place()
    step = LocalStep(Gradients(model, task, config), optimizer, config)
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        step([{"x": torch.randint(0, 20, (n, 4), generator=generator)} for n in (5, 3)[: config.accumulate]])
    return flat(model)


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip_norm", [0.0, 0.01])
@pytest.mark.parametrize(("name", "args"), [("SGD", {}), ("SGD", {"momentum": 0.0}), ("Adagrad", {})])
def test_sparse_gradients_train_like_dense_ones(
    name: str, args: dict[str, float], clip_norm: float, accumulate: int, announced: bool
) -> None:
    config = OptimConfig(name=name, lr=0.1, args=args, clip_norm=clip_norm, accumulate=accumulate)
    sparse, dense = (trained(Embedded(kind, announced), config) for kind in (True, False))
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-14)
    assert not torch.equal(sparse, flat(Embedded(True).build_model(SPEC).double()))


def test_sparse_gradients_that_nothing_announced_are_refused_in_the_first_step() -> None:
    with pytest.raises(TaskError, match="AdamW cannot use the sparse gradients of this model: Adam"):
        trained(Embedded(True, announced=False), OptimConfig(name="AdamW", lr=0.1))
