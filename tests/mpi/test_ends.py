"""hvd_train in a program of your own: several trainings in one process, and every way in which it may end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launching import Job, command, run
from tests.mpi.jobs import model_bytes

pytestmark = pytest.mark.mpi

HERE = Path(__file__).parent
DEADLINE_S = 90


def end(way: str, backend: str = "auto") -> Job:
    return run(command("mpirun", 2, [str(HERE / "ends.py"), way, backend]), deadline_s=DEADLINE_S)


@pytest.mark.parametrize(
    ("launcher", "ranks", "backend"),
    [
        ("python", 1, "auto"),
        ("mpirun", 2, "auto"),
        ("mpirun", 2, "mpi"),
        ("mpirun", 2, "horovod"),
        ("horovodrun-gloo", 2, "horovod"),
    ],
)
def test_one_program_trains_several_times(launcher: str, ranks: int, backend: str, tmp_path: Path) -> None:
    """Also after a training that could not be run, and over a communicator of its own."""
    if backend == "horovod":
        pytest.importorskip("horovod", reason="Horovod is not installed: `make setup` builds it")
    (tmp_path / "run.toml").write_text("[stop]\nmax_rounds = 2\npatience = 0\n")
    program = [str(HERE / "several.py"), str(tmp_path), backend]
    job = run(command(launcher, ranks, program), deadline_s=DEADLINE_S)
    assert job.returncode == 0, job.output
    assert "three runs: first, second, third" in job.stdout
    models = {model_bytes(tmp_path / name) for name in ("first", "second", "third")}
    assert len(models) == 1


@pytest.mark.parametrize(("way", "code"), [("all 0", 0), ("all 3", 3), ("all text", 1), ("one 0", 0)])
def test_sys_exit_ends_the_job_with_its_code(way: str, code: int) -> None:
    job = end(way)
    assert job.returncode == code, job.output
    assert "Traceback" not in job.output
    assert "MPI_ABORT" not in job.output
    assert ("not good enough" in job.stderr) is (way == "all text")
    assert ("the other rank came to its end" in job.stdout) is (way == "one 0")


@pytest.mark.parametrize("backend", ["auto", "mpi"])
def test_a_rank_that_alone_exits_with_a_code_ends_the_job(backend: str) -> None:
    job = end("one 3", backend)
    assert job.returncode == 3, job.output
    assert "rank 1 of 2" in job.stderr
    assert "ends with exit code 3" in job.stderr
    assert "the other rank came to its end" not in job.stdout


def test_an_interrupt_in_your_own_loop_prints_no_traceback() -> None:
    job = end("interrupted")
    assert job.returncode == 130, job.output
    assert "rank 1 of 2" in job.stderr
    assert "interrupted from the keyboard" in job.stderr
    assert "KeyboardInterrupt" not in job.stderr


@pytest.mark.parametrize("way", ["without with", "between"])
def test_an_exception_of_one_rank_ends_the_job(way: str) -> None:
    """Outside of a `with` nothing but the end of the process says so."""
    job = end(way)
    assert job.returncode not in (0, 124), job.output
    assert "ValueError: of rank 1 alone" in job.stderr
    assert "rank 1 of 2 ends with exit code 1" in job.stderr


def test_communicators_that_are_never_closed_do_no_harm() -> None:
    job = end("never closed")
    assert job.returncode == 0, job.output
    assert job.stdout.count("both met") == 2
