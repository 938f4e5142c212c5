"""What the environment of a Slurm job says of it."""

from __future__ import annotations

import pytest

from hvd_train.launching.slurm import num_tasks


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "3"}, 8),
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "3"}, 12),
        ({"SLURM_NNODES": "3"}, 3),
        ({"SLURM_NTASKS": "many", "SLURM_NNODES": "2"}, 2),
        ({"SLURM_NTASKS": "\u00b2", "SLURM_NNODES": "2"}, 2),
        ({}, None),
    ],
)
def test_ranks_are_tasks_else_tasks_per_node_else_nodes(
    environ: dict[str, str], expected: int | None
) -> None:
    assert num_tasks(environ) == expected
