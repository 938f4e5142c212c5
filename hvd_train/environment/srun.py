"""The ways in which srun can start an MPI. Imports neither torch nor MPI."""

from __future__ import annotations

import re


def mpi_types(listing: str) -> frozenset[str]:
    """The names that `--mpi` takes, of what `srun --mpi=list` prints; empty for other text."""
    # One name a line, after a line of words; newer ones list the versions of pmix behind a colon.
    names = listing.partition("plugin types are")[2]
    lines = [line.rpartition(":")[2] for line in names.splitlines()[1:]]
    return frozenset(word for line in lines for word in re.split(r"[,\s]+", line) if word)
