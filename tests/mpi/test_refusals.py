"""What is wrong is said once, by one rank, before the first step; a failing rank ends the job."""

from __future__ import annotations

import re
import shutil
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.launching import AS_ROOT, command, mpi_abi, run
from tests.mpi.jobs import SHORT, train

TASKS = "tests/mpi/sleepy.py"
DIGITS = ("--config", "hvd_train/demo/digits.toml")

LAUNCHERS = ("mpirun", "horovodrun-gloo")


def different_arguments(launcher: str, runs: Path, zero: list[str], one: list[str]) -> list[str]:
    """A job whose rank 1 is given other options than rank 0, as by a file that differs between hosts."""
    script = (
        "import os, sys\n"
        "from hvd_train.cli import main\n"
        "from hvd_train.environment.launcher import detect\n"
        f"sys.exit(main({one!r} if detect().rank == 1 else {zero!r}))"
    )
    return command(launcher, 2, ["-c", script])


def messages(output: str) -> list[str]:
    return [line for line in output.splitlines() if "hvd_train: " in line]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_another_configuration_on_one_rank(launcher: str, tmp_path: Path) -> None:
    common = ["--runs", str(tmp_path), "--name", "r"]
    job = run(different_arguments(launcher, tmp_path, common, [*common, "--period", "20"]), deadline_s=40)
    (message,) = messages(job.output)
    assert "different configurations: sync.period is 10 on rank 0 but 20 on rank 1" in message
    if launcher == "mpirun":  # horovodrun over Gloo ends with a traceback of its own
        assert "Traceback" not in job.output
    assert job.returncode == (2 if launcher == "mpirun" else 1), job.output
    assert not (tmp_path / "r").exists()


def test_a_bad_option_is_reported_once(tmp_path: Path) -> None:
    # MPICH's mpirun lets the others live when one ends before MPI_Init: each says it. `launch` asks first.
    speakers = 1 if mpi_abi() == "openmpi" else 2
    job = train("mpirun", 2, tmp_path, "--perod", "3", succeeds=False)
    assert job.returncode == 2, job.output
    assert job.output.count("--period") == speakers, job.output
    job = train("mpirun", 2, tmp_path, "--config", "missing.toml", succeeds=False)
    assert job.returncode == 2, job.output
    said = messages(job.output)
    assert len(said) == speakers
    assert all("missing.toml: cannot read the configuration" in message for message in said)


def shards(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(2):
        with h5py.File(folder / f"{i}.h5", "w") as file:
            file["inputs"] = rng.normal(size=(50, 6)).astype(np.float32)
            file["targets"] = rng.integers(0, 3, 50)
    return folder


def test_a_shard_of_another_shape(tmp_path: Path) -> None:
    folder = shards(tmp_path)
    with h5py.File(folder / "1.h5", "a") as file:
        del file["inputs"]
        file["inputs"] = np.zeros((50, 7), np.float32)
    job = train("mpirun", 2, tmp_path / "runs", "--data", str(folder), *SHORT, succeeds=False)
    (message,) = messages(job.output)
    assert "1.h5" in message
    assert "[6]" in message
    assert "[7]" in message
    assert job.returncode == 2


def test_shards_that_differ_between_hosts(tmp_path: Path) -> None:
    folder = shards(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("other"))
    with h5py.File(other / "1.h5", "a") as file:
        for name in ("inputs", "targets"):
            rows = file[name][:40]
            del file[name]
            file[name] = rows
    options = ["--runs", str(tmp_path / "runs"), "--max-rounds", "3", "--data", "*.h5"]
    script = (
        "import os, sys\n"
        "from hvd_train.cli import main\n"
        "from hvd_train.environment.launcher import detect\n"
        f"os.chdir({str(other)!r} if detect().rank == 1 else {str(folder)!r})\n"
        f"sys.exit(main({options!r}))"
    )
    job = run(command("mpirun", 2, ["-c", script]), deadline_s=40)
    (message,) = messages(job.output)
    sizes = [(place / "1.h5").stat().st_size for place in (folder, other)]
    seen = f"bytes of 1.h5 (file 1) is {sizes[0]} on rank 0 but {sizes[1]} on rank 1"
    assert f"the ranks have different data: {seen}. Every rank must see the same files." in message
    assert job.returncode == 2


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_file_that_one_rank_does_not_see(launcher: str, tmp_path: Path) -> None:
    shards(tmp_path)
    common = ["--runs", str(tmp_path / "runs"), "--max-rounds", "3", "--data"]
    script = (
        "import os, sys\n"
        "from hvd_train.cli import main\n"
        "from hvd_train.environment.launcher import detect\n"
        f"os.chdir({str(tmp_path)!r} if detect().rank == 0 else '/')\n"
        f"sys.exit(main({[*common, '0.h5']!r}))"
    )
    job = run(command(launcher, 2, ["-c", script]), deadline_s=40)
    (message,) = messages(job.output)
    assert "rank 1 of 2: " in message
    assert "0.h5" in message
    assert job.returncode == (2 if launcher == "mpirun" else 1)


def test_another_model_on_one_rank(tmp_path: Path) -> None:
    job = train("mpirun", 2, tmp_path, *DIGITS, *SHORT, "--task", f"{TASKS}:Uneven", succeeds=False)
    (message,) = messages(job.output)
    assert (
        "different models: 1.bias is '(10,) torch.float32' on rank 0 but '(9,) torch.float32' on rank 1"
        in message
    )
    assert job.returncode == 2


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun", "horovodrun-gloo"])
def test_an_exception_on_one_rank_ends_the_job(launcher: str, tmp_path: Path) -> None:
    job = train(
        launcher, 2, tmp_path, *DIGITS, *SHORT, "--name", "r", "--task", f"{TASKS}:Failing", succeeds=False
    )
    ended_at = time.time()
    assert job.returncode == 1, job.output
    (raised_at,) = re.findall(r"RuntimeError: the disk of rank 1 is on fire at ([\d.]+)", job.output)
    assert ended_at - float(raised_at) < 5, "a failing rank ends the job within 5 s"
    assert "rank 1 of 2" in job.output
    assert job.output.count("in before_batch") == 1, job.output
    assert "HorovodInternalError" not in job.output
    assert "MPI_ERR" not in job.output


ANOTHER_MPI = {
    # By the MPI that the package was built for: what the launcher of another one sets, and that one's name.
    "openmpi": ({"PMI_SIZE": "3"}, "PMI_RANK", "mpiexec of MPICH or Intel MPI"),
    "mpich": (
        {"OMPI_COMM_WORLD_SIZE": "3", "PMIX_NAMESPACE": "none", "PMIX_RANK": "0"},
        "OMPI_COMM_WORLD_RANK",
        "mpirun of Open MPI",
    ),
}


@pytest.mark.parametrize("backend", ["auto", "solo"])
def test_processes_that_do_not_see_each_other_are_refused(backend: str, tmp_path: Path) -> None:
    """Three, as a launcher of another MPI starts them, which ends all when one has ended. Rank 0 is late."""
    variables, rank, name = ANOTHER_MPI[mpi_abi()]
    python = f"{sys.executable} -m hvd_train --runs {tmp_path} --backend {backend}"
    script = (
        f"{rank}=1 {python} & {rank}=2 {python} & (sleep 2; {rank}=0 exec {python}) & "
        "wait -n; code=$?; kill $(jobs -p); wait; exit $code"
    )
    job = run(["bash", "-c", script], deadline_s=60, env={**variables, **AS_ROOT})
    assert job.returncode == 2, job.output
    (message,) = messages(job.output)
    said = "solo` (no message passing)" if backend == "solo" else "mpi` ("
    assert f"{name} started this process as one of 3, but backend `{said}" in message
    assert "sees a world of 1" in message
    assert not list(tmp_path.iterdir())
