"""What counts of the targets of a batch, and how much: the weights and masks of a data set."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from hvd_train.data.format import SampleSpec
from hvd_train.data.labels import IGNORED
from hvd_train.errors import DataError, TaskError
from hvd_train.tasks.base import Batch


class Counting:
    """The weights and the mask of the built-in tasks, and the mask of targets that are padded.

    A weight multiplies the loss of its sample; the mean divides by the number of samples that count, not by
    the sum of their weights, for the reason given at `Classification`. A sample of weight 0 does not count.

    Raises `TaskError` on construction for a field that is no weight or mask of these targets.
    """

    def __init__(self, spec: SampleSpec) -> None:
        self._spec = spec
        self._padded = spec.mask_of(spec.targets)
        shapes = {name: field.shape for name, field in spec.fields.items()}
        if spec.weights and prod(shapes[spec.weights]) != 1:
            raise TaskError(
                f"data.weights: `{spec.weights}` has the shape {list(shapes[spec.weights])} a sample; "
                "expected one number. For weights within a sample define a task of your own."
            )
        if spec.mask and prod(shapes[spec.mask]) != prod(shapes[spec.targets]):
            raise TaskError(
                f"data.mask: `{spec.mask}` has the shape {list(shapes[spec.mask])} a sample; expected "
                f"{list(shapes[spec.targets])}, that of `{spec.targets}`. Name a dataset of this shape."
            )

    @property
    def is_plain(self) -> bool:
        """Whether all targets count alike."""
        return not (self._spec.weights or self._spec.mask or self._padded)

    def weights(self, batch: Batch) -> Tensor | None:
        """The weight of each sample, float32 or float64 [B]; None where all have the same. Raises
        `DataError`."""
        if not self._spec.weights:
            return None
        weights = batch[self._spec.weights].reshape(-1)
        weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
        if not bool((weights >= 0).all()) or not bool(weights.isfinite().all()):
            wrong = weights[~(weights >= 0) | ~weights.isfinite()][0]
            raise DataError(
                f"data.weights: `{self._spec.weights}` holds {wrong:g}; expected weights of 0 or more. Leave "
                "such samples out by a weight of 0."
            )
        return weights

    def counts(self, batch: Batch) -> Tensor:
        """Which of the targets count, bool [B, *targets]."""
        targets = batch[self._spec.targets]
        mask = torch.ones(targets.shape, dtype=torch.bool, device=targets.device)
        if self._spec.mask:
            mask &= batch[self._spec.mask].reshape(targets.shape) != 0
        if self._padded:
            values = batch[self._padded]
            mask &= values.reshape(*values.shape, *[1] * (targets.ndim - values.ndim))
        weights = self.weights(batch)
        if weights is not None:
            mask &= (weights > 0).reshape(-1, *[1] * (targets.ndim - 1))
        return mask

    def classes(self, batch: Batch) -> Tensor:
        """The targets, int64, with those that do not count as `IGNORED`."""
        targets = batch[self._spec.targets].long()
        return targets if self.is_plain else targets.masked_fill(~self.counts(batch), IGNORED)
