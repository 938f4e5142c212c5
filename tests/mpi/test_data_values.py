"""Data that are not what they seem, on several ranks: what is said, once, whichever rank has the rows."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch

from hvd_train import load_model
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import DataConfig
from hvd_train.data.catalog import open_catalog
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from hvd_train.tasks.standardizing import standardize
from tests.launching import command, run
from tests.mpi.jobs import events
from tests.mpi.test_refusals import messages

pytestmark = pytest.mark.mpi

PROGRAM = """
import sys
from hvd_train import Config, connect, train
from hvd_train.config import DataConfig, StopConfig
from hvd_train.errors import UserError

with connect("auto") as comm:
    for name, more in {cases!r}.items():
        data = DataConfig(path=name, **more)
        config = Config(name=name, data=data, stop=StopConfig(patience=0, max_rounds=2))
        try:
            train(config, comm=comm)
        except UserError as error:
            print(f"hvd_train: {{comm.rank}} refused {{name}}: {{error}}", file=sys.stderr, flush=True)
"""


def shards(folder: Path, inputs: npt.NDArray[np.generic], targets: npt.NDArray[np.generic]) -> None:
    """Two files; with two ranks each rank has one."""
    folder.mkdir()
    for i, rows in enumerate(np.array_split(np.arange(len(inputs)), 2)):
        with h5py.File(folder / f"{i}.h5", "w") as file:
            file["inputs"] = inputs[rows]
            file["targets"] = targets[rows]


def test_messages_about_labels_scales_copies_and_values_that_are_not_finite(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(100, 6)).astype("f4")
    labels = np.arange(100) % 3
    minus, truth, ill = labels.copy(), labels == 1, inputs.copy()
    minus[93] = -2
    ill[70, 3] = np.nan
    named = np.where(truth, b"yes", b"no").astype("S5")
    named[93] = b"maybe"
    shards(tmp_path / "minus", inputs, minus)
    shards(tmp_path / "named", inputs, named)
    shards(tmp_path / "truth", inputs, truth)
    for name in ("ill", "refused", "skipped"):
        shards(tmp_path / name, ill, labels)
    shards(tmp_path / "bytes", rng.integers(0, 200, (100, 6)).astype("u1"), labels)
    shards(tmp_path / "twice", inputs, labels)
    (tmp_path / "twice" / "2.h5").hardlink_to(tmp_path / "twice" / "1.h5")
    write_part(tmp_path / "sorted", Arrays(inputs, labels), shards=2, by_class=True)
    shards(tmp_path / "far", 1e9 + rng.normal(size=(100, 6)), labels)
    names = ("minus", "truth", "ill", "bytes", "twice", "sorted")
    cases: dict[str, dict[str, object]] = {name: {} for name in names}
    cases["named"] = {"classes": ("no", "yes")}
    cases["far"] = {"standardize": "component"}
    cases["refused"] = {"not_finite": "error"}
    cases["skipped"] = {"not_finite": "skip", "batch_size": 5}
    program = PROGRAM.format(cases=cases)
    job = run(command("mpirun", 2, ["-c", program]), deadline_s=240, cwd=tmp_path)
    assert job.returncode == 0, job.output
    said = messages(job.stderr)
    refused = [line for line in said if " refused " in line]
    assert len(refused) == 8, said
    for rank in (0, 1):
        assert (
            f"hvd_train: {rank} refused minus: minus/1.h5: `targets` holds -2 in row 43; expected"
            in job.stderr
        )
        assert (
            f"hvd_train: {rank} refused named: named/1.h5: dataset `targets` holds `maybe` in "
            "row 43; expected one of data.classes: `no`, `yes`." in job.stderr
        )
        assert (
            f"hvd_train: {rank} refused refused: rank 1 of 2: refused/1.h5: `inputs` holds nan in row 20; "
            "expected finite numbers." in job.stderr
        )
        assert f"hvd_train: {rank} refused twice: twice/2.h5: the same file as twice/1.h5" in job.stderr
    not_finite, unscaled, alone, *others = [line for line in said if line not in refused]
    assert [line.partition(" numbers: ")[2].partition(";")[0] for line in others] == [
        "the run will end where it reads one. Replace them, or set data.not_finite = 'skip'",
        "their rows are left out",
    ]
    assert "ill/1.h5: `inputs` holds 1 NaN among 600 values, a share of 0.0017; expected" in not_finite
    assert "bytes/" in unscaled
    assert "h5: `inputs` is uint8 with values up to 199, and no scale is known" in unscaled
    assert "Give --data.scale" in unscaled
    assert "rank 0 alone has the classes 0 and 1; rank 1 alone has the class 2. Between" in alone
    (header,) = events(tmp_path / "runs" / "ill", "header")
    assert header["remarks"] == [not_finite.partition("hvd_train: ")[2]]
    assert (header["values"]["inputs"]["rows"], header["values"]["inputs"]["nan"]) == (100, 1)
    assert len(events(tmp_path / "runs" / "truth", "round")) == 2
    fault = events(tmp_path / "runs" / "ill", "fault")[0]
    assert fault["ranks"] == [1]
    assert (
        "were not finite: ill/1.h5: `inputs` holds nan in row 20. They took the others' mean."
        in fault["message"]
    )
    (fault,) = events(tmp_path / "runs" / "skipped", "fault")
    assert (fault["kind"], fault["ranks"], fault["rows"]["not_finite"]) == ("rows_left_out", [1], [0, 1])
    assert "(rank 1: 1); the first is skipped/1.h5: `inputs` holds nan in row 20." in (fault["message"])
    assert events(tmp_path / "runs" / "skipped", "stop")[0]["left_out"] == {"not_finite": 2}

    # The inputs of "far" are standardized, and with one process to the same bits.
    model = load_model(tmp_path / "runs" / "far", "latest")
    before = {name: value.clone() for name, value in model.named_buffers()}
    catalog = open_catalog(DataConfig(path=str(tmp_path / "far"), standardize="component"))
    standardize(model, catalog, SoloCommunicator())
    after = dict(model.named_buffers())
    assert after.keys() == before.keys() == {"inputs.mean", "inputs.deviation"}
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert before["inputs.mean"].dtype is torch.float64
    assert (before["inputs.mean"] > 9e8).all()
