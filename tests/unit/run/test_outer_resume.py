"""Whole trainings with an outer optimizer, clipping and outliers: resumed, on other ranks, switched on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
import xxhash
from safetensors.torch import load_file

from hvd_train.config import CheckpointConfig, Config, OptimConfig, StopConfig, SyncConfig
from hvd_train.io.sealed import seal
from hvd_train.record.reports import FaultReport, RoundReport
from hvd_train.run import packing
from hvd_train.run.saved_checkpoint import SavedCheckpoint
from tests.unit.outer_checkpoints import check_nesterov, kept, steps
from tests.unit.trainings import Drawn, Remembered, resumed, small, train

NESTEROV: dict[str, Any] = {"outer": "nesterov"}


def trained(config: Config, ranks: int) -> list[Remembered]:
    return train(config, ranks, Drawn())


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return replace(
        small(tmp_path),
        sync=SyncConfig(period=2),
        checkpoint=CheckpointConfig(every_rounds=1, keep=50),
        stop=StopConfig(patience=0, max_rounds=6),
    )


def having(config: Config, rounds: int = 6, name: str = "r", **sync: Any) -> Config:
    stop = StopConfig(patience=0, max_rounds=rounds)
    return replace(config, name=name, stop=stop, sync=replace(config.sync, **sync))


def run(config: Config) -> Path:
    return Path(config.runs) / config.name


@pytest.mark.parametrize(
    "sync",
    [
        NESTEROV,
        {"outer": "slowmo", "optimizer_state": "keep"},
        {"outer": "nesterov", "outer_schedule": "cosine", "outer_warmup": 2, "outer_total": 6},
        {"clip": 0.01, "ema": 0.5},
        {"outliers": "weigh"},
        {"outer": "slowmo", "outliers": "drop", "clip": 0.1, "outlier_warmup": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_gives_the_same_bits(ranks: int, sync: dict[str, Any], config: Config) -> None:
    whole, half = having(config, name="whole", **sync), having(config, 3, **sync)
    trained(whole, ranks)
    trained(half, ranks)
    trained(resumed(half, max_rounds=6), ranks)
    model, plain = (load_file(run(c) / "checkpoints/round-6/model.safetensors") for c in (half, whole))
    assert all(torch.equal(model[name], plain[name]) for name in model)
    for rank in range(ranks):
        folders = [run(c) / "checkpoints" / "round-6" / f"rank-{rank:05d}.safetensors" for c in (half, whole)]
        a, b = (load_file(folder) for folder in folders)
        assert a.keys() == b.keys()
        # The ranks are threads of one process: its generators are seeded by each of them.
        unlike = [name for name in a if not torch.equal(a[name], b[name])]
        assert [name for name in unlike if not name.startswith("random/")] == []


@pytest.mark.parametrize("ranks", [1, 3])
def test_momentum_is_dealt_anew(ranks: int, config: Config) -> None:
    trained(having(config, 3, **NESTEROV), 2)
    trained(resumed(having(config, **NESTEROV), max_rounds=6), ranks)
    check_nesterov(run(config), rounds=6, lr=0.7, momentum=0.9)


def test_it_can_be_switched_on_off_and_over(config: Config) -> None:
    """The momentum begins anew, the parameters go on; a run without an outer optimizer keeps none."""
    trained(having(config, 2), 2)
    assert kept(run(config) / "checkpoints" / "round-2") == {}
    trained(resumed(having(config, **NESTEROV), max_rounds=4), 2)
    check_nesterov(run(config), rounds=4, lr=0.7, momentum=0.9, first=3)
    trained(resumed(having(config, outer="slowmo"), max_rounds=5), 2)
    folder = run(config) / "checkpoints" / "round-5"
    assert steps(folder) == {1}
    assert {name.partition("/")[0] for name in kept(folder)} == {"slow_momentum"}
    trained(resumed(having(config), max_rounds=6), 2)
    assert kept(run(config) / "checkpoints" / "round-6") == {}


def test_a_checkpoint_from_before_goes_on(config: Config) -> None:
    """One that an earlier version wrote: without the parts `outer` and `outliers`."""
    trained(having(config, 2), 1)
    folder = run(config) / "checkpoints" / "round-2"
    states = SavedCheckpoint.open(folder).parts(0)
    tensors, plain = {}, {}
    for name, state in states.items():
        if name not in ("outer", "outliers"):
            own, plain[name] = packing.split(state)
            tensors |= {f"{name}/{key}": value for key, value in own.items()}
    rewrite(folder, "rank-00000.safetensors", packing.pack(tensors, plain))
    trained(resumed(having(config, outliers="drop", **NESTEROV), max_rounds=4), 1)
    check_nesterov(run(config), rounds=4, lr=0.7, momentum=0.9, first=3)


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Another content of a file, with a manifest that says so."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = {"num_bytes": len(content), "xxh3_64": xxhash.xxh3_64_hexdigest(content)}
    manifest = {
        k: v for k, v in manifest.items() if k in ("schema", "round", "world_size", "sample", "files")
    }
    manifest["files"][name] = entry
    (folder / "manifest.json").write_text(seal(manifest))


def test_a_rank_with_other_values_is_left_out_and_named(config: Config, tmp_path: Path) -> None:
    """Four rows of rank 0's shard are a hundred times as large as the others; each is in another batch."""
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["inputs"][20:24] = 3e4
    config = replace(config, optim=OptimConfig(lr=1e-4, args={"momentum": 0.0}))
    (recorder, *_) = trained(having(config, 24, outliers="drop", outlier_warmup=5, period=1), 3)
    faults = [f for f in recorder.of(FaultReport) if f.kind == "outlier"]
    assert [f.ranks for f in faults] == [(0,)] * 4
    weightless = {r.round: r.zero_weight for r in recorder.of(RoundReport)}
    assert {f.round for f in faults} == {round_ for round_, ranks in weightless.items() if ranks}
    for fault in faults:
        assert weightless[fault.round] == (0,)
        assert fault.message.startswith("the parameters of ranks [0] changed by ")
        assert fault.message.endswith("Left out of the average.")


def test_a_long_period_without_an_outer_optimizer_is_warned_about(
    config: Config, capfd: pytest.CaptureFixture[str]
) -> None:
    trained(having(config, 1, period=49), 1)
    expected = (
        "sync.period = 49 without an outer optimizer: above 48 local steps plain averaging tends to lose "
        "accuracy. Set sync.outer = 'nesterov', or a shorter period."
    )
    assert expected in " ".join(capfd.readouterr().err.split())
    trained(having(config, 1, "s", period=48), 1)
    trained(having(config, 1, "t", period=100, **NESTEROV), 1)
    assert "without an outer optimizer" not in capfd.readouterr().err
