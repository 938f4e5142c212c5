"""What doctor makes of the reports of all ranks: what is alike, what differs, and what a host must hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hvd_train import machine
from hvd_train.binding import Seat
from hvd_train.comm.launcher import Launcher
from hvd_train.config import Config, OptimConfig, SyncConfig, embedded_config
from hvd_train.tools.doctor import need, world
from hvd_train.tools.doctor.check import Check
from hvd_train.tools.doctor.text import in_words
from hvd_train.tools.doctor.world import Report
from tests.unit.test_machine import tree

MIB = 1 << 20


ALONE = Launcher(name="", size=1, rank=0, provides="nothing")
MPIRUN = Launcher(name="mpirun of Open MPI", size=2, rank=0, provides="mpi")


def report(
    rank: int,
    host: str = "a",
    *checks: Check,
    cores: tuple[int, ...] = (0, 1),
    there: int = 2,
    promised: int = 0,
    free: int = 0,
) -> Report:
    seat = Seat(
        rank=rank,
        host=host,
        cores=frozenset(cores),
        host_cores=there,
        starter_cores=there,
        promised_cores=promised,
        threads=1,
    )
    return Report(seat=seat, cpu_limit=None, free_bytes=free, checks=tuple(checks))


def test_a_report_crosses_as_plain_values() -> None:
    sent = report(3, "b", Check(name="python", seen="3.11.7", alike="3.11.7"), cores=(4, 2), free=7)
    assert Report.from_json(json.loads(json.dumps(sent.to_json()))) == sent


def test_what_is_alike_is_said_once_and_what_differs_by_its_ranks() -> None:
    python = Check(name="python", seen="3.11.7", alike="3.11.7")
    here, there = (Check(name="affinity", seen=f"cores {c} of 4") for c in ("0-3", "0"))
    reports = [report(r, "ab"[r // 2], python, there if r in (1, 3) else here) for r in range(4)]
    findings = world.merge(reports)
    assert [(f.check, f.ranks, f.everywhere) for f in findings] == [
        (python, (0, 1, 2, 3), True),
        (here, (0, 2), False),
        (there, (1, 3), False),
    ]
    text = in_words({"errors": 0, "warnings": 0, "start": "Go."}, findings, {r.rank: r.host for r in reports})
    assert text.splitlines() == [
        "hvd_train doctor: 4 ranks on a, b",
        "ok       python    3.11.7",
        "ok       affinity  ranks 0,2 (a, b): cores 0-3 of 4",
        "ok       affinity  ranks 1,3 (a, b): cores 0 of 4",
        "Go.",
        "0 errors, 0 warnings.",
    ]


def test_hosts_with_different_versions_are_an_error() -> None:
    reports = [
        report(r, h, Check(name="torch", seen=v, alike=v)) for r, h, v in ((0, "a", "2.4"), (1, "b", "2.5"))
    ]
    findings = world.merge(reports)
    assert [(f.check.status, f.check.seen, f.ranks) for f in findings] == [
        ("error", "2.4", (0,)),
        ("error", "2.5", (1,)),
    ]
    assert all("install the same on every host" in f.check.remedy for f in findings)
    broken = Check(name="torch", status="error", seen="cannot be imported", remedy="pip install torch")
    assert world.merge([reports[0], report(1, "b", broken)])[1].check == broken, "its own remedy stays"


def test_what_only_one_rank_of_a_host_looks_at_is_no_difference() -> None:
    horovod = Check(name="Horovod", seen="0.28.1")
    (finding,) = world.merge([report(0, "a", horovod), report(1), report(2, "b", horovod), report(3, "b")])
    assert (finding.ranks, finding.everywhere) == ((0, 2), True)


def test_ranks_of_a_host_that_do_not_share_memory() -> None:
    hosts = world.by_host([report(0), report(1), report(2, "b")])
    assert world.places(hosts, "ring", 2).seen == (
        "3 ranks on 2 hosts (a: 0-1, b: 2) came together under `ring`"
    )
    apart = world.places(hosts, "ring", 3)
    assert apart.status == "warning"
    assert "as if on 3 hosts" in apart.seen


@pytest.mark.parametrize(
    ("masks", "present", "status", "words"),
    [
        ([(0, 1, 2, 3)] * 2, 4, "ok", "2 for each of 2 ranks on 4 cores"),
        ([(0,), (1,)], 4, "warning", "bound to one core each"),
        ([(0,), (1,)], 2, "ok", "1 for each of 2 ranks on 2 cores"),
        ([(0, 1)] * 3, 2, "warning", "1 for each of 3 ranks on 2 cores"),
        ([(0, 1, 2), (3, 4)], 6, "ok", "2 to 3 for each of 2 ranks"),
    ],
)
def test_threads(masks: list[tuple[int, ...]], present: int, status: str, words: str) -> None:
    ranks = [report(i, cores=mask, there=present) for i, mask in enumerate(masks)]
    (check,) = world.threads(ranks, MPIRUN)
    assert check.status == status, check
    assert words in check.seen
    assert bool(check.remedy) is (status != "ok")


def test_the_remedy_is_that_of_the_launcher() -> None:
    (bound,) = world.threads([report(i, cores=(i,), there=4) for i in range(2)], MPIRUN)
    assert bound.remedy.startswith("Start them with `mpirun --bind-to none`")
    srun = Launcher(name="srun", size=2, rank=0, provides="mpi")
    (short,) = world.threads([report(i, there=4, promised=4) for i in range(2)], srun)
    assert short.seen == (
        "1 for each of 2 ranks on 2 cores: all ranks are bound to 2 cores, but SLURM_CPUS_PER_TASK is 4"
    )
    assert short.remedy == "Start them with `srun --cpus-per-task`, which srun does not take from the job."


def test_cores_that_are_wrong_on_one_of_two_hosts() -> None:
    reports = [report(0), report(1, cores=(0,)), report(2, "b", cores=(0,)), report(3, "b", cores=(0,))]
    found = [f for f in world.judge(reports, "ring", 2, None, MPIRUN) if f.check.name == "threads"]
    assert [(f.check.status, f.ranks, f.everywhere) for f in found] == [
        ("ok", (0, 1), False),
        ("warning", (2, 3), False),
    ]
    assert "all ranks are bound to core 0 of 2 and take turns on it" in found[1].check.seen


@pytest.mark.parametrize(
    ("ranks", "backend", "needed"),
    [
        (2, "ring", 4 * 8 + 2 * 4),  # (p + 2) S and p gradients
        (2, "mpi", 6 * 8 + 2 * 4),  # each rank has its own anchors
        (1, "solo", 3 * 8 + 4),
    ],
)
def test_memory_is_reckoned_for_the_ranks_of_a_host(ranks: int, backend: str, needed: int) -> None:
    def check(free: int) -> Check:
        of_host = [report(r, free=free, cores=(0,)) for r in range(ranks)]
        return world.memory(of_host, backend, "1 parameter", 8 * MIB, 4 * MIB)

    assert check(needed * MIB).status == "ok"
    short = check(needed * MIB - 1)
    assert short.status == "error"
    assert f"{needed}.0 MiB" in short.seen
    assert short.remedy


def test_a_limit_that_is_too_small_for_so_many_parameters(tmp_path: Path) -> None:
    root = tree(tmp_path, "/a", {"a/memory.max": str(100 * MIB), "a/memory.current": "0"}, free_kb=10**6)
    of_host = [report(r, free=machine.available_memory(root)) for r in range(2)]
    for parameters, status in ((2_000_000, "ok"), (3_000_000, "error")):
        needs = need.of(Config(), parameters)
        check = world.memory(of_host, "ring", needs.words, needs.state_bytes, needs.private_bytes)
        assert check.status == status, check
    assert "3,000,000 parameters, S = 22.9 MiB: 2 ranks need 4 S" in check.seen
    assert "of 100 MiB free" in check.seen


def test_of_several_hosts_those_that_have_too_little() -> None:
    needs = {"words": "1 parameter", "state_bytes": 8 * MIB, "private_bytes": 0}

    def findings(*free: int) -> list[tuple[str, tuple[int, ...]]]:
        reports = [report(r, "abc"[r // 2], free=free[r // 2] * MIB) for r in range(6)]
        found = world.judge(reports, "ring", 3, needs, ALONE)
        return [(f.check.status, f.ranks) for f in found if f.check.name == "memory"]

    assert findings(90, 50, 60) == [("ok", (2, 3))], "4 S are 32 MiB; b has the least"
    assert findings(90, 20, 10) == [("error", (2, 3)), ("error", (4, 5))]


def test_alone_a_rank_for_each_core_should_fit_too() -> None:
    (alone,) = [report(0, free=40 * MIB, cores=(0, 1, 2, 3))]
    check = world.memory([alone], "solo", "1 parameter", 8 * MIB, 0)
    assert check.status == "warning"
    assert "4 ranks need 6 S" in check.seen
    assert "no more than 3 ranks" in check.remedy


def test_what_each_optimizer_keeps() -> None:
    n = 1_000_003
    sgd = need.of(Config(), n)
    assert (sgd.state_bytes, sgd.private_bytes) == (8 * n, 4 * n), "parameters and momentum; gradients"
    adam = Config(optim=OptimConfig(name="AdamW", lr=1e-3))
    assert need.of(adam, n).state_bytes == 12 * n
    kept = need.of(replace(adam, sync=SyncConfig(optimizer_state="keep")), n)
    assert (kept.state_bytes, kept.private_bytes) == (4 * n, 12 * n)


def test_the_embedded_model() -> None:
    found = need.of(embedded_config(), None)
    assert found.words.endswith(" parameters")
    num = int(found.words.split()[0].replace(",", ""))
    assert 2 * 4 * num <= found.state_bytes <= 2 * (4 * num + 64 * 20), "each tensor begins at 64 bytes"
    assert found.private_bytes == 4 * num
