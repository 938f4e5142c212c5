"""A task for the tests whose predictions wait to be killed."""

from __future__ import annotations

import os
import time

from torch import Tensor, nn

from hvd_train.tasks.base import Batch
from tests.mpi.sleepy import Steady


class Unhurried(Steady):
    """Each batch takes 20 ms. With PREDICTED_BATCHES in the environment a rank stops after so many."""

    predicted = 0

    def predict(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        time.sleep(0.02)
        while self.predicted == int(os.environ.get("PREDICTED_BATCHES", "-1")):
            time.sleep(0.02)  # until it is killed: the job cannot end before
        self.predicted += 1
        return self.inner.predict(model, batch)
