"""The same training by every launcher, 8 ranks on 4 hosts: the same model, to the last bit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.project import BY_MPIRUN, PATIENT, Project
from tests.deadlines import seconds
from tests.launching import wait_for
from tests.mpi.jobs import events, has_recorded, model_bytes

pytestmark = pytest.mark.cluster

ROUNDS = 20
HOST_OF_RANK = [0, 0, 1, 1, 2, 2, 3, 3]
TRAINING = (*PATIENT, "--max-rounds", str(ROUNDS))
SPREAD = ("--nodes=4", "--ntasks=8", "--ntasks-per-node=2")
PROGRAM = (sys.executable, "-m", "hvd_train")
LINES = {
    "mpirun": (*PROGRAM, "launch", "--launcher", "mpirun", "--hostfile", "hosts", "--"),
    "horovodrun": ("horovodrun", "-np", "8", "-H", "h1:2,h2:2,h3:2,h4:2", *PROGRAM),
}


@contextmanager
def by_line(project: Project, name: str) -> Iterator[str]:
    """Trains from a shell on h1; yields the name of the run once it has done two rounds."""
    line = [*LINES[name], *TRAINING, "--name", name]
    with project.slurm.hosts.start(1, line, cwd=project.folder) as process:
        wait_for(lambda: has_recorded(project.run(name), "round", 2), 60, process)
        yield name
        _, said = process.communicate(timeout=seconds(60))
        assert process.returncode == 0, said


@contextmanager
def by_job(project: Project, **env: str) -> Iterator[str]:
    job = project.submit(*SPREAD, training=TRAINING, env=env)
    project.wait_for_round(job, 2)
    yield job
    project.wait(job, "COMPLETED")


def memory_map(pid: int) -> list[str]:
    """Empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return []


def assert_ranks_share_memory(hosts: Hosts) -> None:
    """That the two ranks of each host have memory of the ring in common."""
    for number in hosts.numbers:
        regions = []
        for pid in hosts.pids(number, f"--max-rounds {ROUNDS}"):
            maps = [line.split() for line in memory_map(pid)]
            if mine := {line[4] for line in maps if "/memfd:hvd_train" in line}:
                regions.append(mine)
        assert len(regions) == 2
        assert regions[0] & regions[1]


def test_every_launcher_trains_the_same(project: Project) -> None:
    hosts = project.slurm.hosts
    (project.folder / "hosts").write_text("".join(f"h{n} slots=2\n" for n in hosts.numbers))
    ways = {
        "mpirun": by_line(project, "mpirun"),
        "horovodrun": by_line(project, "horovodrun"),
        "srun": by_job(project),
        "mpirun in a job": by_job(project, **BY_MPIRUN),
    }
    models = {}
    for way, training in ways.items():
        project.hurry(False)
        before = {n: hosts.bytes(n) for n in hosts.numbers}
        with training as name:
            assert_ranks_share_memory(hosts)
            project.hurry()
        (header,) = events(project.run(name), "header")
        assert (header["world_size"], header["hosts"]) == (8, ["h1", "h2", "h3", "h4"])
        assert header["backend"] == "ring"
        assert header["host_of_rank"] == HOST_OF_RANK
        *_, machine = events(project.run(name), "machine")
        assert len(machine["available_bytes"]) == 4
        assert machine["sent_bytes"] >= machine["round"] * 4 * 2 * 3 / 4 * header["num_parameters"] * 4
        # Half of what a host has to send at least: 3/4 of all parameters and moments, twice a round.
        at_least = ROUNDS * 2 * 3 / 4 * header["num_parameters"] * 4 * 2 / 2
        for n in hosts.numbers:
            assert hosts.bytes(n).tx - before[n].tx > at_least
        models[way] = model_bytes(project.run(name))
    assert len(set(models.values())) == 1
