"""Running statistics that are computed anew: against torch's on one rank; more ranks are in tests/mpi."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from hvd_train import update_batch_norm
from hvd_train.algorithm.batch_norm import TrainingBatches, batch_norms
from hvd_train.comm.agree import SetupFailed
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import Config, EvaluateConfig, OptimConfig, StopConfig, SyncConfig
from hvd_train.data.deal import Span
from hvd_train.data.format import FieldSpec, SampleSpec
from hvd_train.data.rows import Rows
from hvd_train.data.screen import Screen
from hvd_train.errors import ConfigError, TaskError
from hvd_train.record.reports import EvaluationReport
from hvd_train.run.saved_checkpoint import SavedCheckpoint
from tests.unit.normed import Normed, WithoutDropout
from tests.unit.trainings import Same, resumed, small, train


def network(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), *middle, nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5)
    ).double()


def batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(size, 2, 4, 4, generator=generator).double() * (i + 1) + i for i, size in enumerate(sizes)
    ]


def statistics(model: nn.Module) -> list[Tensor]:
    return [
        t for layer in batch_norms(model) for t in (layer.running_mean, layer.running_var) if t is not None
    ]


def test_one_batch_is_what_torch_finds() -> None:
    ours, theirs = network(), network()
    update_batch_norm(ours, batches(12), SoloCommunicator())
    update_bn(batches(12), theirs)
    for a, b in zip(statistics(ours), statistics(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_of_several_batches_the_variance_has_that_of_their_means() -> None:
    """torch takes the mean of the variances of the batches: what their means are apart is missing there."""
    ours, theirs = network(), network()
    update_batch_norm(ours, batches(8, 8, 8), SoloCommunicator())
    update_bn(batches(8, 8, 8), theirs)
    mean, variance, torchs_mean, torchs_variance = (*statistics(ours)[:2], *statistics(theirs)[:2])
    torch.testing.assert_close(mean, torchs_mean, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        values = torch.cat([ours[0](batch) for batch in batches(8, 8, 8)]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(variance, values.var(1), rtol=1e-12, atol=1e-12)
    means = values.view(4, 3, -1).mean(2)
    n = 8 * 2 * 2
    within = torchs_variance * (n - 1) * 3
    between = n * (means - means.mean(1, keepdim=True)).square().sum(1)
    torch.testing.assert_close(variance, (within + between) / (3 * n - 1), rtol=1e-12, atol=1e-12)


def test_nothing_else_changes() -> None:
    """Modes, momenta, counts, other buffers, and the random generator, from which dropout does not draw."""
    model = network(nn.Dropout(0.5))
    model.register_buffer("other", torch.ones(2))
    model[1].momentum = None
    model[5].momentum = 0.3
    model[2].eval()
    model(batches(4)[0])
    before = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    update_batch_norm(model, batches(6, 5), SoloCommunicator())
    assert [m.training for m in model.modules()] == [True, True, True, False, True, True, True]
    assert (model[1].momentum, model[5].momentum) == (None, 0.3)
    assert not model[1]._forward_hooks
    assert torch.equal(torch.get_rng_state(), generator)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["1.running_mean", "1.running_var", "5.running_mean", "5.running_var"]
    again = copy.deepcopy(model.state_dict())
    update_batch_norm(model, batches(6, 5), SoloCommunicator())
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


def test_layers_that_are_frozen_or_keep_nothing_are_left_alone() -> None:
    model = network(nn.BatchNorm2d(4, track_running_stats=False).double())
    model[1].eval()
    before = statistics(network())[:2]
    update_batch_norm(model, batches(6), SoloCommunicator())
    assert batch_norms(model) == [model[5]]
    assert torch.equal(model[1].running_mean, before[0])
    assert not torch.equal(model[5].running_mean, torch.zeros(5).double())


def test_a_batch_that_is_not_finite_and_a_layer_that_sees_nothing() -> None:
    model, clean = network(), network()
    poisoned = batches(6, 5)
    poisoned[1][0, 0, 0, 0] = float("nan")
    model[1].running_mean.fill_(float("nan"))
    update_batch_norm(model, poisoned, SoloCommunicator())
    update_batch_norm(clean, poisoned[:1], SoloCommunicator())
    assert all(torch.equal(a, b) for a, b in zip(statistics(model), statistics(clean), strict=True))
    before = copy.deepcopy(model.state_dict())
    update_batch_norm(model, [], SoloCommunicator())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_failing_pass_leaves_the_model_as_it_was() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        update_batch_norm(model, [*batches(6), torch.ones(1)], SoloCommunicator())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model[1].momentum == 0.1
    assert not model[1]._forward_hooks


def test_a_model_without_batch_norm_is_refused() -> None:
    with pytest.raises(
        TaskError, match=r"^Linear has no batch norm with running statistics in training mode"
    ):
        update_batch_norm(nn.Linear(2, 2), [], SoloCommunicator())


@pytest.mark.parametrize(
    ("size", "count", "expected"),
    [
        (4, 2, [[0, 2, 5, 7], [1, 3, 6, 8]]),
        (3, 9, [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]),
        (20, 9, [list(range(10))]),
    ],
)
def test_each_batch_goes_from_one_end_of_the_rows_to_the_other(
    size: int, count: int, expected: list[list[int]], tmp_path: Path
) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("inputs", data=np.arange(10.0, dtype=np.float32))
    fields = {"inputs": FieldSpec(shape=(), dtype="float32")}
    rows = Rows([Span(str(tmp_path / "a.h5"), 0, 4), Span(str(tmp_path / "a.h5"), 4, 10)], fields)
    found = TrainingBatches(rows, Same(), batch_size=size, count=count)
    assert [batch["inputs"].tolist() for batch in found] == expected
    assert [batch["inputs"].tolist() for batch in found] == expected
    assert list(TrainingBatches(Rows([], fields), Same(), batch_size=size, count=count)) == []


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return replace(
        small(tmp_path),
        sync=SyncConfig(period=2),
        optim=OptimConfig(name="AdamW", lr=0.01),
        stop=StopConfig(patience=0, max_rounds=7),
        evaluate=EvaluateConfig(every_epochs=0, every_rounds=2),
    )


def fresh(config: Config, name: str, batches: int = 1000) -> Config:
    return replace(config, name=name, evaluate=replace(config.evaluate, batch_norm_batches=batches))


def saved(config: Config, name: str, pointer: str = "latest") -> dict[str, Tensor]:
    folder = Path(config.runs) / name / "checkpoints"
    return load_file(folder / (folder / pointer).read_text().strip() / "model.safetensors")


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_gives_the_same_bits(ranks: int, config: Config) -> None:
    task = Normed if ranks == 1 else WithoutDropout
    train(replace(config, name="plain"), ranks, task())
    train(fresh(config, "fresh"), ranks, task())
    plain, ours = saved(config, "plain"), saved(config, "fresh")
    unlike = [name for name in plain if not torch.equal(plain[name], ours[name])]
    assert unlike == [n for n in plain if "running" in n]
    for rank in range(ranks):
        one, two = (
            SavedCheckpoint.open(Path(config.runs) / name / "checkpoints" / "round-7").parts(rank)
            for name in ("plain", "fresh")
        )
        assert one["worker"] == two["worker"]
        assert ranks > 1 or torch.equal(one["random"]["torch"], two["random"]["torch"])


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    "changes", [{}, {"batch_norm": "keep"}, {"every_rounds": {"buffers": 3}}, {"ema": 0.5}]
)
def test_all_ranks_and_the_checkpoints_have_the_statistics_of_all_rows(
    ranks: int, changes: dict[str, Any], config: Config
) -> None:
    one = fresh(replace(config, sync=replace(config.sync, **changes)), "r")
    recorders = train(one, ranks, WithoutDropout())
    values = []
    for name in ("a", "b"):
        with h5py.File(Path(config.runs).parent / f"{name}.h5") as file:
            values.append(file["inputs"][:])
    rows = torch.from_numpy(np.concatenate(values)).double()
    expected = rows.mean(0).float(), rows.var(0).float()
    models = [r.training.checkpoints.model.state_dict() for r in recorders if r.training]
    for state in (*models, saved(config, "r"), saved(config, "r", "best")):
        torch.testing.assert_close(state["first.running_mean"], expected[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(state["first.running_var"], expected[1], rtol=1e-6, atol=0)
    for name in ("layers.1.running_mean", "layers.1.running_var"):
        assert all(torch.equal(state[name], models[0][name]) for state in models)


def test_a_resumed_run_gives_the_same_bits(config: Config) -> None:
    config = replace(config, data=replace(config.data, validation=0.2))
    whole = train(fresh(config, "whole", 3), 2, WithoutDropout())
    half = replace(fresh(config, "half", 3), stop=StopConfig(patience=0, max_rounds=4))
    found = [*train(half, 2, WithoutDropout())[0].of(EvaluationReport)]
    found += train(resumed(half, max_rounds=7), 2, WithoutDropout())[0].of(EvaluationReport)
    assert [(e.round, e.error) for e in found] == [(e.round, e.error) for e in whole[0].of(EvaluationReport)]
    a, b = saved(config, "whole"), saved(config, "half")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_does_not_go_together_is_refused_by_name(config: Config) -> None:
    with pytest.raises(SetupFailed) as caught:
        train(fresh(config, "r"), 1, Same())
    assert str(caught.value) == (
        "evaluate.batch_norm_batches: expected 0 with the model Mlp, which has no batch norm layer with "
        "running statistics in training mode."
    )
    with pytest.raises(
        ConfigError, match=r"^evaluate.batch_norm_batches = 9: expected 0 with sync.mode = 'none'"
    ):
        fresh(replace(config, sync=SyncConfig(mode="none")), "r", 9)
    with pytest.raises(ConfigError, match=r"^evaluate.batch_norm_batches = -1: expected 0 or more batches"):
        fresh(config, "r", -1)


def test_rows_that_are_left_out_are_not_used(tmp_path: Path) -> None:
    """Nor is a batch of which a single row is left."""
    values = np.array([1, np.nan, 3, 4, 5, np.nan], np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("inputs", data=values)
        file.create_dataset("targets", data=np.zeros(6, np.int64))
    fields = {"inputs": FieldSpec(shape=(), dtype="float32"), "targets": FieldSpec(shape=(), dtype="int64")}
    screen = Screen(SampleSpec(inputs="inputs", targets="targets", fields=fields), not_finite="skip")
    rows = Rows([Span(str(tmp_path / "a.h5"), 0, 6)], fields, screen=screen)
    found = TrainingBatches(rows, Same(), batch_size=3, count=2)
    assert [batch["inputs"].tolist() for batch in found] == [[1.0, 3.0, 5.0]]
    assert [len(b["inputs"]) for b in TrainingBatches(rows, Same(), batch_size=2, count=3)] == [2]
