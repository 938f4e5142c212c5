"""The handwritten digits that scikit-learn ships."""

from __future__ import annotations

import numpy as np

from hvd_train.data.sources.base import Arrays
from hvd_train.errors import DataError


def load_digits() -> Arrays:
    """1797 digits: inputs uint8 [1797, 8, 8] of 0 to 16, targets int64 [1797].

    Raises `DataError` where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise DataError(
            "digits: these data come with scikit-learn, which is not installed. "
            "Install it with `pip install hvd_train[demo]`, or set data.path to shards of your own."
        ) from None
    digits = load()
    return Arrays(digits.images.astype(np.uint8), digits.target.astype(np.int64), 1 / 16, name="digits")
