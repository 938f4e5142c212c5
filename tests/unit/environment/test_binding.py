"""What is said of the cores that ranks are bound to."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from hvd_train.environment.binding import CoreBinding, complaints, core_binding

UNBIND = "`mpirun --bind-to none`"


def bindings(
    *masks: Sequence[int],
    host: str = "h1",
    first: int = 0,
    threads: int = 1,
    there: int = 8,
    promised: int = 0,
) -> list[CoreBinding]:
    """Ranks of one host."""
    return [
        CoreBinding(
            rank=first + i,
            host=host,
            cores=frozenset(mask),
            host_cores=8,
            starter_cores=there,
            promised_cores=promised,
            threads=threads,
        )
        for i, mask in enumerate(masks)
    ]


ALL = range(8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (bindings(ALL), []),
        (bindings(ALL, ALL, ALL), []),
        (bindings([0, 1], [2, 3], threads=2), []),
        (bindings([0], [1], there=2), []),  # as many cores as there are
        (bindings([5], there=8), []),  # one process on the core that somebody gave it
        (
            bindings([3], [3], [3], [3], [3]),
            [f"on h1 all ranks are bound to core 3 of 8 and take turns on it. Start them with {UNBIND}."],
        ),
        (
            bindings([0], [1], [0], [2], there=8),
            [f"on h1 ranks 0, 2 are bound to core 0 of 8 and take turns on it. Start them with {UNBIND}."],
        ),
        (
            bindings([0], [1]),
            [
                f"on h1 all ranks are bound to one core each, and 8 are available. Start them with {UNBIND}, "
                "so that each gets more threads."
            ],
        ),
        (
            bindings([0]) + bindings([0], host="h2", first=1),
            [
                f"on h1 and 1 other host rank 0 is bound to one core each, and 8 are available. Start them "
                f"with {UNBIND}, so that each gets more threads."
            ],
        ),
        (
            bindings(ALL) + bindings([1], host="h2", first=1, threads=4),
            [
                "on h2 rank 1 is set to 4 threads on 1 core. Lower `--threads`, or start the ranks with "
                f"{UNBIND}."
            ],
        ),
        (
            bindings(*[[0, 1]] * 6, host="h2", promised=4) + bindings(ALL, host="h3", first=6),
            [
                "on h2 all ranks are bound to 2 cores, but SLURM_CPUS_PER_TASK is 4. Start them with "
                f"{UNBIND}."
            ],
        ),
        (
            bindings(*[[0, 1]] * 6, ALL, promised=4),
            [
                "on h1 ranks 0, 1, 2, 3 and 2 more are bound to 2 cores, but SLURM_CPUS_PER_TASK is 4. Start "
                f"them with {UNBIND}."
            ],
        ),
        (bindings(ALL, promised=64), []),  # a Slurm that promises more than the host has
    ],
)
def test_complaints(given: list[CoreBinding], said: list[str]) -> None:
    assert list(map(str, complaints(given, UNBIND, cores_are_dealt=False))) == said


def test_srun_gives_each_task_the_cores_that_the_job_asked_for() -> None:
    assert complaints(bindings([0], [1]), "`srun --cpu-bind=none`", cores_are_dealt=True) == []
    (complaint,) = complaints(bindings([0], [1], promised=4), "`srun --cpu-bind=none`", cores_are_dealt=True)
    assert (
        complaint.remedy == "Start them with `srun --cpus-per-task`, which srun does not take from the job."
    )


def test_core_binding() -> None:
    binding = core_binding(3, "h2", 5, {"SLURM_CPUS_PER_TASK": "6"})
    assert (binding.rank, binding.host, binding.threads, binding.promised_cores) == (3, "h2", 5, 6)
    assert binding.cores <= set(range(os.cpu_count() or 1))
    assert binding.starter_cores == len(os.sched_getaffinity(os.getppid()))
    assert core_binding(0, "h1", 1, {}).promised_cores == 0
