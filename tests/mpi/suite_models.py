"""Models out of the ordinary, on every rank of a real job: see test_models.py."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hvd_train
from hvd_train.algorithm import averaging
from hvd_train.comm.base import Communicator
from hvd_train.comm.factory import connect
from hvd_train.config import Config, DataConfig, EvaluateConfig, OptimConfig, StopConfig, SyncConfig
from hvd_train.errors import RanksDisagree, UserError, ViewReplaced
from tests.mpi import odd_models
from tests.mpi.odd_models import Odd

ADAM = OptimConfig(name="AdamW", lr=0.01, clip_norm=1.0, accumulate=2)
PLAIN = OptimConfig(args={"momentum": 0.0}, clip_norm=0.5, accumulate=2)

TRAINS: list[tuple[type[Odd], OptimConfig]] = [
    (odd_models.BatchNorm, OptimConfig()),
    (odd_models.FrozenNorm, OptimConfig()),
    (odd_models.Standardised, OptimConfig()),
    (odd_models.Lazy, ADAM),
    (odd_models.LazyTied, ADAM),
    (odd_models.Extra, OptimConfig()),
    (odd_models.Complex, ADAM),
    (odd_models.Complex, OptimConfig()),
    (odd_models.Buffers, OptimConfig()),
    (odd_models.Caching, OptimConfig()),
    (odd_models.Compiled, ADAM),
    (odd_models.PartlyCompiled, OptimConfig()),
    (odd_models.Parallel, OptimConfig()),
    (odd_models.Scripted, OptimConfig()),
    (odd_models.Parametrised, ADAM),
    (odd_models.OldWeightNorm, OptimConfig()),
    (odd_models.ZeroSize, ADAM),
    (odd_models.Half, ADAM),
    (odd_models.Half, OptimConfig()),
    (odd_models.Mixed, ADAM),
    (odd_models.Toggled, OptimConfig()),
    (odd_models.Sparse, OptimConfig()),
    (odd_models.Sparse, PLAIN),
    (odd_models.Sparse, OptimConfig(name="Adagrad", clip_norm=0.5)),
    (odd_models.OnlySparse, OptimConfig(name="SparseAdam", lr=0.01)),
    (odd_models.UnknownSparse, OptimConfig(name="Adagrad", accumulate=2)),
    (odd_models.UnknownSparse, OptimConfig()),
]


REMEMBERS = (odd_models.Toggled, odd_models.Caching, odd_models.Scripted)
"""What they do depends on what this process did before, which no checkpoint knows; TorchScript optimises
itself after some calls."""


@pytest.fixture(scope="module")
def comm() -> Iterator[Communicator]:
    with connect() as comm:
        assert comm.size == int(os.environ["SUITE_RANKS"])
        yield comm


@pytest.fixture
def config() -> Config:
    """65 rows, 33 of them on rank 0: with batches of 16 or 32 the last of an epoch would have one row."""
    folder = Path(os.environ["SUITE_FOLDER"])
    return Config(
        runs=str(folder / "runs"),
        threads=1,
        data=DataConfig(path=str(folder / "data" / "*.h5"), batch_size=16, validation=str(folder / "v.h5")),
        sync=SyncConfig(period=3),
        stop=StopConfig(patience=0, max_rounds=4),
        evaluate=EvaluateConfig(every_epochs=1, every_rounds=1, batch_size=32),
    )


def train(config: Config, task: Odd, comm: Communicator, **changed: Any) -> Path:
    return hvd_train.train(dataclasses.replace(config, **changed), task, comm).run


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def saved(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("task", "optim"), TRAINS, ids=[f"{t.__name__}-{o.name}{len(o.args)}" for t, o in TRAINS]
)
def test_it_trains_is_resumed_and_loads(
    task: type[Odd], optim: OptimConfig, comm: Communicator, config: Config
) -> None:
    name = f"{task.__name__}-{optim.name}{len(optim.args)}"
    config = dataclasses.replace(config, optim=optim)
    whole = train(config, task(), comm, name=f"{name}-whole")
    train(config, task(), comm, name=f"{name}-parts", stop=dataclasses.replace(config.stop, max_rounds=2))
    parts = train(config, task(), comm, resume=str(whole.parent / f"{name}-parts"))
    expected, found = saved(whole), saved(parts)
    assert expected.keys() == found.keys()
    if task not in REMEMBERS:
        for key, value in expected.items():
            assert bits(value) == bits(found[key]), key
    model = hvd_train.load_model(whole, "latest", task())
    plain = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    assert len(plain) == len(expected)
    assert not any("_orig_mod" in key for key in expected)
    instance = task()
    batch = {"inputs": torch.rand(5, 6), "targets": torch.zeros(5, dtype=torch.long)}
    assert torch.isfinite(instance.loss(model, instance.transform(batch))[0])
    before = comm.allgather([float(v.double().abs().sum()) for v in expected.values() if not v.is_complex()])
    assert before[0] == before[-1]


def test_a_run_goes_on_with_a_compiled_model_or_without(comm: Communicator, config: Config) -> None:
    config = dataclasses.replace(config, optim=ADAM)
    first = dataclasses.replace(config.stop, max_rounds=2)
    whole = saved(train(config, odd_models.Plain(), comm, name="plain"))
    for one, other in ((odd_models.Plain, odd_models.Compiled), (odd_models.Compiled, odd_models.Plain)):
        run = train(config, one(), comm, name=f"{one.__name__}-first", stop=first)
        found = saved(train(config, other(), comm, resume=str(run)))
        assert {k: bits(v) for k, v in found.items()} == {k: bits(v) for k, v in whole.items()}


REFUSED: list[tuple[type[Odd], OptimConfig, str]] = [
    (odd_models.QuantisedBuffer, OptimConfig(), r"state `w` is quantized \(torch.qint8\)"),
    (odd_models.SparseBuffer, OptimConfig(), "state `w` is of layout torch.sparse_coo"),
    (odd_models.ForeignState, OptimConfig(), "state `_extra_state` is dict"),
    (odd_models.LazyAside, OptimConfig(), "`aside.weight` has no shape"),
    (odd_models.Elsewhere, OptimConfig(), "state `away` is on meta"),
    (odd_models.SparseParameter, OptimConfig(), "`matrix` is of layout torch.sparse_coo"),
    (odd_models.Sparse, OptimConfig(name="Adam"), "Adam does not support sparse gradients"),
    (odd_models.Sparse, OptimConfig(name="SparseAdam"), "SparseAdam does not support dense gradients"),
    (odd_models.BatchNorm, OptimConfig(), r"`0` \(BatchNorm1d\) cannot train on a batch of one row"),
]


@pytest.mark.parametrize(
    ("task", "optim", "message"), REFUSED, ids=[f"{t.__name__}-{o.name}" for t, o, _ in REFUSED]
)
def test_it_is_refused_with_its_name_before_the_first_step(
    task: type[Odd], optim: OptimConfig, message: str, comm: Communicator, config: Config
) -> None:
    if task is odd_models.BatchNorm:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=1))
    with pytest.raises(UserError, match=message) as raised:
        train(config, task(), comm, name=f"refused-{task.__name__}-{optim.name}", optim=optim)
    assert raised.value.agreed
    assert "\n" not in str(raised.value)


def test_frozen_tensors_come_from_rank_0_in_pieces(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of 7 bytes: fewer than some elements have, and no divisor of any tensor."""
    monkeypatch.setattr(averaging, "PIECE_BYTES", 7)
    torch.manual_seed(10 + comm.rank)
    model = odd_models.Image()
    model.positions = (torch.arange(6) * (comm.rank + 1)).expand(4, 6)
    model.mask = torch.rand(8, 8)[::2] < 0.5
    model.small = torch.rand(5).to(torch.float8_e4m3fn)
    model.graph = torch.diag(torch.rand(8)).to_sparse()
    model.frozen.bias.data = torch.rand(3, 4, 2).permute(2, 0, 1)[..., 1:].reshape(2, 9)[:, ::2]
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    places = {name: t.data_ptr() for name, t in held.items() if t.layout is torch.strided}
    names = [
        "frozen.weight",
        "frozen.bias",
        "positions",
        "mask",
        "small",
        "graph",
        "norm.num_batches_tracked",
    ]
    before = comm.allgather({name: held[name].detach().to_dense().float().tolist() for name in names})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    hvd_train.Averager(model, optimizer, comm)
    after = {name: held[name].detach().to_dense().float().tolist() for name in names}
    assert after == before[0]
    assert all(before[0][name] != before[1][name] for name in names[:-1])
    assert all(held[name].data_ptr() == places[name] for name in names if name in places)


def test_frozen_tensors_that_differ_in_shape_are_refused(comm: Communicator) -> None:
    model = odd_models.mlp()
    model.register_buffer("table", torch.zeros(3 + comm.rank, dtype=torch.long))
    with pytest.raises(
        RanksDisagree,
        match=r"`table torch.int64 \(3,\) of rank 0` where rank 1 has `table torch.int64 \(4,\)",
    ):
        hvd_train.Averager(model, torch.optim.SGD(model.parameters(), lr=0.1), comm)


def test_a_parameter_that_appears_in_training_is_named(comm: Communicator, config: Config) -> None:
    with pytest.raises(ViewReplaced, match="parameter `shift` appeared after the flat state was laid out"):
        train(config, odd_models.LateParameter(), comm, name="late")
