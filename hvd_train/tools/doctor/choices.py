"""What the configuration chooses, where that can be judged without a run."""

from __future__ import annotations

from hvd_train.config import SyncConfig
from hvd_train.tools.doctor.check import Check


def averages(sync: SyncConfig) -> Check:
    """How often the ranks average. What that costs is known only in a run, which says so itself."""
    name = "averages"
    remark = sync.remark()
    if remark:
        return Check(name=name, status="warning", seen=remark)
    return Check(name=name, seen=_in_words(sync))


def _in_words(sync: SyncConfig) -> str:
    if sync.mode != "average":
        return {"none": "never", "gradients": "of gradients, in every local step"}[sync.mode]
    if sync.schedule == "time":
        return f"after {sync.seconds:g} s of local steps"
    every = "after every local step" if sync.period == 1 else f"every {sync.period} local steps"
    if sync.schedule != "fixed":
        return f"{every} at first, by the schedule {sync.schedule}"
    if sync.period == 1:
        return f"{every}; the run says after 20 rounds if they take most of its time"
    return every
