"""What looks wrong in the values of a data set: one sentence each, with the file, the dataset and the remedy.

Pure functions of what is known of the values; nothing is read or printed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal

import numpy as np

from hvd_train.data.deal import Span
from hvd_train.data.format import Array, Coding, FieldSpec, ShardInfo, is_class_dtype
from hvd_train.data.grouping import usual_grouping
from hvd_train.data.labels import MAX_CLASSES, Labels, divisor, labels_of, misfit, objection
from hvd_train.data.survey import Survey
from hvd_train.data.values import Values, values_of
from hvd_train.io.text import listed, shown

_LARGE = 1e3
"""Inputs of a larger magnitude are named: the first steps of a training are then as much too large."""

_FAR = 100
"""Inputs whose mean is this many deviations from 0 are named."""

_FEW_ROWS = 16
"""Components may be equal by chance in fewer rows."""

_MANY_CLASSES = 1000
"""Up to this many classes, any number of values is enough."""

_LISTED = 12

Integers = Literal["scaled", "unscaled", "standardized", "tokens", "unknown"]
"""What a model does with integer inputs: multiplies them by a known scale, would do so but none is known,
standardizes them as it does all inputs, takes them as tokens, or something that only the task knows."""

Policy = Literal["error", "skip", "keep"]
"""What becomes of rows with values that are not finite."""

_OUTCOMES: dict[Policy, str] = {
    "keep": "the steps of a rank that draws others are lost. Replace them, or leave out their rows by "
    "data.not_finite = 'skip'",
    "skip": "their rows are left out",
    "error": "the run will end where it reads one. Replace them, or set data.not_finite = 'skip'",
}

Targets = Literal["classes", "tokens", "quantities", "unknown"]
"""What a task takes targets as."""


def of_inputs(
    survey: Survey, integers: Integers, *, floats: bool = True, policy: Policy = "keep"
) -> list[str]:
    """Of a dataset of inputs.

    Args:
        integers: what the model does with integers.
        floats: whether the model takes floating-point numbers as they are.
        policy: what becomes of values that are not finite.
    """
    kind = np.dtype(survey.field.dtype).kind
    lines = [not_finite(survey, policy)]
    if integers != "tokens" or kind == "f":
        lines.append(constant(survey))
    warning = unscaled(survey) if integers == "unscaled" else ""
    if not warning and (floats if kind == "f" else integers in ("scaled", "unscaled")):
        warning = far_from_one(survey)
    return [line for line in (*lines, warning) if line]


def not_finite(survey: Survey, policy: Policy = "keep") -> str:
    """Of values that are NaN or infinite, and what becomes of them; empty if there are none."""
    values = survey.values
    infinite = values.plus_inf + values.minus_inf
    parts = [f"{n:,} {what}" for n, what in ((values.nan, "NaN"), (infinite, "inf")) if n]
    if not parts:
        return ""
    share = (values.nan + infinite) / values.count
    return (
        f"{survey.not_finite_in}: `{survey.name}` holds {' and '.join(parts)} among {values.count:,} values"
        f"{_scope(survey)}, a share of {share:.2g}; expected finite numbers: {_OUTCOMES[policy]}; "
        "`hvd_train shard check` counts them in each file."
    )


def constant(survey: Survey) -> str:
    """Of components that are the same in every row; empty if there are none, or too few rows to say so. Of
    several axes, as images have them, only if all are: at their border such components are usual."""
    values, shape = survey.values, survey.field.shape
    if values.rows < 2 or (values.rows < _FEW_ROWS and not survey.complete) or not values.count:
        return ""
    every = values.constant is not None and len(values.constant) == values.components
    if every or (values.finite == values.count and values.lowest == values.highest):
        one = values.finite and values.lowest == values.highest
        what = f"the value {values.lowest}" if one else "the same values"
        return (
            f"{survey.file}: every row of `{survey.name}` has {what}{_scope(survey)}; nothing can be learned "
            "from it. Name another dataset, or write the values anew."
        )
    if values.constant and len(shape) == 1:
        where = listed([str(at) for at in values.constant], _LISTED)
        return (
            f"{survey.file}: {len(values.constant):,} of the {values.components:,} components of "
            f"`{survey.name}` are the same in every row{_scope(survey)} (positions: {where}). A model learns "
            "nothing from them: leave them out if this is not intended."
        )
    return ""


def unscaled(survey: Survey) -> str:
    """Of integer inputs that come with no scale; empty for zeros and ones."""
    values, dtype = survey.values, np.dtype(survey.field.dtype)
    if dtype.kind not in "iu" or values.magnitude <= 1:
        return ""
    most = int(values.magnitude)
    by = divisor(most, dtype.name)
    return (
        f"{survey.largest_in}: `{survey.name}` is {dtype} with values up to {most}{_scope(survey)}, and no "
        f"scale is known: the model takes them as they are. Give --data.scale {1 / by:.3g} (1/{by}) or auto "
        "to bring them to about 1, or --data.scale 1 if this is intended."
    )


def far_from_one(survey: Survey) -> str:
    """Of inputs that are very large, or far from 0 compared with their deviation; empty if they are not."""
    values = survey.values
    mean, deviation = values.mean, values.deviation
    if mean is None or not deviation:
        return ""
    large = np.dtype(survey.field.dtype).kind == "f" and values.magnitude > _LARGE
    if not large and abs(mean) <= _FAR * deviation:
        return ""
    return (
        f"{survey.largest_in}: `{survey.name}` has values from {values.lowest:.4g} to {values.highest:.4g}, "
        f"of mean {mean:.4g} and deviation {deviation:.2g}{_scope(survey)}; expected a mean near 0 and a "
        "deviation near 1, which no --data.scale gives. With a built-in model give --data.standardize "
        f"{usual_grouping(survey.field.shape)}; else subtract the mean and divide by the deviation before "
        "the values are written, or in the `transform` of your own task."
    )


def of_targets(
    survey: Survey,
    kind: Targets,
    labels: Labels,
    num_classes: int = 0,
    *,
    masked: bool = False,
    policy: Policy = "keep",
) -> list[str]:
    """Of a dataset of targets.

    Args:
        labels: what is known of the integers of the training rows; used of `classes` alone.
        num_classes: those of the model. Default: those of `labels`.
        masked: whether some of them may not count; these may be no numbers.
        policy: what becomes of values that are not finite.
    """
    lines = [] if masked else [not_finite(survey, policy)]
    if kind == "classes":
        coding = survey.field.coding
        if coding is not None and coding.names:
            missing = missing_names(labels, coding)
        else:
            missing = missing_classes(labels, num_classes)
        lines.append(one_class(labels) or many_classes(labels) or missing)
    elif kind != "tokens":
        lines.append(constant(survey))
    if kind == "quantities":
        lines.append(zeros_and_ones(survey))
    return [line for line in lines if line]


def one_class(labels: Labels) -> str:
    """Of class numbers that are all the same; empty if they are not."""
    low, high = labels.lowest, labels.highest
    if low is None or high is None or low.value != high.value or labels.count < 2:
        return ""
    return (
        f"{high.file}: every value of `{high.name}` is {high.value}; expected two classes or more. Name "
        "another dataset in data.targets, or add data of the other classes."
    )


def many_classes(labels: Labels) -> str:
    """Of many more classes than values; empty if they are few."""
    if labels.highest is None or labels.num_classes <= max(_MANY_CLASSES, labels.count):
        return ""
    return (
        f"{labels.highest}: {labels.num_classes:,} classes, each with an output of the model, for "
        f"{labels.count:,} values. Take task = 'regression' for a quantity, or write the classes anew: "
        f"{_without_gaps(labels.highest.name)}."
    )


def missing_classes(labels: Labels, num_classes: int = 0) -> str:
    """Of classes that no value has; empty if each has one, or it is not known."""
    low, high, different = labels.lowest, labels.highest, labels.different
    num_classes = max(num_classes, labels.num_classes)
    if low is None or high is None or low.value < 0 or different is None or len(different) == num_classes:
        return ""
    if low.value == 1 and len(different) == high.value:
        return (
            f"{low.file}: the classes of `{low.name}` are 1 to {high.value}; expected them from 0. The model "
            "has an output for class 0, which never occurs: subtract 1 before they are written."
        )
    missing = [str(label) for label in range(num_classes) if label not in different]
    return (
        f"{high.file}: of the classes 0 to {num_classes - 1}, `{high.name}` never holds "
        f"{listed(missing, _LISTED)}. The model has an output for each of them. Unless they are in data to "
        f"come, write the classes anew: {_without_gaps(high.name)}."
    )


def missing_names(labels: Labels, coding: Coding) -> str:
    """Of classes with names that no value has; empty if each has one, or it is not known."""
    high, different, names = labels.highest, labels.different, coding.names
    if high is None or different is None or len(different) == len(names):
        return ""
    missing = [f"`{shown(name)}`" for number, name in enumerate(names) if number not in different]
    remedy = "write the vectors without them" if coding.one_hot else "leave them out of data.classes"
    return (
        f"{high.file}: of the {len(names):,} classes, `{high.name}` never holds {listed(missing, _LISTED)}. "
        f"The model has an output for each of them. Unless they are in data to come, {remedy}."
    )


def _without_gaps(name: str) -> str:
    return f"numpy.unique({name}, return_inverse=True)[1] numbers them without gaps"


def zeros_and_ones(survey: Survey) -> str:
    """Of quantities that are probably classes; empty if they are not."""
    values, name = survey.values, survey.name
    if values.one_hot and values.rows:
        seen, remedy = "one-hot vectors", "data.one_hot = true"
    elif values.finite == values.count and values.whole and (values.lowest, values.highest) == (0, 1):
        seen, remedy = "0 and 1", "data.classes = ['0', '1']"
    else:
        return ""
    return (
        f"{survey.file}: `{name}` holds only {seen}{_scope(survey)}. If these are classes, set {remedy} and "
        "task = 'classification'."
    )


def refusal_of(targets: Array, name: str, path: str) -> str:
    """`refusal` of targets [rows, ...] in memory."""
    field = FieldSpec(shape=targets.shape[1:], dtype=targets.dtype.name)
    labels = labels_of(targets, name, path) if is_class_dtype(field.dtype) else Labels()
    return refusal(labels, values_of(targets), field, name, path)


def refusal(labels: Labels, values: Values, field: FieldSpec, name: str, path: str) -> str:
    """What a classification would report of targets that are probably classes; empty if nothing. For shards
    whose task is not known: other tasks take such targets as they are.

    Args:
        labels, values: what is known of them.
    """
    if is_class_dtype(field.dtype) and not values.one_hot:
        return objection(labels, name, path)
    looks_meant = values.one_hot if prod(field.shape) > 1 else _countable(values)
    text = misfit(name, field)
    return f"{path}: {text}" if looks_meant and text else ""


def _countable(values: Values) -> bool:
    """Whether all values are whole numbers from 0 on, few enough to be classes."""
    if values.lowest is None or values.highest is None or values.finite < values.count:
        return False
    return values.whole and values.lowest >= 0 and values.highest < min(MAX_CLASSES, values.rows)


def alone(parts: Sequence[Sequence[Span]], shards: Sequence[ShardInfo]) -> str:
    """Of classes that one rank alone has, by the class counts that the shards record; empty if no rank has
    such a class, one of the shards records none, or there are many classes.

    Args:
        parts: the training rows of each rank; one class a row.
        shards: the headers of the shards that they are in.
    """
    infos = {info.path: info for info in shards}
    held_out = {span.shard: infos[span.shard].num_samples for part in parts for span in part}
    if any(not 0 < len(infos[path].class_counts or ()) <= _MANY_CLASSES for path in held_out):
        return ""
    owner, shared = np.full(_MANY_CLASSES, -1), np.zeros(_MANY_CLASSES, bool)
    for rank, part in enumerate(parts):
        for span in part:
            held_out[span.shard] -= span.num_rows
            has = np.flatnonzero(infos[span.shard].class_counts or ())
            shared[has] |= (owner[has] >= 0) & (owner[has] != rank)
            owner[has] = rank
    # A class certainly has a row in training if there are more of it than rows that are held out.
    sure = np.zeros(_MANY_CLASSES, bool)
    for path, rows in held_out.items():
        sure[np.flatnonzero(np.array(infos[path].class_counts) > rows)] = True
    classes = np.flatnonzero((owner >= 0) & ~shared & sure).tolist()
    return _alone_line([(int(owner[label]), label) for label in classes]) if len(parts) > 1 else ""


def _alone_line(classes: Sequence[tuple[int, int]]) -> str:
    """Of pairs of a rank and a class."""
    if not classes:
        return ""
    by_rank: dict[int, list[str]] = {}
    for rank, label in sorted(classes)[:_LISTED]:
        by_rank.setdefault(rank, []).append(str(label))
    said = [
        f"rank {rank} alone has the class{'es' if len(names) > 1 else ''} {_and(names)}"
        for rank, names in by_rank.items()
    ]
    if len(classes) > _LISTED:
        said.append(f"{len(classes):,} such classes in all")
    return (
        f"{'; '.join(said)}. Between two averages the other ranks learn nothing of them: shuffle the rows "
        "before they are cut into shards, as `hvd_train shard write --shuffle` does, or lower sync.period."
    )


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _scope(survey: Survey) -> str:
    """Which rows a statement is of; empty if all."""
    if survey.complete:
        return ""
    return f" in {survey.values.rows:,} of {survey.num_rows:,} rows, which were read"
