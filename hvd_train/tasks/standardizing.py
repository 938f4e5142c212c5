"""Finds the mean and deviation of the inputs for a model that standardizes them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from torch import nn

from hvd_train.comm.agree import together
from hvd_train.comm.base import Communicator, Op
from hvd_train.data.catalog import Catalog
from hvd_train.data.exact_sums import ExactSums, Floats, sums_of
from hvd_train.data.moments import Moments, mean_and_deviation, moments_of
from hvd_train.data.screen import Screen
from hvd_train.tasks.inputs import Inputs


def standardize(model: nn.Module, catalog: Catalog, comm: Communicator, screen: Screen | None = None) -> None:
    """Gives the models that standardize their inputs the mean and deviation of the training rows, which the
    ranks read once, each a part, but for those that `screen` marks; the same bits for any number of ranks.
    Collective; it does nothing where `data.standardize` is not set."""
    sample = catalog.sample
    if sample.standardize == "":
        return
    name, grouping = sample.inputs, sample.standardize
    field, rank, size = sample.fields[name], comm.rank, comm.size
    mine = together(comm, lambda: moments_of(catalog.train, name, field, grouping, rank, size, screen))
    mean, deviation = _joined(mine, comm)
    for module in model.modules():
        if isinstance(module, Inputs):
            module.take(mean, deviation)


def _joined(mine: Moments, comm: Communicator) -> tuple[Floats, Floats]:
    """Mean and deviation by the parts of all ranks. Collective."""
    counts = comm.allreduce(mine.counts, Op.SUM)
    lowest, highest = comm.allreduce(mine.lowest, Op.MIN), comm.allreduce(mine.highest, Op.MAX)
    totals, squares = (_sums(sums, comm) for sums in (mine.total, mine.squares))
    return mean_and_deviation(counts, lowest, highest, totals, squares)


def _sums(mine: ExactSums, comm: Communicator) -> list[Fraction]:
    first, stop = mine.places
    first, stop = comm.allreduce(np.array([first, -stop]), Op.MIN).astype(int).tolist()
    return sums_of(comm.allreduce(mine.table(first, -stop), Op.SUM), first)
