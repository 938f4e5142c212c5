"""What the metrics of the built-in tasks are called. Loads no torchmetrics, which takes a second."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from hvd_train.errors import TaskError

GROUPS: Mapping[str, tuple[str, ...]] = {
    "classification": ("counts", "calibration", "confusion", "roc"),
    "regression": ("errors",),
    "next-token": ("perplexity",),
}
"""The groups of metrics of each task; one object computes a group."""

PROVIDED: Mapping[str, tuple[str, ...]] = {
    "counts": (
        "accuracy",
        *("precision", "recall", "f1"),
        *("precision_by_class", "recall_by_class", "f1_by_class", "support_by_class"),
    ),
    "calibration": ("calibration_error", "reliability"),
    "confusion": ("confusion",),
    "roc": ("roc_auc", "roc_auc_by_class", "roc_curves"),
    "errors": ("mse", "rmse", "r2", "mse_by_output", "rmse_by_output", "mae_by_output", "r2_by_output"),
    "perplexity": ("perplexity",),
}
"""What each group of metrics gives."""


def groups_for(task: str, wanted: Sequence[str], watched: str) -> tuple[str, ...]:
    """The groups that give the metrics that are `wanted` (`all`: every one) and the one that is `watched`, if
    it is one of theirs: `recall_by_class[3]` is an entry of one.

    Raises `TaskError` for a wanted name that the task does not have.
    """
    groups = GROUPS[task]
    known = [name for group in groups for name in PROVIDED[group]]
    for name in wanted:
        if name != "all" and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise TaskError(
                f"evaluate.metrics: the task {task} has no `{name}`; expected all, or some of "
                f"{', '.join(known)}.{hint}"
            )
    names = {*wanted, watched.partition("[")[0]}
    return tuple(group for group in groups if "all" in wanted or names & set(PROVIDED[group]))
