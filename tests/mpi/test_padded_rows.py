"""Rows of any length on two ranks: the same bits as of rows that were padded by hand, and after a resume."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd_train.after.trained import open_trained
from tests.launching import command, run
from tests.mpi.jobs import events, model_bytes
from tests.unit.data.ragged import PACKED, padded, rows_of_lengths, write_packed, write_vlen

pytestmark = pytest.mark.mpi

LENGTH = 9

PROGRAM = """
import sys
from hvd_train import Config, connect, train
from hvd_train.config import DataConfig, EvaluateConfig, StopConfig

with connect("auto") as comm:
    for name, rounds, resume, data in {cases!r}:
        config = Config(
            name=name,
            task="next-token",
            threads=1,
            data=DataConfig(path="data/*.h5", validation=0.2, batch_size=8, **data),
            evaluate=EvaluateConfig(every_rounds=2),
            stop=StopConfig(patience=0, max_rounds=rounds),
            resume=resume,
        )
        train(config, comm=comm)
"""


def test_the_same_bits_as_of_rows_padded_by_hand(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number in range(2):
        rows = rows_of_lengths(rng.integers(0, LENGTH + 1, 60 + number).tolist())
        with h5py.File(tmp_path / "data" / f"{number}.h5", "w") as file:
            write_vlen(file, "vlen", rows, chunks=(16,), compression="gzip")
            write_packed(file, rows)
            file["padded"], file["counts"] = padded(rows, LENGTH)
    tokens = {"inputs": "tokens", "targets": "tokens"}
    vlen = {**tokens, "fields": {"tokens": "vlen"}, "max_length": LENGTH}
    packed = {**tokens, "fields": {"tokens": PACKED}, "max_length": LENGTH}
    by_hand = {**tokens, "fields": {"tokens": "padded"}, "mask": "counts"}
    cases = [
        ("vlen", 6, "", vlen),
        ("packed", 6, "", packed),
        ("by_hand", 6, "", by_hand),
        ("parts", 3, "", packed),
        ("parts", 6, "auto", packed),
    ]
    job = run(command("mpirun", 2, ["-c", PROGRAM.format(cases=cases)]), deadline_s=240, cwd=tmp_path)
    assert job.returncode == 0, job.output
    runs = tmp_path / "runs"
    expected = model_bytes(runs / "by_hand")
    curve = {e["round"]: e["metrics"] for e in events(runs / "by_hand", "evaluation")}
    assert list(curve)[-1] == 6
    for name in ("vlen", "packed", "parts"):
        assert model_bytes(runs / name) == expected, name
        assert {e["round"]: e["metrics"] for e in events(runs / name, "evaluation")} == curve, name
    (header,) = events(runs / "vlen", "header")
    assert list(header["values"]) == ["tokens"]
    assert header["values"]["tokens"]["lowest"] == 1, "the padding, 0, is not counted"
    trained = open_trained(str(runs / "packed"), "latest")
    assert trained.saved.sample.mask_of("tokens") == "tokens_mask"
