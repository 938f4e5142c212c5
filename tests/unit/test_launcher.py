"""Who started the process, from the variables that launchers set."""

from __future__ import annotations

import pytest

from hvd_train.comm.factory import connect
from hvd_train.comm.launcher import Launcher, detect
from hvd_train.errors import EnvironmentMismatch, UserError

OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "PMIX_RANK": "3"}
MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1"}
SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_NTASKS": "8"}
GLOO = {"HOROVOD_SIZE": "2", "HOROVOD_RANK": "1", "HOROVOD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Launcher(name="", size=1, rank=0, provides="nothing")),
        (OPEN_MPI, Launcher(name="mpirun of Open MPI", size=4, rank=3, provides="mpi")),
        (MPICH, Launcher(name="mpiexec of MPICH or Intel MPI", size=2, rank=1, provides="mpi")),
        (SRUN, Launcher(name="srun", size=8, rank=5, provides="mpi")),
        (GLOO, Launcher(name="horovodrun over Gloo", size=2, rank=1, provides="gloo")),
        # A launcher within a Slurm job: its own variables count, not those of the step that it runs in.
        (
            {**SRUN, "SLURM_STEP_NUM_TASKS": "1", **OPEN_MPI},
            Launcher(name="mpirun of Open MPI", size=4, rank=3, provides="mpi"),
        ),
        ({**SRUN, **GLOO}, Launcher(name="horovodrun over Gloo", size=2, rank=1, provides="gloo")),
        # An allocation without a step, as in a batch script: nothing started several processes.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, Launcher(name="", size=1, rank=0, provides="nothing")),
        ({"PMI_SIZE": "many"}, Launcher(name="", size=1, rank=0, provides="nothing")),
        (
            {"PMI_SIZE": "2", "PMI_RANK": ""},
            Launcher(name="mpiexec of MPICH or Intel MPI", size=2, rank=0, provides="mpi"),
        ),
    ],
)
def test_detect(environ: dict[str, str], expected: Launcher) -> None:
    assert detect(environ) == expected


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*OPEN_MPI, *MPICH, *SRUN, *GLOO):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_process_that_nothing_started_is_solo(alone: pytest.MonkeyPatch) -> None:
    with connect("auto") as comm:
        assert (comm.name, comm.size, comm.rank) == ("solo", 1, 0)


@pytest.mark.parametrize(
    ("environ", "name"), [(OPEN_MPI, "mpirun of Open MPI"), (GLOO, "horovodrun over Gloo"), (SRUN, "srun")]
)
def test_one_of_several_cannot_be_solo(alone: pytest.MonkeyPatch, environ: dict[str, str], name: str) -> None:
    for variable, value in environ.items():
        alone.setenv(variable, value)
    size = detect().size
    with pytest.raises(EnvironmentMismatch) as caught:
        connect("solo")
    message = str(caught.value)
    assert message.startswith(f"{name} started this process as one of {size}, but backend `solo`")
    assert "sees a world of 1. Choose `--backend auto`" in message
    assert caught.value.agreed
    assert isinstance(caught.value, UserError)


def test_one_of_one_may_be_solo(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("PMI_SIZE", "1")
    with connect("solo") as comm:
        assert comm.size == 1
