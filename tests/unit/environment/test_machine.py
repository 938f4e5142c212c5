"""Cores and memory: shares worked out by hand, and the files of cgroups in a folder of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from hvd_train.environment.machine import (
    available_memory,
    cpu_limit,
    fair_share,
    resident_memory,
    share_of_memory,
    threads_for,
    throttling,
)
from tests.launching import run


def cores(*numbers: int) -> frozenset[int]:
    return frozenset(numbers)


def share(*masks: frozenset[int]) -> list[int]:
    return [fair_share(mask, masks) for mask in masks]


def test_alone_a_rank_has_all_cores() -> None:
    assert share(cores(*range(8))) == [8]


def test_ranks_that_share_all_cores_share_them_evenly() -> None:
    assert share(*[cores(*range(8))] * 4) == [2, 2, 2, 2]
    assert share(*[cores(*range(8))] * 3) == [2, 2, 2], "8 / 3, rounded down"
    assert share(*[cores(0, 1)] * 5) == [1] * 5, "at least one"


def test_ranks_that_are_bound_have_what_they_are_bound_to() -> None:
    assert share(cores(0, 1, 2, 3), cores(4, 5)) == [4, 2]


def test_masks_that_overlap_in_part() -> None:
    # 0 and 1 are mine, 2 and 3 shared by two: 2 + 2/2 = 3, and 2/2 + 1 = 2.
    assert share(cores(0, 1, 2, 3), cores(2, 3, 4)) == [3, 2]
    # Cores 0 to 2 in three masks, 3 in two: 3 * 1/3 + 1/2 = 1.5; exactly 1 without 3.
    assert share(cores(0, 1, 2, 3), cores(0, 1, 2, 3), cores(0, 1, 2)) == [1, 1, 1]
    # Six thirds are exactly 2, which floating-point sums miss.
    assert share(*[cores(*range(6))] * 3) == [2, 2, 2]
    assert share(*[cores(*range(49))] * 49) == [1] * 49


@pytest.mark.parametrize(
    ("limit", "ranks", "threads"),
    [
        (None, 2, 4),
        (16.0, 2, 4),
        (8.0, 2, 4),
        (6.0, 2, 3),
        (5.0, 2, 2),
        (0.5, 2, 1),
        (4.0, 1, 4),
        (1.5, 1, 1),
    ],
)
def test_no_more_threads_than_the_part_of_the_limit(limit: float | None, ranks: int, threads: int) -> None:
    mask = cores(*range(4 * ranks))
    assert threads_for(mask, [mask] * ranks, limit) == threads


MOUNTS = (
    "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
    "31 23 0:27 / /proc rw - proc proc rw\n"
)


def tree(root: Path, own: str, files: dict[str, str], free_kb: int = 1000) -> Path:
    """/proc and /sys of a process in the cgroup `own`."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"1:cpu:/elsewhere\n0::{own}\n")
    (root / "proc/self/mountinfo").write_text(MOUNTS)
    memory = f"MemTotal:  99999 kB\nMemFree:  1 kB\nMemAvailable:  {free_kb} kB\n"
    (root / "proc/meminfo").write_text(memory)
    put(root / "sys/fs/cgroup", files)
    return root


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"a/b/cpu.max": "max 100000"}, None),
        ({"a/b/cpu.max": "250000 100000"}, 2.5),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 0.5),
        ({"a/b/cpu.max": "300000 100000", "a/cpu.max": "400000 200000"}, 2.0),
        ({"a/b/cpu.max": "300000 100000", "cpu.max": "100000 100000"}, 1.0),
        ({"a/c/cpu.max": "100000 100000", "a/b/c/cpu.max": "100000 100000"}, None),
    ],
)
def test_the_smallest_limit_of_this_cgroup_and_those_above(
    files: dict[str, str], limit: float | None, tmp_path: Path
) -> None:
    assert cpu_limit(tree(tmp_path, "/a/b", files)) == limit


def test_a_process_at_the_top_and_one_without_cgroups(tmp_path: Path) -> None:
    assert cpu_limit(tree(tmp_path / "top", "/", {"cpu.max": "150000 100000"})) == 1.5
    bare = tree(tmp_path / "bare", "/a", {})
    (bare / "proc/self/cgroup").unlink()
    assert cpu_limit(bare) is None
    assert available_memory(bare) == 1000 * 1024
    version_1 = tree(tmp_path / "one", "/a", {"a/cpu.max": "100000 100000"})
    (version_1 / "proc/self/cgroup").write_text("4:memory:/a\n1:cpu:/a\n")
    assert cpu_limit(version_1) is None


def test_throttling_is_that_of_the_cgroup_that_was_held_back_most(tmp_path: Path) -> None:
    inner = "usage_usec 5\nnr_periods 40\nnr_throttled 3\nthrottled_usec 9"
    files = {
        "a/b/cpu.stat": inner,
        "a/cpu.stat": "nr_periods 50\nnr_throttled 20",
        "cpu.stat": "usage_usec 7",
    }
    assert throttling(tree(tmp_path / "two", "/a/b", files)) == (50, 20)
    assert throttling(tree(tmp_path / "none", "/a/b", {"a/b/cpu.stat": "usage_usec 5"})) == (0, 0)
    older = version_1(tmp_path / "one", "/a", {})
    put(older / "sys/fs/cgroup/cpu,cpuacct", {"cpu.stat": "nr_periods 8\nnr_throttled 2"})
    assert throttling(older) == (8, 2)


def test_resident_memory_grows_with_what_is_written() -> None:
    before = resident_memory()
    held = bytearray(os.urandom(1 << 20)) * 64
    assert resident_memory() - before > len(held) // 2


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1_024_000),
        ({"a/b/memory.max": "max", "a/b/memory.current": "5"}, 1_024_000),
        ({"a/b/memory.max": "600000", "a/b/memory.current": "100000"}, 500_000),
        ({"a/b/memory.max": "9000000000", "a/b/memory.current": "100000"}, 1_024_000),
        ({"a/b/memory.max": "100", "a/b/memory.current": "150"}, 0),
        # What is left above is what all groups in it have left over, not this one alone.
        (
            {
                "a/b/memory.max": "900000",
                "a/b/memory.current": "100000",
                "a/memory.max": "1000000",
                "a/memory.current": "950000",
            },
            50_000,
        ),
    ],
)
def test_leftover_memory(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert available_memory(tree(tmp_path, "/a/b", files)) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # Above memory.high a process is slowed until it stands still: as good as a limit.
        ({"memory.max": "max", "memory.high": "300000", "memory.current": "100000"}, 200_000),
        ({"memory.max": "250000", "memory.high": "300000", "memory.current": "100000"}, 150_000),
        # Pages of files that were read once count as used, and are given up when memory is wanted.
        (
            {
                "memory.max": "500000",
                "memory.current": "450000",
                "memory.stat": "anon 50000\nfile 400000\ninactive_file 300000\nactive_file 100000",
            },
            350_000,
        ),
    ],
)
def test_what_counts_in_a_cgroup(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    root = tree(tmp_path, "/a/b", {f"a/b/{name}": text for name, text in files.items()})
    assert available_memory(root) == expected


VERSION_1 = (
    "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
    "33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
)
NO_LIMIT = str((1 << 63) - 4096)


def version_1(root: Path, own: str, files: dict[str, str], top: str = "/") -> Path:
    """As `tree`, of a machine whose memory is limited by cgroups of version 1."""
    tree(root, "/", {})
    (root / "proc/self/cgroup").write_text(f"9:name=systemd:/\n4:memory:{own}\n1:cpu,cpuacct:/\n0::/\n")
    (root / "proc/self/mountinfo").write_text(VERSION_1.format(top=top))
    put(root / "sys/fs/cgroup/memory", files)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a/memory.limit_in_bytes": NO_LIMIT, "a/memory.usage_in_bytes": "77"}, 1_024_000),
        ({"a/memory.limit_in_bytes": "600000", "a/memory.usage_in_bytes": "100000"}, 500_000),
        ({"memory.limit_in_bytes": "700000", "memory.usage_in_bytes": "300000"}, 400_000),
        # With swap counted in, what is left may be less than without.
        (
            {
                "a/memory.limit_in_bytes": "600000",
                "a/memory.usage_in_bytes": "100000",
                "a/memory.memsw.limit_in_bytes": "600000",
                "a/memory.memsw.usage_in_bytes": "350000",
            },
            250_000,
        ),
        # `total_`: of the groups below as well, as the usage is.
        (
            {
                "a/memory.limit_in_bytes": "600000",
                "a/memory.usage_in_bytes": "550000",
                "a/memory.stat": "inactive_file 1\ntotal_inactive_file 200000",
            },
            250_000,
        ),
        # A limit of a group above that is not visible here.
        (
            {
                "a/memory.limit_in_bytes": NO_LIMIT,
                "a/memory.usage_in_bytes": "50000",
                "a/memory.stat": "hierarchical_memory_limit 400000",
            },
            350_000,
        ),
    ],
)
def test_leftover_memory_of_version_1(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert available_memory(version_1(tmp_path, "/a", files)) == expected


@pytest.mark.parametrize(
    ("own", "top"),
    [
        ("/docker/0a1b", "/docker/0a1b"),  # the container's group is mounted, and named as the host names it
        ("/docker/0a1b/job", "/docker/0a1b"),
        ("/", "/"),  # a namespace of its own
        ("/../elsewhere", "/"),  # a process that was moved out of the namespace that looks at it
        ("/docker/0a1b", "/docker/0a1"),  # no prefix, though the text begins alike
    ],
)
def test_a_container_finds_the_limit_at_the_top_of_what_it_sees(own: str, top: str, tmp_path: Path) -> None:
    files = {"memory.limit_in_bytes": "600000", "memory.usage_in_bytes": "200000"}
    assert available_memory(version_1(tmp_path / "1", own, files, top)) == 400_000
    two = tree(tmp_path / "2", own, {"memory.max": "600000", "memory.current": "200000"})
    (two / "proc/self/mountinfo").write_text(MOUNTS.replace(" / /sys", f" {top} /sys"))
    assert available_memory(two) == 400_000


STATUS = "Name:\tpython\nVmSize:\t     300 kB\nVmRSS:\t      50 kB\nVmData:\t     100 kB\n"


@pytest.mark.parametrize(
    ("address_space", "data", "expected"),
    [
        ("unlimited", "unlimited", 1_024_000 // 4),
        (str(400 * 1024), "unlimited", 100 * 1024),
        ("unlimited", str(150 * 1024), 50 * 1024),
        (str(200 * 1024), "unlimited", 0),
        (str(1 << 40), str(1 << 40), 1_024_000 // 4),
    ],
)
def test_the_limits_of_a_process_are_each_ranks_own(
    address_space: str, data: str, expected: int, tmp_path: Path
) -> None:
    root = tree(tmp_path, "/", {})
    put(root / "proc/self", {"status": STATUS})
    limits = f"Max data size             {data}            unlimited            bytes\n"
    limits += f"Max address space         {address_space}            unlimited            bytes"
    put(root / "proc/self", {"limits": limits})
    assert share_of_memory(4, root, {}) == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, 20 * 2**20),
        ({"SLURM_MEM_PER_NODE": "10"}, 10 * 2**20 - 2 * 50 * 1024),
        ({"SLURM_MEM_PER_NODE": "0"}, 20 * 2**20),  # all of the node
        ({"SLURM_MEM_PER_CPU": "2", "SLURM_CPUS_ON_NODE": "4"}, 8 * 2**20 - 2 * 50 * 1024),
        ({"SLURM_MEM_PER_CPU": "2"}, 20 * 2**20),
        ({"SLURM_MEM_PER_NODE": "1000000"}, 20 * 2**20),
    ],
)
def test_the_allocated_memory_minus_that_of_the_ranks(
    environ: dict[str, str], expected: int, tmp_path: Path
) -> None:
    root = tree(tmp_path, "/", {}, free_kb=20 * 1024)
    put(root / "proc/self", {"status": STATUS})
    assert available_memory(root, 2, environ) == expected
    assert share_of_memory(2, root, environ) == expected // 2


def test_a_limit_on_the_address_space_is_seen_by_the_process_that_has_it() -> None:
    program = (
        "import resource\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({512 << 20}, {512 << 20}))\n"
        "from hvd_train.environment.machine import share_of_memory\n"
        "print(share_of_memory(1))"
    )
    job = run([sys.executable, "-c", program], deadline_s=60)
    assert job.returncode == 0, job.output
    assert 0 < int(job.stdout) < 512 << 20


def test_this_machine_answers() -> None:
    limit = cpu_limit()
    assert limit is None or limit > 0
    assert 0 < available_memory() < 1 << 50


def test_the_mask_is_read_before_torch_can_change_it() -> None:
    """As by mpirun --bind-to core: the command line sees the one core, whatever torch does later."""
    core = min(os.sched_getaffinity(0))
    program = (
        "import os, sys\n"
        f"os.sched_setaffinity(0, {{{core}}})\n"
        "import hvd_train.cli\n"
        "assert 'torch' not in sys.modules\n"
        "from hvd_train.environment.machine import AFFINITY\n"
        "print(sorted(AFFINITY))"
    )
    job = run([sys.executable, "-c", program], deadline_s=60)
    assert job.returncode == 0, job.output
    assert job.stdout.strip() == f"[{core}]"
