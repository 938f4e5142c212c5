"""The samples with the largest losses, whatever the number of ranks."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import nn

from hvd_train.comm.base import Communicator
from hvd_train.data.format import SampleSpec
from hvd_train.data.readers.base import RowNumbers
from hvd_train.data.rows import Rows
from hvd_train.data.screen import usable
from hvd_train.data.selection import needed_to_predict
from hvd_train.record.evaluation import WorstSample
from hvd_train.tasks.base import Batch, Task
from hvd_train.tasks.models import evaluating
from hvd_train.tasks.transforming import transform_of


class WorstSamples:
    """Collects them on each rank, batch by batch.

    Args:
        count: how many; 0: none, and no forward pass.
    """

    def __init__(self, task: Task, model: nn.Module, count: int) -> None:
        self._task = task
        self._model = model
        self._count = count
        self._heap: list[tuple[float, int]] = []
        """(loss, -row), the smallest first; of equal losses the first rows are kept."""

    def add(self, numbers: RowNumbers, batch: Batch) -> None:
        """Rows with these numbers in the data, transformed; under `evaluating`. Not collective."""
        losses = self._task.sample_losses(self._model, batch) if self._count else None
        if losses is None:
            return
        losses = losses.nan_to_num(nan=-torch.inf, posinf=torch.inf)
        kept = losses.topk(min(self._count, len(losses))) if self._count < len(losses) else None
        least = kept.values[-1] if kept is not None else -torch.inf
        for i in (losses >= least).nonzero()[:, 0].tolist():
            entry = (float(losses[i]), -int(numbers[i]))
            if entry[0] == -torch.inf:
                continue
            if len(self._heap) < self._count:
                heapq.heappush(self._heap, entry)
            else:
                heapq.heappushpop(self._heap, entry)

    def of_all_ranks(self, comm: Communicator) -> list[tuple[float, int]]:
        """(loss, row of the data), the largest loss first. Collective; every rank gets the same."""
        found = [entry for heap in comm.allgather(self._heap) for entry in heap]
        return [(loss, -row) for loss, row in heapq.nlargest(self._count, found)]


def described(
    task: Task, model: nn.Module, rows: Rows, sample: SampleSpec, worst: Sequence[tuple[float, int]]
) -> list[WorstSample]:
    """The samples by shard and row, with target and prediction; reads each of them. Not collective."""
    with evaluating(model):
        return [_described(task, model, rows, sample, loss, row) for loss, row in worst]


def _described(
    task: Task, model: nn.Module, rows: Rows, sample: SampleSpec, loss: float, row: int
) -> WorstSample:
    (span,) = rows.locate(row, row + 1)
    arrays, _, _ = usable(rows.read(row, row + 1))
    target = arrays[sample.targets]
    batch = transform_of(task)({name: torch.from_numpy(array) for name, array in arrays.items()})
    predicted = task.predict(model, {name: batch[name] for name in needed_to_predict(sample)})
    return WorstSample(
        loss=loss,
        shard=span.shard,
        row=span.start,
        target=float(target.reshape(())) if target.size == 1 else None,
        predicted={name: float(value) for name, value in predicted.items() if value.numel() == 1},
    )
