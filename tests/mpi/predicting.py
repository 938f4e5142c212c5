"""A task for the tests whose predictions take a moment, so that they can be killed."""

from __future__ import annotations

import time

from torch import Tensor, nn

from hvd_train.tasks.base import Batch
from tests.mpi.sleepy import Steady


class Unhurried(Steady):
    """Each batch takes 20 ms."""

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        time.sleep(0.02)
        return self.inner.predict(model, batch)
