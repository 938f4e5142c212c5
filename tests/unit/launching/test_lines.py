"""The exact line for every launcher and MPI, as --dry-run prints it; what is refused, and what is chosen."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hvd_train.cli import main
from hvd_train.environment import machine, mpi_build
from hvd_train.environment.mpi_build import BuildInfo, MPIBuild
from hvd_train.launching import network, plan, slurm
from hvd_train.launching.hosts import Host
from hvd_train.launching.network import Way

SAYS = {
    "openmpi-5": ("openmpi", "Open MPI v5.0.11, package: any", "mpirun (Open MPI) 5.0.11"),
    "openmpi-4": ("openmpi", "Open MPI v4.1.8, package: any", "mpirun (Open MPI) 4.1.8"),
    "mpich-4": ("mpich", "MPICH Version:      4.3.2", "HYDRA build details:\n    Version:         4.3.2"),
    "mpich-5": ("mpich", "MPICH Version:      5.0.2", "HYDRA build details:\n    Version:         5.0.2"),
    "mpich-named": (
        "mpich",
        "MPICH Version:      4.3.2",
        "HYDRA build details:\n    Version:         4.3.2\n    Configure options:  MPICHLIB_CFLAGS=-O2",
    ),
    "intel": (
        "mpich",
        "Intel(R) MPI Library 2021.18 for Linux* OS",
        "Intel(R) MPI Library for Linux* OS, Version 2021.18 Build 20260626",
    ),
}
"""By MPI: its binary interface, what the library says of itself, and what its launcher says."""

SRUN_LIST = 'echo "MPI plugin types are..."; for t in none pmi2 cray_shasta pmix; do echo "	$t"; done'

Machine = Callable[[str], Path]


@pytest.fixture
def machine_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine of two cores where the package was built for one MPI; all its tools lie in the folder that is
    returned. They say their version and nothing else."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        monkeypatch.delenv(name)
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setattr(machine, "AFFINITY", frozenset({0, 1}))
    monkeypatch.setattr(network, "_route", lambda host: ("", ""))  # there is no name service

    def make(mpi: str) -> Path:
        abi, library, launcher = SAYS[mpi]
        record = MPIBuild(abi=abi, library=str(tmp_path / "lib" / "libmpi.so"), version=library)
        monkeypatch.setattr(mpi_build, "load", lambda: BuildInfo(mpi=record))
        monkeypatch.setattr(sys, "executable", str(tools / "python"))
        install(tools / "mpirun", f"echo '{launcher}'")
        install(tools / "horovodrun", "exit 0")
        return tools

    return make


def install(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def dry_run(
    capsys: pytest.CaptureFixture[str], tools: Path, *options: str, training: str = "--name a"
) -> str:
    """The line that is printed, with BIN for the folder of tools."""
    assert main(["launch", *options, "--dry-run", "--", *training.split()]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.count("\n") == 1
    return said.out.rstrip("\n").replace(str(tools), "BIN")


TRAIN = "BIN/python -m hvd_train --name a"
EXPORT = "-x OMP_NUM_THREADS -x PATH"
ALIVE_4 = "--mca oob_tcp_keepalive_time 5 --mca oob_tcp_keepalive_intvl 1 --mca oob_tcp_keepalive_probes 3"
ALIVE_5 = ALIVE_4.replace("--mca", "--prtemca")
ALIVE_ENV = "oob_tcp_keepalive_time=5 {0}oob_tcp_keepalive_intvl=1 {0}oob_tcp_keepalive_probes=3"
_HEARTBEAT = "--mca mpi_ft_detector"
DETECTOR = f"--with-ft ulfm {_HEARTBEAT} true {_HEARTBEAT}_period 60 {_HEARTBEAT}_timeout 300"
TWO = ("--hosts", "h1:2,h2:2")
ON_ETH0 = (*TWO, "--interface", "eth0")

GOLDEN = [
    (
        "openmpi-5",
        ("-np", "2"),
        f"BIN/mpirun --host localhost:2 -np 2 --map-by slot --bind-to none {EXPORT} {TRAIN}",
    ),
    (
        "openmpi-5",
        ON_ETH0,
        "BIN/mpirun --host h1:2,h2:2 -np 4 --map-by slot --bind-to none --mca btl_tcp_if_include eth0 "
        f"--prtemca oob_tcp_if_include eth0 {ALIVE_5} {EXPORT} {TRAIN}",
    ),
    (
        "openmpi-5",
        ("-np", "2", "--fault-tolerance"),
        f"BIN/mpirun --host localhost:2 -np 2 --map-by slot --bind-to none {DETECTOR} {EXPORT} {TRAIN}",
    ),
    (
        "openmpi-5",
        (*TWO, "--fault-tolerance"),
        f"BIN/mpirun --host h1:2,h2:2 -np 4 --map-by slot --bind-to none {DETECTOR} {ALIVE_5} "
        f"{EXPORT} {TRAIN}",
    ),
    (
        "openmpi-4",
        ("-np", "2"),
        f"BIN/mpirun --host localhost:2 -np 2 --map-by slot --bind-to none {EXPORT} {TRAIN}",
    ),
    (
        "openmpi-4",
        ON_ETH0,
        "BIN/mpirun --host h1:2,h2:2 -np 4 --map-by slot --bind-to none --mca btl_tcp_if_include eth0 "
        f"--mca oob_tcp_if_include eth0 {ALIVE_4} {EXPORT} {TRAIN}",
    ),
    *[
        (mpich, given, line)
        for mpich in ("mpich-4", "mpich-5")
        for given, line in (
            (("-np", "2"), f"BIN/mpirun -genvlist OMP_NUM_THREADS,PATH -np 2 {TRAIN}"),
            (
                ON_ETH0,
                "env FI_TCP_IFACE=eth0 BIN/mpirun -iface eth0 -genvlist FI_TCP_IFACE,OMP_NUM_THREADS,PATH "
                f"-hosts h1:2,h2:2 -np 4 {TRAIN}",
            ),
        )
    ],
    (
        "intel",
        ("-np", "2"),
        f"env I_MPI_PIN=0 BIN/mpirun -genvlist I_MPI_PIN,OMP_NUM_THREADS,PATH -np 2 {TRAIN}",
    ),
    (
        "intel",
        ("--hosts", "h1:2,h2:1"),
        "env I_MPI_PIN=0 BIN/mpirun -genvlist I_MPI_PIN,OMP_NUM_THREADS,PATH "
        f"-host h1 -n 2 {TRAIN} : -host h2 -n 1 {TRAIN}",
    ),
    (
        "openmpi-5",
        ("-np", "2", "--launcher", "horovodrun"),
        f"BIN/horovodrun -np 2 -H localhost:2 {TRAIN}",
    ),
    (
        "openmpi-5",
        ("--launcher", "horovodrun", *ON_ETH0),
        "env OMPI_MCA_btl_tcp_if_include=eth0 PRTE_MCA_oob_tcp_if_include=eth0 "
        f"PRTE_MCA_{ALIVE_ENV.format('PRTE_MCA_')} "
        f"BIN/horovodrun -np 4 -H h1:2,h2:2 --network-interfaces eth0 {TRAIN}",
    ),
    (
        "openmpi-4",
        ("--launcher", "horovodrun", *TWO),
        f"env OMPI_MCA_{ALIVE_ENV.format('OMPI_MCA_')} BIN/horovodrun -np 4 -H h1:2,h2:2 {TRAIN}",
    ),
    (
        "mpich-named",
        ("--launcher", "horovodrun", *TWO),
        f"BIN/horovodrun -np 4 -H h1:2,h2:2 {TRAIN}",
    ),
    (
        "openmpi-5",
        ("--launcher", "horovodrun", "--gloo", *ON_ETH0),
        f"BIN/horovodrun --gloo -np 4 -H h1:2,h2:2 --network-interfaces eth0 {TRAIN}",
    ),
]


@pytest.mark.parametrize(
    ("mpi", "options", "line"), GOLDEN, ids=[f"{mpi} {' '.join(given)}" for mpi, given, _ in GOLDEN]
)
def test_the_line(
    mpi: str,
    options: tuple[str, ...],
    line: str,
    machine_with: Machine,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert dry_run(capsys, machine_with(mpi), *options) == line


@pytest.fixture
def allocation(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Puts the machine into a Slurm job of four tasks on two nodes."""

    def enter(tools: Path) -> None:
        install(tools / "srun", SRUN_LIST)
        install(tools / "scontrol", "echo n1; echo n2")
        settings = {
            "SLURM_JOB_ID": "77",
            "SLURM_NTASKS": "4",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_TASKS_PER_NODE": "2(x2)",
            "SLURM_CPUS_PER_TASK": "3",
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)

    return enter


SRUN = f"env SRUN_CPUS_PER_TASK=3 BIN/srun --ntasks 4 --export=ALL {{}}--wait=10 {TRAIN}"


@pytest.mark.parametrize(
    ("mpi", "options", "line"),
    [
        ("openmpi-5", (), SRUN.format("--mpi=pmix ")),
        ("openmpi-4", ("--launcher", "srun"), SRUN.format("--mpi=pmix ")),
        ("mpich-4", ("--launcher", "srun"), SRUN.format("--mpi=pmi2 ")),
        ("intel", ("--launcher", "srun"), SRUN.format("--mpi=pmi2 ")),
        (
            "openmpi-5",
            ("--mpi-args", "--mpi=pmi2 --wait 3"),
            f"env SRUN_CPUS_PER_TASK=3 BIN/srun --ntasks 4 --export=ALL --mpi=pmi2 --wait 3 {TRAIN}",
        ),
        (
            "openmpi-5",
            ("--launcher", "mpirun"),
            f"BIN/mpirun -np 4 --map-by slot --bind-to none {ALIVE_5} {EXPORT} {TRAIN}",
        ),
        ("mpich-4", (), f"BIN/mpirun -genvlist OMP_NUM_THREADS,PATH -np 4 {TRAIN}"),
        (
            "openmpi-5",
            ("--launcher", "horovodrun", "-np", "3", "--gloo"),
            f"BIN/horovodrun --gloo -np 3 -H n1:2,n2:1 {TRAIN}",
        ),
        (
            "openmpi-5",
            ("--fault-tolerance",),
            f"BIN/mpirun -np 4 --map-by slot --bind-to none {DETECTOR} {ALIVE_5} {EXPORT} {TRAIN}",
        ),
    ],
)
def test_the_command_line_in_an_allocation_of_slurm(
    mpi: str,
    options: tuple[str, ...],
    line: str,
    machine_with: Machine,
    allocation: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    tools = machine_with(mpi)
    allocation(tools)
    assert dry_run(capsys, tools, *options) == line


def test_the_site_chooses_the_type_of_srun(
    machine_with: Machine,
    allocation: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tools = machine_with("intel")
    allocation(tools)
    monkeypatch.setenv("SLURM_MPI_TYPE", "cray_shasta")
    assert dry_run(capsys, tools) == SRUN.format("")


def test_without_pmix_the_launcher_is_mpirun(
    machine_with: Machine, allocation: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    tools = machine_with("openmpi-5")
    allocation(tools)
    install(tools / "srun", SRUN_LIST.replace("pmix", ""))
    assert dry_run(capsys, tools).startswith("BIN/mpirun -np 4 ")
    assert main(["launch", "--launcher", "srun", "--dry-run"]) == 2
    assert (
        "srun knows no --mpi=pmix, which Open MPI needs: `srun --mpi=list` names " in capsys.readouterr().err
    )


def test_the_network_to_the_others_is_chosen(
    machine_with: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = machine_with("openmpi-5")
    monkeypatch.setattr(network, "leading_to_others", lambda hosts: Way("eth1", "10.1.0.0/16"))
    line = dry_run(capsys, tools, *TWO)
    assert "--mca btl_tcp_if_include 10.1.0.0/16 --prtemca oob_tcp_if_include 10.1.0.0/16" in line
    assert "--network-interfaces eth1" in dry_run(capsys, tools, *TWO, "--launcher", "horovodrun", "--gloo")
    line = dry_run(capsys, tools, *TWO, "--mpi-args", "--mca btl_tcp_if_exclude lo,docker0")
    assert line.count("btl_tcp_if") == 1
    monkeypatch.setenv("OMPI_MCA_btl_tcp_if_include", "ib0")
    assert "btl_tcp_if" not in dry_run(capsys, tools, *TWO)


def test_more_ranks_than_cores_yield_while_they_wait(
    machine_with: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = machine_with("openmpi-4")
    monkeypatch.setattr(network, "_route", lambda host: ("127.0.0.1", "127.0.0.1"))
    assert "mpi_yield_when_idle" not in dry_run(capsys, tools, "-np", "2")
    assert "--mca mpi_yield_when_idle 1" in dry_run(capsys, tools, "-np", "3")


def test_what_a_moved_mpi_and_root_need(
    machine_with: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = machine_with("openmpi-5")
    (tools.parent / "pyvenv.cfg").touch()
    monkeypatch.setattr(os, "getuid", lambda: 0)
    home = tools.parent
    allow = " ".join(f"{m}_ALLOW_RUN_AS_ROOT=1 {m}_ALLOW_RUN_AS_ROOT_CONFIRM=1" for m in ("OMPI", "PRTE"))
    line = dry_run(capsys, tools, "-np", "1")
    assert line.startswith(f"env {allow} OPAL_PREFIX={home} BIN/mpirun --prefix {home} --host localhost:1 ")
    assert " -x OPAL_PREFIX " in line


def test_options_of_the_user_come_last_and_override_ours(
    machine_with: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    line = dry_run(
        capsys,
        machine_with("openmpi-5"),
        *("-np", "2", "--mpi-args", "--bind-to core --map-by numa --output 'a b'"),
        training="--name a --optim.name Adam",
    )
    assert line == (
        f"BIN/mpirun --host localhost:2 -np 2 {EXPORT} --bind-to core --map-by numa --output 'a b' {TRAIN} "
        "--optim.name Adam"
    )


def test_a_run_without_a_name_gets_one(machine_with: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    tools = machine_with("openmpi-5")
    line = dry_run(capsys, tools, "-np", "2", training="train --seed 3")
    assert "BIN/python -m hvd_train train --seed 3 --name classification-" in line
    assert dry_run(capsys, tools, "-np", "2", training="bench allreduce").endswith(" bench allreduce")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "the number of ranks is not given: expected -np N, or --hosts H1:2,H2:2"),
        ("-np 0", "-np 0: expected at least 1 rank"),
        ("-np 5 --hosts h1:2,h2:2", "-np 5, but h1:2, h2:2 have 4 slots: expected at most one rank per slot"),
        ("--hosts h1:2 --hostfile f", "--hosts and --hostfile are both given"),
        ("--hosts h1:x", "--hosts h1:x: 'x' is no number of ranks"),
        ("--hostfile gone", "gone: cannot read the hosts"),
        ("-np 2 --gloo", "--gloo with --launcher auto: only horovodrun starts ranks over Gloo"),
        ("-np 2 --launcher srun --hosts h1:2", "srun starts ranks on the hosts of its allocation"),
        ("-np 2 --launcher srun", "there is no srun on PATH"),
        ("-np 2 --mpi-args=--x='", '--mpi-args "--x=\'": No closing quotation'),
        (
            "-np 2 --launcher horovodrun --fault-tolerance",
            "--fault-tolerance under horovodrun: only mpirun of",
        ),
        ("-np 2 --fault-tolerance", "of Open MPI 4.1.8: only Open MPI 5 keeps a job running"),
        ("-np 2 --nonsense", "--nonsense"),
    ],
)
def test_a_job_that_cannot_be_started_has_exit_code_2(
    options: str, message: str, machine_with: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine_with("openmpi-4")
    try:
        code = main(["launch", *options.split(), "--", "--name", "a"])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    assert code == 2
    assert message in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ("--perod 3", "--period"),
        ("--period 0", "sync.period = 0: expected at least 1 local step"),
        ("--resume nowhere", "nowhere is not a run"),
        ("--resume auto", "expected --name NAME"),
        ("--runs . --name taken", "taken exists already; expected a new name"),
        ("bench", "expected `bench allreduce`"),
    ],
)
def test_options_that_no_rank_could_run_are_refused_before_a_rank_is_started(
    training: str, message: str, machine_with: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = machine_with("openmpi-5")
    install(tools / "mpirun", "echo started")
    Path("taken").mkdir()
    try:
        code = main(["launch", "-np", "2", "--", *training.split()])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    assert code == 2
    assert message in said.err
    assert said.out == ""


def test_launch_starts_the_ranks_itself(
    machine_with: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine_with("openmpi-5")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert main(["launch", "-np", "2"]) == 2
    assert "is one of 4 under mpirun of Open MPI: expected a single one" in capsys.readouterr().err


def test_the_mpirun_of_another_mpi_is_refused(
    machine_with: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = machine_with("openmpi-5")
    install(tools / "mpirun", f"echo '{SAYS['mpich-4'][2]}'")
    assert main(["launch", "-np", "2", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "no mpirun of Open MPI 5.0.11, which the package was built for, was found" in said
    assert f"{tools}/mpirun of MPICH 4.3.2" in said


def test_an_mpirun_that_horovodrun_does_not_recognise_is_refused(
    machine_with: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = machine_with("mpich-4")
    line = ["launch", "--launcher", "horovodrun", "-np", "2", "--dry-run"]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert f"horovodrun takes {tools}/mpirun of MPICH 4.3.2 for an unknown MPI" in said
    assert "Use --launcher mpirun, or --gloo" in said
    assert main([*line, "--gloo"]) == 0


def test_ranks_fill_one_host_after_the_other() -> None:
    hosts = (Host("a", 2), Host("b", 2), Host("c", 2))
    assert plan.placed(hosts, 3) == (Host("a", 2), Host("b", 1))
    assert plan.placed(hosts, 6) == hosts
    assert plan.placed((), 3) == (Host("localhost", 3),)


def test_slurms_short_form_of_tasks() -> None:
    assert slurm.expand_tasks("2(x3),1") == [2, 2, 2, 1]
    assert slurm.expand_tasks("4") == [4]
    assert slurm.expand_tasks("") == slurm.expand_tasks("2(x") == []


def test_this_host_is_no_other() -> None:
    assert network.is_this_host("localhost")
    assert network.leading_to_others(["localhost", "127.0.0.1"]) is None
    assert not network.is_this_host("no-such-host.invalid")
