"""Which schedule of the period a configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence

from hvd_train.algorithm.period.adacomm import AdaCommPeriod
from hvd_train.algorithm.period.auto import AutoPeriod
from hvd_train.algorithm.period.base import Period
from hvd_train.algorithm.period.drift import DriftPeriod
from hvd_train.algorithm.period.given import FixedPeriod, QsrPeriod, WarmupPeriod
from hvd_train.algorithm.period.replayed import ReplayedPeriods
from hvd_train.algorithm.period.timed import TimePeriod
from hvd_train.config import SyncConfig
from hvd_train.config.sync import LONGEST_PLAIN_PERIOD


def make_period(sync: SyncConfig, replayed: Sequence[tuple[int, int | tuple[int, ...]]] = ()) -> Period:
    """The schedule that `sync` names.

    Args:
        replayed: of `sync.replay_periods`: see `ReplayedPeriods`; empty for none.
    """
    k, most = sync.period, sync.longest_period
    if replayed:
        replaced = sync.schedule if sync.schedule != "fixed" else ""
        return ReplayedPeriods(sync.replay_periods, replayed, replaced)
    match sync.schedule:
        case "warmup":
            return WarmupPeriod(k, rounds=sync.warmup_rounds, gradients=True)
        case "qsr":
            return QsrPeriod(k, alpha=sync.qsr_alpha, most=most)
        case "adacomm":
            return AdaCommPeriod(k, steps=sync.adacomm_steps, most=most)
        case "drift":
            return DriftPeriod(k, bound=sync.drift_bound, most=most)
        case "auto":
            return AutoPeriod(k, share=sync.target_share, most=most)
        case "time":
            return TimePeriod(sync.seconds, LONGEST_PLAIN_PERIOD if sync.outer == "none" else None)
        case _:
            return FixedPeriod(k, averages=sync.mode == "average")
