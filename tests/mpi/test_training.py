"""The main job, as a user starts it, under every launcher."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.launching import command, run
from tests.mpi.jobs import SHORT, events, model_bytes, train

TASKS = "tests/mpi/sleepy.py"
DIGITS = ("--config", "hvd_train/demo/digits.toml")


def test_two_ranks_learn_together_what_neither_learns_alone(tmp_path: Path) -> None:
    job = train("mpirun", 2, tmp_path, "--name", "together", deadline_s=90)
    (stop,) = events(tmp_path / "together", "stop")
    assert stop["reason"] == "patience"
    assert stop["best"] < 0.04
    assert re.search(r"stopped +the error has not improved for 15 evaluations", job.stdout)
    assert "neither can learn the ten classes from its own shard" in job.stdout
    (header,) = events(tmp_path / "together", "header")
    assert (header["world_size"], header["backend"]) == (2, "ring")
    assert [e["drift"] for e in events(tmp_path / "together", "round") if e.get("drift")]

    alone = train(
        "mpirun", 2, tmp_path, "--name", "alone", "--sync", "none", "--max-rounds", "80", deadline_s=90
    )
    (stop,) = events(tmp_path / "alone", "stop")
    assert stop["best"] > 0.4
    assert re.search(r"^training +batches of 32, the ranks are never averaged$", alone.stdout, re.MULTILINE)
    assert "and they are never averaged" in alone.stdout


@pytest.mark.parametrize(
    ("launcher", "ranks", "wished", "backend"),
    [
        ("python", 1, "auto", "solo"),
        ("mpirun", 4, "auto", "ring"),
        ("horovodrun", 2, "auto", "ring"),
        ("horovodrun-gloo", 2, "auto", "horovod"),
        ("horovodrun-gloo", 2, "ring", "ring"),
        ("mpirun", 2, "mpi", "mpi"),
        ("mpirun", 3, "horovod", "horovod"),
    ],
)
def test_every_launcher_and_backend_trains(
    launcher: str, ranks: int, wished: str, backend: str, tmp_path: Path
) -> None:
    train(launcher, ranks, tmp_path, "--name", "r", *SHORT, "--backend", wished)
    (header,) = events(tmp_path / "r", "header")
    assert (header["world_size"], header["backend"]) == (ranks, backend)
    errors = [e["error"] for e in events(tmp_path / "r", "evaluation")]
    assert len(errors) == 3
    assert errors[-1] < 0.35
    seconds = events(tmp_path / "r", "ranks")
    assert [e["rounds"][0] for e in seconds] == [1, *(e["rounds"][1] + 1 for e in seconds[:-1])]
    assert seconds[-1]["rounds"][1] == 12
    assert all(len(of_ranks) == ranks for e in seconds for of_ranks in e["seconds"].values())
    assert min(seconds[0]["seconds"]["compute"]) > 0
    machine, *_ = events(tmp_path / "r", "machine")
    assert len(machine["rss_bytes"]) == len(machine["cpu"]) == ranks
    assert machine["sent_bytes"] == (0 if backend in ("ring", "solo") else None)
    assert header["layers"] == [f"layers.{n}.{kind}" for n in (0, 2, 4) for kind in ("weight", "bias")]
    layers, *_ = events(tmp_path / "r", "layers")
    assert len(layers["update"]) == len(header["layers"])
    assert min(layers["update"]) > 0
    spread = zip(*(layers["gradient"][name] for name in ("min", "mean", "max")), strict=True)
    assert all(0 < least <= mean * 1.001 <= most * 1.002 for least, mean, most in spread)


def test_the_result_is_the_same_to_the_bit(tmp_path: Path) -> None:
    """One backend and one world: however the timing falls, wherever the ranks run."""
    fixed = (*DIGITS, *SHORT, "--threads", "1")
    train("mpirun", 2, tmp_path, "--name", "a", *fixed, "--task", f"{TASKS}:Steady")
    train("mpirun", 2, tmp_path, "--name", "b", *fixed, "--task", f"{TASKS}:Sleepy")
    one_core = [
        "taskset",
        "-c",
        "0",
        *command("mpirun", 2, ["-m", "hvd_train", "--runs", str(tmp_path), "--name", "c"]),
    ]
    bound = run([*one_core, *fixed, "--task", f"{TASKS}:Sleepy"], deadline_s=60)
    assert bound.returncode == 0, bound.output
    models = {name: model_bytes(tmp_path / name) for name in "abc"}
    assert len(set(models.values())) == 1
    other = train("mpirun", 2, tmp_path, "--name", "d", *fixed, "--seed", "1", "--task", f"{TASKS}:Steady")
    assert model_bytes(tmp_path / "d") != models["a"], other.output


def test_horovodrun_and_mpirun_give_the_same_bits(tmp_path: Path) -> None:
    for launcher in ("horovodrun", "mpirun"):
        train(launcher, 2, tmp_path, "--name", launcher, *SHORT, "--threads", "1")
    assert model_bytes(tmp_path / "horovodrun") == model_bytes(tmp_path / "mpirun")


def test_horovod_gives_the_same_bits_over_gloo_and_over_mpi(tmp_path: Path) -> None:
    train("horovodrun-gloo", 2, tmp_path, "--name", "gloo", *SHORT, "--backend", "horovod")
    train("mpirun", 2, tmp_path, "--name", "mpi", *SHORT, "--backend", "horovod")
    assert model_bytes(tmp_path / "gloo") == model_bytes(tmp_path / "mpi")


def test_a_rank_that_is_not_finite_takes_the_mean(tmp_path: Path) -> None:
    train(
        "mpirun",
        2,
        tmp_path,
        "--name",
        "r",
        *DIGITS,
        *SHORT,
        "--task",
        f"{TASKS}:Poisoned",
        env={"SICK_RANKS": "1"},
    )
    (fault,) = events(tmp_path / "r", "fault")
    assert (fault["kind"], fault["ranks"], fault["round"]) == ("not_finite", [1], 3)
    (stop,) = events(tmp_path / "r", "stop")
    assert (stop["reason"], stop["round"]) == ("max_rounds", 12)


def test_a_training_that_is_not_finite_anywhere_diverged(tmp_path: Path) -> None:
    job = train(
        "mpirun",
        2,
        tmp_path,
        "--name",
        "r",
        *DIGITS,
        *SHORT,
        "--task",
        f"{TASKS}:Poisoned",
        env={"SICK_RANKS": "0,1"},
        succeeds=False,
    )
    assert job.returncode == 3, job.output
    (stop,) = events(tmp_path / "r", "stop")
    assert (stop["reason"], stop["round"]) == ("diverged", 3)
    assert "diverged" in job.stdout


def test_the_trained_model_is_loaded_without_mpi(tmp_path: Path) -> None:
    train("mpirun", 2, tmp_path, "--name", "r", *SHORT)
    program = (
        "import sys, torch, hvd_train\n"
        f"model = hvd_train.load_model({str(tmp_path / 'r')!r})\n"
        "out = model(torch.zeros(3, 8, 8))\n"
        "assert out.shape == (3, 10) and not model.training and 'mpi4py' not in sys.modules\n"
        "print('loaded', round(float(out.detach().abs().sum()), 3) > 0)"
    )
    job = run([sys.executable, "-c", program], deadline_s=60)
    assert job.stdout.strip() == "loaded True", job.output
