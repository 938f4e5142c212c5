"""`model.compile`: the same training, one graph, compiled by one rank of a host, under the plain names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hvd_train
from tests.launching import command, run
from tests.mpi.compiled import Normed
from tests.mpi.jobs import events
from tests.mpi.test_models import write

pytestmark = pytest.mark.mpi


def saved(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    return load_file(folder / "model.safetensors")


def test_a_compiled_model_trains_as_the_plain_one(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, rows, seed in (("data/0.h5", 40, 0), ("data/1.h5", 32, 1), ("v.h5", 33, 2)):
        write(tmp_path / name, rows, seed)
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    job = run(command("mpirun", 2, ["-m", "tests.mpi.compiled", str(tmp_path)]), deadline_s=180, env=env)
    assert job.returncode == 0, job.output
    first, second = json.loads(job.stdout.splitlines()[-1])
    assert "compiled  by torch.compile, which took at most " in job.stdout
    # One graph for each precision, whatever the sizes of the last batches and of those of the evaluation.
    assert first["graphs"] == second["graphs"] == [1, 2]
    assert first["hits"] == 0 < second["hits"], "the second rank takes what the first has compiled"

    runs = tmp_path / "runs"
    plain, compiled, resumed = (saved(runs / name) for name in ("plain", "compiled", "resumed"))
    assert plain.keys() == compiled.keys() == resumed.keys()
    assert not any("_orig_mod" in name for name in compiled)
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5, msg=name)
    errors = [[e["metrics"] for e in events(runs / name, "evaluation")] for name in ("plain", "compiled")]
    assert [e["loss"] for e in errors[0]] == pytest.approx([e["loss"] for e in errors[1]], rel=1e-4)
    headers = [events(runs / name, "header")[-1] for name in ("plain", "compiled", "resumed")]
    assert [len(header["compile_s"]) for header in headers] == [0, 2, 2]
    assert headers[2]["round"] == 5
    model = hvd_train.load_model(runs / "resumed", "latest", Normed())
    assert type(model) is torch.nn.Sequential
    assert torch.isfinite(model(torch.rand(4, 6))).all()
