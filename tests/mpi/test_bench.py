"""`bench allreduce` as a user starts it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launching import Job, command, mpi_abi, run

BENCH = ["-m", "hvd_train", "bench", "allreduce"]
SIZES = {"64B": 64, "1MiB": 1 << 20}


def bench(launcher: str, ranks: int, *options: str) -> Job:
    argv = [*BENCH, "--sizes", ",".join(SIZES), "--repeat", "2", *options]
    return run(command(launcher, ranks, argv), deadline_s=100)


TO_A_FILE = """
import os, runpy, sys
os.dup2(os.open(os.path.join(sys.argv.pop(1), str(os.getpid())), os.O_WRONLY | os.O_CREAT), 1)
runpy.run_module("hvd_train", run_name="__main__", alter_sys=True)
"""
"""A rank whose standard output is a file of its own: what a launcher passes on may be cut into pieces."""


def report(launcher: str, ranks: int, folder: Path) -> dict[str, Any]:
    """What the standard output of all ranks holds, and nothing besides: one JSON object."""
    program = ["-c", TO_A_FILE, str(folder), "bench", "allreduce", "--sizes", ",".join(SIZES)]
    job = run(command(launcher, ranks, [*program, "--repeat", "2", "--json"]), deadline_s=100)
    assert job.returncode == 0, job.output
    outputs = list(folder.iterdir())
    assert len(outputs) == ranks
    found: dict[str, Any] = json.loads("".join(output.read_text() for output in outputs))
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_backends_are_measured_in_one_run(ranks: int, tmp_path: Path) -> None:
    found = report("mpirun", ranks, tmp_path)
    backends = {"ring", "mpi", "gloo"} | {"horovod"} - found["left_out"].keys()
    places = {(r["backend"], r["num_bytes"], r["cold"]) for r in found["rows"]}
    assert places == {(b, n, cold) for b in backends for n in SIZES.values() for cold in (True, False)}
    for row in found["rows"]:
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["bus_bytes_per_s"] == pytest.approx(
            2 * (ranks - 1) / ranks * row["num_bytes"] / row["median_s"]
        )
        assert row["verified"] is True
    assert {(r["num_bytes"], r["cold"]) for r in found["limit"]} == {place[1:] for place in places}
    ring = next(r for r in found["rows"] if r["backend"] == "ring")
    assert ring["times_ring"] == 1
    assert ring["times_limit"] > 0
    settings = {r["setting"] for r in found["rows"] + found["variants"] if r["backend"] == "mpi"}
    assert "MPI_Allreduce, default" in settings
    assert ("MPI_Allreduce, segmented ring" in settings) is (mpi_abi() == "openmpi")
    assert {c["backend"] for c in found["control"]} == {"ring", "mpi"}
    assert found["world"] == {"ranks": ranks, "hosts": 1, "cores_of_rank": found["world"]["cores_of_rank"]}
    assert found["versions"].keys() == {"hvd_train", "python", "torch"}
    assert found["options"]["repeat"] == 2


def test_over_gloo_there_is_no_mpi_to_measure(tmp_path: Path) -> None:
    found = report("horovodrun-gloo", 2, tmp_path)
    assert {r["backend"] for r in found["rows"]} == {"ring", "horovod", "gloo"}
    assert "there is no MPI in it" in found["left_out"]["mpi"]


def test_a_table_is_printed_for_people() -> None:
    job = bench("mpirun", 2, "--backends", "ring,mpi")
    assert job.returncode == 0, job.output
    head, *_ = (line for line in job.stdout.splitlines() if line.startswith("size"))
    assert head.split()[:5] == ["size", "backend", "setting", "caches", "median"]
    assert "1 MiB, cold, as multiples of the ring's time: mpi (MPI_Allreduce" in job.stdout
    assert "gloo" not in job.stdout
    assert "hvd_train: measuring 1 MiB" in job.stderr


def test_a_backend_that_is_named_must_be_usable() -> None:
    job = bench("horovodrun-gloo", 2, "--backends", "ring,mpi")
    assert job.returncode != 0
    assert job.output.count("--backends names mpi, which cannot be used") == 1, job.output


def test_what_exceeds_the_memory_is_refused_beforehand() -> None:
    job = run(command("mpirun", 2, [*BENCH, "--sizes", "4000GiB"]), deadline_s=60)
    assert job.returncode == 2, job.output
    assert job.output.count("may need") == 1
    assert "Give smaller sizes, or start fewer ranks" in job.output


def test_the_benchmark_of_an_average_measures_every_way(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    short = ["--rounds", "40", "--warm-up", "8", "--repetitions", "1", "--ways", "not averaging", "mpi"]
    argv = [sys.executable, "benchmarks/averaging_cost.py", *short, "--json", str(result)]
    job = run(argv, deadline_s=100, env={"MNIST_DIR": ""})
    assert job.returncode == 0, job.output
    measured = json.loads(result.read_text())
    assert [m["way"] for m in measured["runs"]] == ["not averaging", "mpi"]
    assert all(m["samples_per_s"] > 0 for m in measured["runs"])
    without, averaged = (m["seconds_per_round"] for m in measured["runs"])
    assert without.keys() == averaged.keys() == {"data", "compute", "communication", "wait"}
    assert min(without["compute"], averaged["compute"], averaged["communication"]) > 0
    assert measured["about"]["model"] == "mlp 784-500-100-10"
    (shown,) = re.findall(r"^\| mpi +\| ([\d,]+) ", job.stdout, re.MULTILINE)
    assert shown == f"{measured['runs'][1]['samples_per_s']:,.0f}"
