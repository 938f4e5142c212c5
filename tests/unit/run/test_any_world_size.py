"""A run that is interrupted within an epoch and goes on with any number of ranks uses every row once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from hvd_train.config import CheckpointConfig, Config, DataConfig, StopConfig, SyncConfig
from hvd_train.record.reports import RoundReport
from hvd_train.tasks.base import Batch
from tests.unit.data.shards import write_foreign
from tests.unit.trainings import Same, resumed, small, train

PRIMES = (11, 23, 37, 5, 53, 2, 31)
ROWS = sum(PRIMES)


class Recording(Same):
    """Remembers the rows of every batch, of all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        self.rows += batch["inputs"][:, 0].int().tolist()
        return super().loss(model, batch)


@pytest.fixture
def primes(tmp_path: Path) -> Config:
    """Seven shards of prime sizes."""
    config = small(tmp_path)
    for name in ("a.h5", "b.h5"):
        (tmp_path / name).unlink()
    for number, size in enumerate(PRIMES):
        write_foreign(tmp_path / f"s{number}.h5", size, sum(PRIMES[:number]))
    return replace(
        config,
        data=DataConfig(path=str(tmp_path / "*.h5"), batch_size=2),
        sync=SyncConfig(period=1),
        checkpoint=CheckpointConfig(keep=20),
    )


def epochs_of(rows: list[int], count: int) -> list[list[int]]:
    assert len(rows) == count * ROWS
    return [rows[i * ROWS : (i + 1) * ROWS] for i in range(count)]


@pytest.mark.parametrize(
    ("worlds", "data"),
    [
        ((3, 2, 5, 8, 1), {"reading": "memory"}),
        ((3, 2, 5, 8, 1), {"reading": "stream"}),
        ((1, 5, 5, 2, 3), {"reading": "memory", "redeal": "epoch"}),
        ((3, 2, 5, 1, 2), {"reading": "stream", "order": "global"}),
    ],
)
def test_every_row_once_an_epoch(
    worlds: tuple[int, ...], data: dict[str, Any], primes: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four changes within the first epoch, and four that each are in another one."""
    config = replace(primes, data=replace(primes.data, **data))
    task = Recording()
    progress = [0.0]
    for start, ranks in enumerate(worlds):
        stop = StopConfig(patience=0, max_rounds=2 * start + 2)
        config = replace(config, stop=stop, resume="auto" if start else "")
        progress += [r.epoch for r in train(config, ranks, task)[0].of(RoundReport)]
    assert progress[-1] < 1
    for start, ranks in enumerate(worlds):
        recorder = train(resumed(config, max_epochs=start + 1), ranks, task)[0]
        progress += [r.epoch for r in recorder.of(RoundReport)]
        if start + 1 < len(worlds):
            rounds = recorder.of(RoundReport)[-1].round
            progress += [
                r.epoch for r in train(resumed(config, max_rounds=rounds + 2), ranks, task)[0].of(RoundReport)
            ]
    assert progress == sorted(progress)
    assert progress[-1] == len(worlds)
    for rows in epochs_of(task.rows, len(worlds)):
        assert sorted(rows) == list(range(ROWS))
    said = capsys.readouterr().err
    assert "begins anew" not in said
    assert ("rows that it has left." in said) is (data.get("order") != "global")


@pytest.mark.parametrize("reading", ["memory", "stream"])
def test_the_rest_of_an_epoch_is_resumed_to_the_row(reading: str, primes: Config, tmp_path: Path) -> None:
    """Interrupted again within what was left: the rows come as if it had not been."""
    data = replace(primes.data, reading=reading)  # type: ignore[arg-type]
    orders = []
    for name, stops in (("whole", [2, None]), ("parts", [2, 5, 6, None])):
        task = Recording()
        config = replace(primes, name=name, data=data, stop=StopConfig(patience=0, max_rounds=2))
        for start, stop in enumerate(stops):
            limit = {"max_epochs": 2} if stop is None else {"max_rounds": stop}
            if start:
                config = resumed(config, **limit)
            train(config, 1 if start else 3, task)
        orders.append(task.rows[12:])  # after the first start, whose ranks are threads
    assert orders[0] == orders[1]
    checkpoints = tmp_path / "runs" / "parts" / "checkpoints"
    assert "legs" not in worker_state(checkpoints / "round-2")
    (leg,) = worker_state(checkpoints / "round-6")["legs"]
    assert (leg["parts"], leg["seed"], leg["batch_size"]) == (3, 0, 2)
    assert sorted(leg["positions"].values()) == [4, 4, 4]


def worker_state(checkpoint: Path) -> dict[str, object]:
    content = (checkpoint / "rank-00000.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    state: dict[str, object] = json.loads(header["__metadata__"]["state"])["worker"]
    return state


def test_other_rows_begin_the_epoch_anew(
    primes: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also within what was left."""
    task = Recording()
    train(primes, 3, task)
    train(resumed(primes, max_rounds=5), 2, task)
    assert len(task.rows) == 3 * 6 + 2 * 4
    shutil.copytree(tmp_path, tmp_path / "other", ignore=shutil.ignore_patterns("runs"))
    write_foreign(tmp_path / "other" / "s0.h5", 13)
    task.rows.clear()
    capsys.readouterr()
    data = replace(primes.data, path=str(tmp_path / "other" / "*.h5"))
    train(replace(resumed(primes, max_epochs=1), data=data), 2, task)
    assert len(task.rows) == ROWS + 2
    assert "epoch 1 begins anew." in capsys.readouterr().err


def test_a_start_between_two_epochs_says_nothing(primes: Config, capsys: pytest.CaptureFixture[str]) -> None:
    task = Recording()
    train(replace(primes, stop=StopConfig(patience=0, max_epochs=1)), 3, task)
    capsys.readouterr()
    train(resumed(primes, max_epochs=2), 2, task)
    assert [sorted(rows) for rows in epochs_of(task.rows, 2)] == [list(range(ROWS))] * 2
    assert capsys.readouterr().err == ""
