"""From a task to a model that can be trained: lazy modules, modes, norms that need more than one row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvd_train.config import DataConfig
from hvd_train.data.catalog import Catalog, open_catalog
from hvd_train.errors import TaskError
from hvd_train.tasks.base import Batch, Task
from hvd_train.tasks.building import build, refuse_single_rows
from hvd_train.tasks.models import evaluating
from tests.unit.data.shards import write_foreign


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return open_catalog(DataConfig(path=str(write_foreign(tmp_path / "a.h5", 9))))


class Given(Task):
    """Trains the module that it is given."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def build_model(self, spec: object) -> nn.Module:
        return self.module  # type: ignore[no-any-return]

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return F.cross_entropy(model(batch["inputs"]), batch["targets"]), len(batch["targets"])


def test_lazy_modules_get_their_shapes_and_nothing_else_moves(catalog: Catalog) -> None:
    norm = nn.BatchNorm1d(3)
    model = build(
        Given(nn.Sequential(norm, nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Linear(5, 7))), catalog
    )
    assert [tuple(p.shape) for p in model.parameters()] == [
        (3,),
        (3,),
        (5, 3),
        (5,),
        (5,),
        (5,),
        (7, 5),
        (7,),
    ]
    assert all(module.training for module in model.modules())
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == [0, 0, 0]
    assert int(model.state_dict()["2.num_batches_tracked"]) == 0


def test_a_model_without_lazy_modules_is_not_run(catalog: Catalog) -> None:
    class Untouched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("nobody needs a forward pass")

    state = torch.get_rng_state()
    build(Given(Untouched(3, 7)), catalog)
    fresh = torch.get_rng_state()
    torch.set_rng_state(state)
    nn.Linear(3, 7)
    assert torch.equal(fresh, torch.get_rng_state())


def test_a_model_that_is_not_a_module_is_refused(catalog: Catalog) -> None:
    with pytest.raises(TaskError, match=r"build_model of Given returned 3; expected a torch\.nn\.Module"):
        build(Given(3), catalog)


def test_a_model_in_evaluation_mode_is_trained_whole(catalog: Catalog) -> None:
    model = build(Given(nn.Sequential(nn.Dropout(), nn.Linear(3, 7)).eval()), catalog)
    assert all(module.training for module in model.modules())


def test_a_module_that_was_put_into_evaluation_mode_stays_so(catalog: Catalog) -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 7), nn.Sequential(nn.Dropout(), nn.Dropout()))
    module[0].eval()
    module[2][1].eval()
    model = build(Given(module), catalog)
    expected = [True, False, True, True, True, False]
    assert [m.training for m in model.modules()] == expected
    with evaluating(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert [m.training for m in model.modules()] == expected
    assert torch.is_grad_enabled()


def test_modes_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout())
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert model[0].training


def test_a_model_that_overrides_train_gets_the_call() -> None:
    class Merging(nn.Linear):
        """Merges on the way to an evaluation, and undoes it on the way back."""

        calls: tuple[bool, ...] = ()

        def train(self, mode: bool = True) -> Merging:
            self.calls = (*self.calls, mode)
            return super().train(mode)

    model = nn.Sequential(Merging(1, 1))
    with evaluating(model):
        assert model[0].calls == (False,)
    assert model[0].calls == (False, True)


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(4, 7)
    )


def test_a_norm_that_cannot_train_on_one_row_is_named(catalog: Catalog) -> None:
    model = nn.Sequential(nn.Linear(3, 7), nn.Sequential(nn.BatchNorm1d(7)))
    with pytest.raises(TaskError) as raised:
        refuse_single_rows(model, Given(model), catalog, catalog.train, "there is one. Take more")
    expected = "`1.0` (BatchNorm1d) cannot train on a batch of one row, but there is one. Take more."
    assert str(raised.value) == expected


@pytest.mark.parametrize(
    "model",
    [
        convolution(),
        nn.Sequential(nn.Linear(3, 7), nn.LayerNorm(7)),
        nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7).eval()),
        nn.Sequential(nn.Linear(3, 7)),
    ],
    ids=["convolution", "layer norm", "frozen", "none"],
)
def test_other_norms_train_on_one_row(model: nn.Module, catalog: Catalog) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refuse_single_rows(model, Given(model), catalog, catalog.train, "there is one")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_rank_without_rows_is_not_asked(catalog: Catalog) -> None:
    model = nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7))
    refuse_single_rows(model, Given(model), catalog, (), "there is one")
