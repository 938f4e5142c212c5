"""Who started the process, from the variables that launchers set."""

from __future__ import annotations

import pytest

from hvd_train.comm.factory import connect
from hvd_train.environment.launcher import Launcher, detect, forgotten_tasks, mismatch, require_way_in
from hvd_train.errors import LauncherMismatch, UserError

OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "PMIX_RANK": "3"}
MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1", "PMI_FD": "11", "MPI_LOCALNRANKS": "2"}
SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_NTASKS": "8"}
SRUN_PMI2 = {**SRUN, "PMI_SIZE": "8", "PMI_RANK": "5", "PMI_JOBID": "2.0", "SLURM_MPI_TYPE": "pmi2"}
SRUN_PMIX = {**SRUN, "PMIX_RANK": "5", "PMIX_NAMESPACE": "slurm.pmix.1.0", "SLURM_MPI_TYPE": "pmix"}
FLUX = {"FLUX_JOB_SIZE": "4", "FLUX_TASK_RANK": "2", "PMI_SIZE": "4", "PMI_RANK": "2"}
PRTERUN = {"PMIX_RANK": "1", "PMIX_NAMESPACE": "prterun-node1-4711@1", "PRTE_LAUNCHED": "1"}
GLOO = {"HOROVOD_SIZE": "2", "HOROVOD_RANK": "1", "HOROVOD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Launcher(name="", size=1, rank=0, provides="nothing")),
        (OPEN_MPI, Launcher(name="mpirun of Open MPI", size=4, rank=3, provides="mpi")),
        (MPICH, Launcher(name="mpiexec of MPICH or Intel MPI", size=2, rank=1, provides="mpi")),
        (SRUN, Launcher(name="srun", size=8, rank=5, provides="mpi")),
        (SRUN_PMI2, Launcher(name="srun", size=8, rank=5, provides="mpi")),
        (SRUN_PMIX, Launcher(name="srun", size=8, rank=5, provides="mpi")),
        (FLUX, Launcher(name="flux run", size=4, rank=2, provides="mpi")),
        (PRTERUN, Launcher(name="a launcher that speaks PMIx", size=None, rank=1, provides="mpi")),
        (GLOO, Launcher(name="horovodrun over Gloo", size=2, rank=1, provides="gloo")),
        # A launcher within a Slurm job: its own variables count, not those of the step that it runs in.
        (
            {**SRUN, "SLURM_STEP_NUM_TASKS": "1", **OPEN_MPI},
            Launcher(name="mpirun of Open MPI", size=4, rank=3, provides="mpi"),
        ),
        # MPICH's starts its daemons by srun, one a node, and then its ranks, one a node too.
        (
            {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", **MPICH},
            Launcher(name="mpiexec of MPICH or Intel MPI", size=2, rank=1, provides="mpi"),
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
    for name in (*OPEN_MPI, *MPICH, *SRUN, *FLUX, *GLOO):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_process_that_nothing_started_is_solo(alone: pytest.MonkeyPatch) -> None:
    with connect("auto") as comm:
        assert (comm.name, comm.size, comm.rank) == ("solo", 1, 0)


@pytest.mark.parametrize(
    ("environ", "name"), [(OPEN_MPI, "mpirun of Open MPI"), (GLOO, "horovodrun over Gloo"), (SRUN, "srun")]
)
def test_one_of_several_processes_cannot_be_solo(
    alone: pytest.MonkeyPatch, environ: dict[str, str], name: str
) -> None:
    for variable, value in environ.items():
        alone.setenv(variable, value)
    size = detect().size
    with pytest.raises(LauncherMismatch) as caught:
        connect("solo")
    message = str(caught.value)
    assert message.startswith(f"{name} started this process as one of {size}, but backend `solo`")
    assert "sees a world of 1. Choose `--backend auto`" in message
    assert caught.value.agreed
    assert isinstance(caught.value, UserError)


def test_a_single_process_may_be_solo(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("PMI_SIZE", "1")
    with connect("solo") as comm:
        assert comm.size == 1


@pytest.mark.parametrize(
    ("launcher", "world_size", "promised"),
    [
        (detect({}), 1, True),
        (detect({}), 3, True),  # by a launcher that is not known here
        (detect(OPEN_MPI), 4, True),
        (detect(OPEN_MPI), 1, False),
        (detect(SRUN), 9, False),
        (detect(PRTERUN), 1, False),
        (detect(PRTERUN), 2, True),
        (detect({**PRTERUN, "PMIX_RANK": "0"}), 1, True),
    ],
)
def test_promised(launcher: Launcher, world_size: int, promised: bool) -> None:
    assert launcher.promised(world_size) is promised


def test_one_process_reports_for_all_that_are_alone() -> None:
    def speaking(environ: dict[str, str], rank: str) -> list[int]:
        return [r for r in range(4) if detect({**environ, rank: str(r)}).speaks]

    assert speaking(OPEN_MPI, "OMPI_COMM_WORLD_RANK") == [0]
    assert speaking(PRTERUN, "PMIX_RANK") == [0, 1], "rank 0 alone cannot tell that there are more"


OPEN_MPI_5 = "Open MPI v5.0.11, package: Open MPI user@localhost Distribution, ident: 5.0.11"
OPEN_MPI_4 = "Open MPI v4.1.8, package: Open MPI root@host Distribution, ident: 4.1.8"
MPICH_4 = "MPICH Version:      4.3.2\nMPICH configure:    --with-device=ch4:ucx,ofi --with-pm=hydra:gforker\n"
MPICH_PMIX = "MPICH Version:      4.3.2\nMPICH configure:    --with-pmix=/opt/pmix\n"
INTEL = "Intel(R) MPI Library 2021.18.1 for Linux* OS\n"


@pytest.mark.parametrize(
    ("library", "environ", "has_way_in"),
    [
        # Seen with these libraries and launchers; where nothing is refused here, MPI itself finds the world.
        (OPEN_MPI_5, OPEN_MPI | {"PMIX_NAMESPACE": "1"}, True),
        (OPEN_MPI_5, SRUN_PMIX, True),
        (OPEN_MPI_5, PRTERUN, True),
        (OPEN_MPI_5, SRUN, False),
        (OPEN_MPI_5, SRUN_PMI2, False),
        (OPEN_MPI_5, MPICH, False),
        (OPEN_MPI_5, GLOO, False),
        (OPEN_MPI_5, {}, True),
        (OPEN_MPI_5, {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, True),
        (OPEN_MPI_4, SRUN_PMI2, True),  # as it was built
        (MPICH_4, MPICH, True),
        (MPICH_4, SRUN_PMI2, True),
        (MPICH_4, SRUN_PMIX, False),
        (MPICH_4, OPEN_MPI | {"PMIX_NAMESPACE": "1"}, False),
        (MPICH_4, PRTERUN, False),
        (MPICH_PMIX, SRUN_PMIX, True),
        (INTEL, SRUN_PMIX, True),  # its own setting names a library for it
    ],
)
def test_require_way_in(library: str, environ: dict[str, str], has_way_in: bool) -> None:
    if has_way_in:
        require_way_in(library, environ)
    else:
        with pytest.raises(LauncherMismatch, match="sees a world of 1"):
            require_way_in(library, environ)


@pytest.mark.parametrize(
    ("environ", "library", "said"),
    [
        (
            SRUN,
            OPEN_MPI_5,
            "`srun --mpi=none` does not connect the processes of this MPI. Start it with `srun --mpi=pmix` (",
        ),
        (
            SRUN_PMIX,
            MPICH_4,
            "`srun --mpi=pmix` does not connect the processes of this MPI. Start it with `srun --mpi=pmi2` (",
        ),
        (MPICH, OPEN_MPI_5, "(Open MPI 5.0.11) sees a world of 1: the launcher belongs to another MPI"),
        (
            PRTERUN,
            MPICH_4,
            "a launcher that speaks PMIx started this process as rank 1, but backend `mpi` (MPICH 4",
        ),
        (GLOO, OPEN_MPI_5, "over Gloo there is no MPI. Choose `--backend auto`"),
    ],
)
def test_messages(environ: dict[str, str], library: str, said: str) -> None:
    assert said in str(mismatch(detect(environ), "mpi", library, 1, environ))


@pytest.mark.parametrize(
    ("environ", "warned"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, True),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, True),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7"}, False),
        (SRUN, False),
        ({**SRUN, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, False),  # who says 1 means 1
        ({}, False),
    ],
)
def test_tasks_with_missing_methods(environ: dict[str, str], warned: bool) -> None:
    said = (
        "the allocation has 8 tasks, and this is one process. Start it with `srun`, or by `hvd_train launch`."
    )
    assert forgotten_tasks(environ) == (said if warned else "")


def test_options_that_bind_nothing() -> None:
    assert detect(OPEN_MPI).unbind == "`mpirun --bind-to none`"
    assert detect(PRTERUN).unbind == "a launcher that does not bind them"
    assert [detect(e).deals_cores for e in (SRUN, SRUN_PMI2, FLUX, OPEN_MPI, MPICH, {})] == [True] * 3 + [
        False
    ] * 3
