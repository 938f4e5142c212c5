"""Train a PyTorch model on HDF5 shards, on many cores and hosts, without a master process.

The public names are loaded on first use: importing the package imports neither torch nor MPI, so
that the command line answers at once on a login node.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hvd_train._version import __version__

if TYPE_CHECKING:
    from hvd_train.after.trained import load_model
    from hvd_train.algorithm.averager import Averager
    from hvd_train.algorithm.batch_norm import update_batch_norm
    from hvd_train.algorithm.outer import Nesterov, OuterRule, SlowMo
    from hvd_train.algorithm.outliers import Outliers
    from hvd_train.algorithm.period.adacomm import AdaCommPeriod
    from hvd_train.algorithm.period.auto import AutoPeriod
    from hvd_train.algorithm.period.drift import DriftPeriod
    from hvd_train.algorithm.period.given import QsrPeriod, WarmupPeriod
    from hvd_train.algorithm.period.timed import TimePeriod
    from hvd_train.app import Result, train
    from hvd_train.comm.factory import connect
    from hvd_train.config import Config
    from hvd_train.config_file import load_config
    from hvd_train.data.format import SampleSpec
    from hvd_train.data.shard_writer import ShardWriter
    from hvd_train.tasks.base import Task
    from hvd_train.tasks.draws import Draws


# A literal list: it is what type checkers take for the names that users may import.
__all__ = [
    "AdaCommPeriod",
    "AutoPeriod",
    "Averager",
    "Config",
    "Draws",
    "DriftPeriod",
    "Nesterov",
    "OuterRule",
    "Outliers",
    "QsrPeriod",
    "Result",
    "SampleSpec",
    "ShardWriter",
    "SlowMo",
    "Task",
    "TimePeriod",
    "WarmupPeriod",
    "__version__",
    "connect",
    "load_config",
    "load_model",
    "train",
    "update_batch_norm",
]

_HOME = {
    "AdaCommPeriod": "hvd_train.algorithm.period.adacomm",
    "AutoPeriod": "hvd_train.algorithm.period.auto",
    "Averager": "hvd_train.algorithm.averager",
    "Config": "hvd_train.config",
    "Draws": "hvd_train.tasks.draws",
    "DriftPeriod": "hvd_train.algorithm.period.drift",
    "Nesterov": "hvd_train.algorithm.outer",
    "OuterRule": "hvd_train.algorithm.outer",
    "Outliers": "hvd_train.algorithm.outliers",
    "QsrPeriod": "hvd_train.algorithm.period.given",
    "Result": "hvd_train.app",
    "SampleSpec": "hvd_train.data.format",
    "ShardWriter": "hvd_train.data.shard_writer",
    "SlowMo": "hvd_train.algorithm.outer",
    "Task": "hvd_train.tasks.base",
    "TimePeriod": "hvd_train.algorithm.period.timed",
    "WarmupPeriod": "hvd_train.algorithm.period.given",
    "connect": "hvd_train.comm.factory",
    "load_config": "hvd_train.config_file",
    "load_model": "hvd_train.after.trained",
    "train": "hvd_train.app",
    "update_batch_norm": "hvd_train.algorithm.batch_norm",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
