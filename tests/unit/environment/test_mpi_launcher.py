"""Whose launcher a program is."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvd_train.environment import mpi_build
from hvd_train.environment.mpi_launcher import MPILauncher, identify, parse
from tests.launching import tool

HYDRA = "HYDRA build details:\n    Version:                                 4.3.2\n    Release Date: now\n"
SAYS = {
    "mpirun (Open MPI) 5.0.11\n\nReport bugs to the community\n": MPILauncher("Open MPI", "5.0.11"),
    "mpirun (Open MPI) 4.1.8\n": MPILauncher("Open MPI", "4.1.8"),
    HYDRA: MPILauncher("MPICH", "4.3.2", known_to_horovodrun=False),
    f"{HYDRA}    Configure options: 'MPICHLIB_CFLAGS=-O2'\n": MPILauncher("MPICH", "4.3.2"),
    "Intel(R) MPI Library for Linux* OS, Version 2021.13 Build 20240515\n": MPILauncher(
        "Intel MPI", "2021.13"
    ),
    "true (GNU coreutils) 9.1\n": MPILauncher("", ""),
    "": MPILauncher("", ""),
}


@pytest.mark.parametrize("text", SAYS)
def test_variables_of_the_launchers(text: str) -> None:
    assert parse(text) == SAYS[text]


def test_the_installed_launcher_is_that_of_the_recorded_library() -> None:
    recorded = mpi_build.load().mpi
    if recorded is None:
        pytest.skip("the package was built without an MPI")
    found = identify(tool("mpirun"))
    assert (found.family, found.version) == mpi_build.parse_version(recorded.version)


def test_a_program_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="mpirun"):
        identify(str(tmp_path / "mpirun"))
