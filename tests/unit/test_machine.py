"""Cores and memory: shares worked out by hand, and the files of cgroups in a folder of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_train.machine import available_memory, cpu_limit, fair_share, threads_for
from tests.launching import ROOT, environment


def cores(*numbers: int) -> frozenset[int]:
    return frozenset(numbers)


def share(*masks: frozenset[int]) -> list[int]:
    return [fair_share(mask, masks) for mask in masks]


def test_alone_all_cores_are_mine() -> None:
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


def tree(root: Path, own: str, files: dict[str, str], free_kb: int = 1000) -> Path:
    """/proc and /sys of a process in the cgroup `own`."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"1:cpu:/elsewhere\n0::{own}\n")
    memory = f"MemTotal:  99999 kB\nMemFree:  1 kB\nMemAvailable:  {free_kb} kB\n"
    (root / "proc/meminfo").write_text(memory)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


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
def test_memory_that_is_left(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    assert available_memory(tree(tmp_path, "/a/b", files)) == expected


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
        "from hvd_train.machine import AFFINITY\n"
        "print(sorted(AFFINITY))"
    )
    env = environment({"PYTHONPATH": str(ROOT)})
    job = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=60, check=True
    )
    assert job.stdout.strip() == f"[{core}]"
