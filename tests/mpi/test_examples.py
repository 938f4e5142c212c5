"""Every example, run as examples/README.md says."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hvd_train import load_model
from hvd_train.config_file import embedded_config, load_config
from hvd_train.errors import TaskError
from hvd_train.io.user_module import load_module
from hvd_train.tools.shard import main as shard
from tests.launching import ROOT, command, run
from tests.mpi.jobs import events, train

EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.mpi


def write(out: Path, part: str, *options: str) -> None:
    assert shard(["write", *options, "--out", str(out), "--part", part]) == 0


def test_digits_are_the_embedded_default() -> None:
    assert load_config(EXAMPLES / "digits.toml") == embedded_config()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tabular")
    made = run([sys.executable, str(EXAMPLES / "tabular.py"), str(folder)], deadline_s=60)
    assert made.returncode == 0, made.output
    write(folder / "shards", "train", str(folder / "train.npz"), "--shards", "2")
    write(folder / "shards", "validation", str(folder / "validation.npz"))
    return folder


def test_your_own_task_comes_close_to_the_noise(table: Path, tmp_path: Path) -> None:
    options = ("--config", "examples/tabular.toml", "--data", str(table / "shards"), "--name", "table")
    train("mpirun", 2, tmp_path, *options, deadline_s=120)
    (stop,) = events(tmp_path / "table", "stop")
    assert stop["reason"] == "patience"
    assert 0.9 < stop["best"] < 1.2

    model = load_model(tmp_path / "table")
    with np.load(table / "validation.npz") as arrays:
        inputs, targets = torch.tensor(arrays["inputs"]), torch.tensor(arrays["targets"])
    with torch.no_grad():
        predicted = model(2 * inputs.float() - 1)
    assert float((predicted - targets.float()).square().mean()) == pytest.approx(stop["best"], rel=1e-4)


def test_a_transformer_learns_characters_and_can_be_sampled_and_exported(tmp_path: Path) -> None:
    made = run([sys.executable, "examples/characters.py", "write", str(tmp_path)], deadline_s=60)
    assert made.returncode == 0, made.output
    shards = tmp_path / "shards"
    with np.load(tmp_path / "validation.npz") as text:
        tokens = torch.from_numpy(text["inputs"][:5])
        np.savez(tmp_path / "short.npz", **{name: array[:200] for name, array in text.items()})
    write(shards, "train", str(tmp_path / "train.npz"), "--shards", "4", "--shuffle")
    write(shards, "validation", str(tmp_path / "short.npz"))
    short = ("--max-rounds", "6", "--batch-size", "8", "--period", "8", "--learning-rate.warmup", "128")
    options = ("--config", "examples/transformer.toml", "--data", str(shards), "--name", "text", *short)
    train("mpirun", 2, tmp_path, *options, deadline_s=120)
    (stop,) = events(tmp_path / "text", "stop")
    assert stop["best"] < 36, "a model that knows nothing has 96"
    best = [e["metrics"] for e in events(tmp_path / "text", "evaluation")][-1]
    assert best["perplexity"] == pytest.approx(np.exp(best["loss"]), rel=1e-6)

    example = load_module(str(EXAMPLES / "characters.py"), "task", TaskError)
    assert example.perplexity(tmp_path / "text") == stop["best"]
    model = load_model(tmp_path / "text")
    first, again, other = (example.sample(model, "def ", 80, 1.0, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first.startswith("def ")
    assert len(first) == 84

    logits = model(tokens)
    changed = tokens.clone()
    changed[:, 40:] = 0
    torch.testing.assert_close(model(changed)[:, :40], logits[:, :40])  # no look at what follows
    program = torch.export.export(model, (tokens[:3],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(tokens), logits)


def test_your_own_loop_learns_what_no_single_rank_has() -> None:
    job = run(command("mpirun", 2, [str(EXAMPLES / "own_loop.py")]), deadline_s=100)
    assert job.returncode == 0, job.output
    (line,) = job.stdout.splitlines()
    assert "leaked" not in job.stderr, "its parameters are views of shared memory when the process ends"
    found = re.fullmatch(r"world size 2: mean squared error over the whole sine (\d\.\d{6})", line)
    assert found, line
    assert float(found[1]) < 0.02  # a rank that knows one half only and guesses zero has 0.25


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "MNIST_DIR" not in os.environ:
        pytest.skip("MNIST_DIR names no folder with the idx files of MNIST")
    folder, out = Path(os.environ["MNIST_DIR"]), tmp_path_factory.mktemp("mnist") / "shards"

    def files(part: str) -> list[str]:
        return [str(next(folder.glob(f"{part}-{kind}-*"))) for kind in ("images", "labels")]

    write(out, "train", *files("train"), "--shards", "2", "--shuffle")
    write(out, "validation", *files("t10k"))
    return out


@pytest.mark.mnist
@pytest.mark.parametrize(("name", "target"), [("mlp", 0.025), ("cnn", 0.03)])
def test_mnist_ends_by_the_stop_flag(mnist: Path, tmp_path: Path, name: str, target: float) -> None:
    options = ("--config", f"examples/mnist-{name}.toml", "--data", str(mnist), "--name", name)
    train("mpirun", 2, tmp_path, *options, "--target-error", str(target), deadline_s=380)
    (stop,) = events(tmp_path / name, "stop")
    assert stop["reason"] == "target_error"
    assert stop["final"] <= target
