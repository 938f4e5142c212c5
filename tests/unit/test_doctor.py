"""Each check of `doctor` on a machine that is as it should be, and on one that is not."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Any

import pytest

from hvd_train.config import SyncConfig
from hvd_train.environment import mpi_build
from hvd_train.environment.interfaces import Interface
from hvd_train.environment.launcher import detect
from hvd_train.errors import ConfigError, DataError
from hvd_train.tools.doctor import choices, host, network, parts, slurm, software, storage
from hvd_train.tools.doctor.check import Check, attempt, numbers, size
from hvd_train.tools.doctor.options import Options, parse
from tests.deadlines import seconds
from tests.launching import ROOT, environment, mpi_abi, tool
from tests.unit.environment.test_machine import tree

ALONE = detect({})


def says(folder: Path, name: str, text: str) -> str:
    """A program that prints a text, whatever it is asked; returns a PATH with nothing else on it."""
    folder.mkdir(exist_ok=True)
    (folder / "said").write_text(text)
    program = folder / name
    program.write_text(f"#!/bin/sh\nexec /bin/cat {folder}/said\n")
    program.chmod(0o755)
    return str(folder)


def lines(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


# --- running a check


def test_a_check_that_raises_is_an_error_of_its_own() -> None:
    def broken() -> Check:
        return Check(name="x", seen=str(1 // 0))

    def refused() -> Check:
        raise DataError("x.h5 is missing; expected a shard. Write one.")

    check = attempt("x", broken)
    assert (check.status, check.name) == ("error", "x")
    assert "ZeroDivisionError: " in check.seen
    assert check.remedy
    assert attempt("y", refused) == Check(
        name="y", status="error", seen="x.h5 is missing; expected a shard. Write one."
    )


def test_words() -> None:
    assert [size(n) for n in (0, 1023, 1024, 150 << 10, 5 << 30, 3 << 50)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "150 KiB",
        "5.0 GiB",
        "3072 TiB",
    ]
    assert numbers([3, 0, 1, 2, 7, 9, 10]) == "0-3,7,9-10"


def test_invalid_options(tmp_path: Path) -> None:
    assert parse(["--parameters", "7", "--json"]) == Options(parameters=7, json=True)
    for args in (["--parameters", "0"], ["--timeout", "0"], ["--config", str(tmp_path / "no.toml")]):
        with pytest.raises(ConfigError):
            parse(args)


def test_the_parent_loads_neither_torch_nor_mpi() -> None:
    """A library that crashes when it is loaded must not end doctor."""
    program = (
        "import sys, hvd_train.cli, hvd_train.tools.doctor.run\n"
        "print([m for m in ('torch', 'mpi4py', 'h5py', 'horovod') if m in sys.modules])"
    )
    env = environment({"PYTHONPATH": str(ROOT)})
    job = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=seconds(60)
    )
    assert job.stdout == "[]\n", job.stderr


# --- launcher and library

LIBRARIES = {
    "Open MPI v5.0.11, package: x": ("Open MPI", "mpirun (Open MPI) 5.0.11\n"),
    "MPICH Version:      4.3.2": ("MPICH", "HYDRA build details:\n    Version:     4.3.2\n"),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_mpirun_of_the_library(library: str, tmp_path: Path) -> None:
    family, text = LIBRARIES[library]
    check = software.mpirun(library, ALONE, says(tmp_path, "mpirun", text))
    assert check.status == "ok", check
    assert check.seen.startswith(family)
    assert str(tmp_path / "mpirun") in check.seen


@pytest.mark.parametrize(
    ("text", "status", "seen"),
    [
        ("HYDRA build details:\n Version:   4.3.2\n", "error", "MPICH 4.3.2"),
        ("mpirun (Open MPI) 4.1.8\n", "error", "Open MPI 4.1.8"),
        ("mpirun (Open MPI) 5.0.6\n", "warning", "Open MPI 5.0.6"),
        ("prterun 3.1\n", "warning", "an unknown MPI"),
    ],
)
def test_another_mpirun_first_on_the_path(text: str, status: str, seen: str, tmp_path: Path) -> None:
    check = software.mpirun("Open MPI v5.0.11, package: x", ALONE, says(tmp_path, "mpirun", text))
    assert check.status == status
    assert check.seen.startswith(seen)
    assert "Open MPI 5.0.11" in check.seen + check.remedy
    assert "path" in check.remedy.lower()


def test_no_mpirun_on_the_path(tmp_path: Path) -> None:
    check = software.mpirun("Open MPI v5.0.11", ALONE, str(tmp_path))
    assert (check.status, check.seen) == ("warning", "none on PATH")
    in_step = detect({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"})
    assert software.mpirun("Open MPI v5.0.11", in_step, str(tmp_path)).status == "ok", "it was started"
    assert software.mpirun("", ALONE, str(tmp_path)).status == "ok", "there is no MPI"


def test_the_record_of_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "_build.json"
    real = mpi_build.load

    def at(library: str) -> Check:
        mpi = {"abi": "openmpi", "library": library, "version": "Open MPI v5.0.11, x"}
        record.write_text(json.dumps({"schema": 1, "mpi": mpi}))
        return attempt("build record", software.build_record)

    monkeypatch.setattr(mpi_build, "load", lambda: real(record))
    assert attempt("build record", software.build_record).status == "warning", "built without an MPI"
    assert at(sys.executable).status == "ok"
    gone = at(str(tmp_path / "libmpi.so.40"))
    assert gone.status == "error"
    assert "Open MPI 5.0.11" in gone.seen
    record.write_text("{")
    damaged = attempt("build record", software.build_record)
    assert damaged.status == "error"
    assert "cannot be used" in damaged.seen


# --- this host


@pytest.mark.parametrize(
    ("scope", "xpmem", "status"),
    [
        (None, False, "ok"),
        ("0", False, "ok"),
        ("1", False, "ok"),
        ("2", False, "warning"),
        ("3", False, "warning"),
        ("3", True, "ok"),
    ],
)
def test_copies_within_a_host(scope: str | None, xpmem: bool, status: str, tmp_path: Path) -> None:
    if scope is not None:
        lines(tmp_path / "proc/sys/kernel/yama/ptrace_scope", scope)
    if xpmem:
        lines(tmp_path / "dev/xpmem", "")
    check = host.single_copy(tmp_path)
    assert check.status == status
    assert f"ptrace_scope {scope or 0}" in check.seen
    assert ("no /dev/xpmem" in check.seen) is not xpmem


def test_shared_memory_and_none(tmp_path: Path) -> None:
    assert "memfd works; /dev/shm is of" in host.shared_memory().seen
    without = host.shared_memory(tmp_path)
    assert (without.status, without.seen) == ("warning", "memfd works, but there is no /dev/shm")


def test_a_limit_of_the_cgroup(tmp_path: Path) -> None:
    check = host.cpu_limit(tree(tmp_path / "a", "/a", {"a/cpu.max": "50000 100000"}))
    assert check.status == "warning"
    assert check.seen.startswith("0.5 cores' worth of time, fewer than the")
    assert host.cpu_limit(tree(tmp_path / "b", "/a", {"a/cpu.max": "90000000 100000"})).status == "ok"
    assert host.cpu_limit(tree(tmp_path / "c", "/a", {})).seen == "no limit of a cgroup"


def test_the_cores_of_this_process() -> None:
    mine = sorted(os.sched_getaffinity(0))
    assert host.affinity().seen == f"core{'s'[: len(mine) - 1]} {numbers(mine)} of {os.cpu_count()}"


def test_limits_matter_where_something_needs_more(tmp_path: Path) -> None:
    assert host.locked_memory(tmp_path).status == "ok"
    (tmp_path / "sys/class/infiniband/mlx5_0").mkdir(parents=True)
    assert host.fabrics(tmp_path) == ["mlx5_0"]
    pinned = limited(resource.RLIMIT_MEMLOCK, 65536, lambda: host.locked_memory(tmp_path))
    assert pinned.status == "warning"
    assert pinned.seen == "64.0 KiB, but mlx5_0 must pin memory"
    assert limited(resource.RLIMIT_NOFILE, 300, lambda: host.open_files(2)).status == "ok"
    files = limited(resource.RLIMIT_NOFILE, 300, lambda: host.open_files(100))
    assert files.seen == "300 open files, and a rank in a world of 100 may need 356"
    assert "`ulimit -n 356`" in files.remedy


def limited(what: int, soft: int, check: Callable[[], Check]) -> Check:
    """A check under another soft limit."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        return check()
    finally:
        resource.setrlimit(what, before)


# --- network

ETH0 = Interface("eth0", IPv4Interface("10.0.0.0/24"), up=True, loopback=False)
LO = Interface("lo", IPv4Interface("127.0.0.0/8"), up=True, loopback=True)
DOCKER = Interface("docker0", IPv4Interface("172.17.0.0/16"), up=True, loopback=False)


def test_an_interface_that_every_host_has() -> None:
    assert network.check([LO, ETH0], "Open MPI 5.0.11") == Check(name="interfaces", seen="eth0 (10.0.0.0/24)")
    check = network.check([LO, DOCKER, ETH0], "Open MPI 5.0.11")
    assert check.status == "warning"
    assert "docker0 (172.17.0.0/16)" in check.seen
    assert "--mca btl_tcp_if_include eth0 --prtemca oob_tcp_if_include eth0" in check.remedy
    assert "--mca oob_tcp_if_include eth0" in network.check([DOCKER, ETH0], "Open MPI 4.1.8").remedy
    assert "-iface eth0" in network.check([DOCKER, ETH0], "MPICH 4.3.2").remedy
    assert "--network-interfaces eth0" in network.check([DOCKER, ETH0], "").remedy


def test_interfaces_that_lead_nowhere() -> None:
    down = Interface("virbr0", IPv4Interface("192.168.122.0/24"), up=False, loopback=False)
    assert network.check([LO, ETH0, down], "").status == "ok", "it is down"
    assert "none leads to another host" in network.check([LO, DOCKER], "").seen
    two = network.check(
        [ETH0, Interface("ib0", IPv4Interface("10.1.0.0/24"), up=True, loopback=False)], "MPICH 4.3.2"
    )
    assert "eth0 (10.0.0.0/24), ib0 (10.1.0.0/24)" in two.seen


# --- storage


def test_a_folder_that_can_be_written_and_locked(tmp_path: Path) -> None:
    runs = tmp_path / "not/yet/there"
    assert storage.existing(runs) == tmp_path
    kind = storage.file_system(tmp_path)
    said = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True)
    assert kind.startswith(said.stdout.strip().partition("/")[0][:3]), "ext4 is ext2/ext3 to stat"
    assert storage.runs_folder(runs).status == "ok"
    assert kind in storage.runs_folder(runs).seen
    locks = storage.file_locking(runs, {})
    assert locks.seen == f"flock works on {kind}; HDF5_USE_FILE_LOCKING is not set"
    assert "is 'FALSE'" in storage.file_locking(runs, {"HDF5_USE_FILE_LOCKING": "FALSE"}).seen


def test_a_folder_that_cannot_be_written() -> None:
    check = storage.runs_folder(Path("/proc/runs"))  # not even by root
    assert check.status == "error"
    assert "/proc/runs on proc, which cannot be written" in check.seen
    assert "--runs" in check.remedy


def test_of_two_mounts_the_inner_and_later_one(tmp_path: Path) -> None:
    mounts = [
        "1 0 8:1 / / rw - ext4 /dev/a rw",
        "2 1 0:2 / /home rw - nfs4 server:/home rw",
        "3 1 0:3 / /home/me/my\\040runs rw - xfs /dev/b rw",
        "4 1 0:4 / /home rw shared:1 - lustre mds:/home rw",
    ]
    lines(tmp_path / "proc/self/mountinfo", "\n".join(mounts))
    kinds = [storage.file_system(Path(p), tmp_path) for p in ("/tmp", "/home/me", "/home/me/my runs/x")]
    assert kinds == ["ext4", "lustre", "xfs"]


# --- Slurm

LISTED = "MPI plugin types are...\n\tnone\n\tpmi2\n\tcray_shasta\n"
PMIX = LISTED + "\tpmix\nspecific pmix plugin versions available: pmix_v4\n"


@pytest.mark.parametrize(
    ("text", "mpi", "chosen", "status", "words"),
    [
        (PMIX, "Open MPI 5.0.11", "", "ok", "`srun --mpi=pmix` fits Open MPI 5.0.11"),
        (PMIX, "MPICH 4.3.2", "", "ok", "`srun --mpi=pmi2` fits MPICH 4.3.2"),
        (PMIX, "", "", "ok", "there is no MPI for it"),
        (LISTED, "Open MPI 5.0.11", "", "warning", "Open MPI 5.0.11 needs pmix: start by mpirun"),
        (PMIX, "Open MPI 5.0.11", "pmi2", "warning", "Give srun `--mpi=pmix`"),
        (PMIX, "Open MPI 5.0.11", "pmix_v4", "ok", "pmix_v4"),
        ("srun: fatal: no configuration\n", "Open MPI 5.0.11", "", "warning", "Set SLURM_CONF"),
    ],
)
def test_the_check_of_srun_against_the_mpi(
    text: str, mpi: str, chosen: str, status: str, words: str, tmp_path: Path
) -> None:
    environ = {"PATH": says(tmp_path, "srun", text), "SLURM_MPI_TYPE": chosen}
    check = slurm.srun(mpi, environ)
    assert check.status == status, check
    assert words in check.seen + check.remedy


def test_without_slurm(tmp_path: Path) -> None:
    assert slurm.srun("Open MPI 5.0.11", {"PATH": str(tmp_path)}).seen == "none on PATH"
    assert slurm.allocation({}).seen == "no allocation"
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "4"}
    assert slurm.allocation(job).seen == "job 17, nodes n[1-2], tasks 4"


# --- what an MPI says of its transports

TABLE = """
Host 0 [a] ranks 0 - 1
Connection summary: (pml)
  on-host:  all connections are sm
  off-host: all connections are {}
"""


def test_the_transports_of_open_mpi() -> None:
    one = parts.check_open_mpi(TABLE.format("n/a"), ["ob1"], [], [])
    assert (one.status, one.seen) == ("ok", "within a host sm; PML ob1")
    two = parts.check_open_mpi(TABLE.format("tcp"), ["ob1"], [], [])
    assert (two.status, two.seen) == ("ok", "within a host sm, between hosts tcp; PML ob1")
    slow = parts.check_open_mpi(TABLE.format("tcp"), ["ob1"], [], ["mlx5_0"])
    assert slow.status == "warning"
    assert "mlx5_0" in slow.seen
    old = parts.check_open_mpi("", ["ob1"], ["vader", "tcp"], [])
    assert old.seen == "PML ob1, BTL vader, tcp are open"


def test_the_transports_of_mpich() -> None:
    version = "MPICH Version:      4.3.2\nMPICH Device:       ch4:ucx ofi\n"
    said = "==== UCX netmod Capability ====\ntag_bits: 31\n"
    assert parts.check_mpich(version, said).seen == "device ch4:ucx ofi, netmod ucx"
    intel = parts.check_mpich("Intel(R) MPI Library 2021.13", "MPI startup(): libfabric provider: tcp\n")
    assert intel.seen == "libfabric's provider tcp"


# --- the whole, alone

DOCTOR = [sys.executable, "-m", "hvd_train", "doctor"]


def doctor(*args: str, **extra: str) -> subprocess.CompletedProcess[str]:
    env = environment({"PYTHONPATH": str(ROOT), **extra})
    return subprocess.run(
        [*DOCTOR, *args], capture_output=True, text=True, env=env, timeout=seconds(60), check=False
    )


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        ({}, "every 10 local steps"),
        ({"period": 1}, "after every local step; the run says after 20 rounds if they take most of its time"),
        ({"schedule": "auto"}, "every 10 local steps at first, by the schedule auto"),
        ({"schedule": "time", "seconds": 0.5}, "after 0.5 s of local steps"),
        ({"mode": "none"}, "never"),
        ({"mode": "gradients"}, "of gradients, in every local step"),
        ({"period": 100, "outer": "nesterov"}, "every 100 local steps"),
    ],
)
def test_how_often_the_ranks_average(values: dict[str, Any], seen: str) -> None:
    assert choices.averages(SyncConfig(**values)) == Check(name="averages", seen=seen)


def test_long_periods_of_plain_averages_are_a_warning() -> None:
    check = choices.averages(SyncConfig(period=49))
    assert (check.status, check.remedy) == ("warning", "")
    assert check.seen == (
        "sync.period = 49 without an outer optimizer: above 48 local steps plain averaging tends to lose "
        "accuracy. Set sync.outer = 'nesterov', or a shorter period."
    )
    check = choices.averages(SyncConfig(schedule="qsr", qsr_alpha=0.1, max_period=60))
    assert check.seen.startswith("sync.max_period = 60 without an outer optimizer")


def test_a_library_that_does_not_return(tmp_path: Path) -> None:
    """The children are ended at the deadline, and doctor says what it knows without them."""
    job = doctor("--timeout", "0.05", "--json")
    report = json.loads(job.stdout)
    late = [check for check in report["checks"] if "did not end within 0.05 s" in check["seen"]]
    assert late, report
    assert all(check["status"] == "error" and check["remedy"] for check in late)
    assert job.returncode == 1
    assert {"affinity", "shared memory", "runs"} <= {check["name"] for check in report["checks"]}


@pytest.mark.parametrize(
    "lines",
    [{"torch": "error"}, {"MPI": "error", "Horovod": "warning"}],
    ids=" ".join,
)
def test_packages_that_cannot_be_imported_are_lines(lines: dict[str, str], tmp_path: Path) -> None:
    for name in lines:
        module = {"torch": "torch", "MPI": "mpi4py", "Horovod": "horovod"}[name]
        (tmp_path / f"{module}.py").write_text("raise ImportError('its wheel is for another machine')")
    job = doctor("--json", PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    checks = {check["name"]: check for check in json.loads(job.stdout)["checks"]}
    for name, status in lines.items():
        assert checks[name]["status"] == status
        assert "its wheel is for another machine" in checks[name]["seen"]
    assert {"mpirun", "ring in a host", "runs"} <= checks.keys()
    assert (job.returncode, job.stderr) == (1, "")


def test_an_mpi_that_ends_the_process() -> None:
    tool("mpirun")
    if mpi_abi() != "openmpi":
        pytest.skip("only Open MPI is told to fail by this variable")
    job = doctor("--json", OMPI_MCA_pml="nothing")
    report = json.loads(job.stdout)
    (world,) = (check for check in report["checks"] if check["name"] == "world")
    assert world["status"] == "error"
    assert "MPI_Init ended the process with" in world["seen"]
    assert {"torch", "MPI", "ring in a host"} <= {check["name"] for check in report["checks"]}
    assert job.returncode == 1
