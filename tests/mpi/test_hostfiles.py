"""hostfiles/: each example is read by the launcher that it is for, and all of them by `hvd_train launch`."""

from __future__ import annotations

import pytest

from hvd_train.launching.hosts import Host, read_hostfile
from tests.launching import PLACEMENT, ROOT, horovodrun, mpi_abi, run, tool

FILES = sorted((ROOT / "hostfiles").glob("*.hosts"))
OPTION = {"openmpi": "--hostfile", "mpich": "-f"}
RANK = ("sh", "-c", "echo rank on $(uname -n)")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_launch_reads_them_all(path: str) -> None:
    assert read_hostfile(path) == [Host("localhost", 4)]


@pytest.mark.mpi
def test_mpirun_reads_its_own() -> None:
    path = ROOT / "hostfiles" / f"{mpi_abi()}.hosts"
    line = [tool("mpirun"), *PLACEMENT[mpi_abi()], OPTION[mpi_abi()], str(path), "-np", "4", *RANK]
    job = run(line, deadline_s=60)
    assert job.stdout.count("rank on ") == 4, job.output


@pytest.mark.mpi
@pytest.mark.parametrize("gloo", [False, True], ids=["mpi", "gloo"])
def test_horovodrun_reads_its_own(gloo: bool) -> None:
    path = ROOT / "hostfiles" / "horovodrun.hosts"
    job = run([*horovodrun(gloo), "-np", "4", "--hostfile", str(path), *RANK], deadline_s=60)
    assert job.stdout.count("rank on ") == 4, job.output
