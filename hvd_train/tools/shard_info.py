"""`hvd_train shard info`: what shards hold, as tables or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from hvd_train.data import remarks
from hvd_train.data.check import unlike
from hvd_train.data.crash import in_child
from hvd_train.data.deal import Span
from hvd_train.data.format import ShardInfo, is_class_dtype
from hvd_train.data.hdf5.file import read_info
from hvd_train.data.labels import IGNORED, Labels, join, labels_of_header, labels_of_values
from hvd_train.data.locate import Found, in_groups
from hvd_train.data.places import Places
from hvd_train.data.survey import SURVEY_BYTES, Survey, Surveys, join_surveys, survey
from hvd_train.data.unpacked import unpacked_lines
from hvd_train.errors import DataError
from hvd_train.io.output import warn

_MOST_COUNTED = 20
"""Up to this many classes, the values of each are counted in the table."""

_ALL_BYTES, _LEAST_BYTES = 16 << 20, 64 << 10
"""Bytes of values that are read of each dataset: in all shards of a path, and at least in each."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """One shard."""

    part: str
    """Of the manifest; empty without one."""

    info: ShardInfo

    surveys: Surveys
    """What its values are; empty if it has no rows, or they cannot be read."""

    unreadable: str = ""
    """Why not."""


def describe(parts: Mapping[str, Sequence[Found]], layout: Places, *, whole: bool) -> list[Described]:
    """The shards of one path, by part.

    Args:
        layout: the places of inputs and of targets.
        whole: read every row, not some.

    Raises `DataError` for the first shard whose header cannot be read.
    """
    every = [(part, shard) for part, found in parts.items() for shard in in_groups(found, layout)]
    share = max(_LEAST_BYTES, min(SURVEY_BYTES, _ALL_BYTES // max(1, len(every))))
    return [_describe(part, shard, layout, None if whole else share) for part, shard in every]


def _describe(part: str, shard: Found, layout: Places, num_bytes: int | None) -> Described:
    info = in_child(shard.path, partial(read_info, shard.path, layout))
    if not info.num_samples:
        return Described(part=part, info=info, surveys={})
    span = Span(shard.path, 0, info.num_samples)
    fills = {layout.targets: IGNORED} if is_class_dtype(info.fields[layout.targets].dtype) else {}
    try:
        read = partial(survey, (span,), info.fields, fills=fills, num_bytes=num_bytes)
        return Described(part=part, info=info, surveys=in_child(shard.path, read))
    except DataError as error:
        return Described(part=part, info=info, surveys={}, unreadable=str(error))


def show(paths: Sequence[str], described: Sequence[Sequence[Described]], names: Sequence[str]) -> None:
    """Prints the shards of each path, then their values, then what looks wrong."""
    rows = [("shard", "part", "samples", *names, "layout", "classes", "scale", "checksums")]
    rows += [_header_row(shard) for shards in described for shard in shards]
    _print_table(rows)
    values = [
        _value_row(path, found, _counts(shards, found, names[-1]))
        for path, shards in zip(paths, described, strict=True)
        for found in _together(shards).values()
    ]
    if values:
        print()
        _print_table([_VALUE_COLUMNS, *values])
    infos = [shard.info for shards in described for shard in shards]
    lines = unpacked_lines(infos, len(infos) * len(names))
    lines += [line for shards in described for line in remarks_on(shards, names)]
    if lines:
        print()
    for line in lines:
        print(line)


def show_json(described: Sequence[Sequence[Described]], names: Sequence[str]) -> None:
    """Prints a list of the shards of all paths, each with a summary of its own values; what looks wrong goes
    to standard error."""
    print(json.dumps([_entry(shard, names[-1]) for shards in described for shard in shards], indent=2))
    for shards in described:
        for line in remarks_on(shards, names):
            warn(line)


def _entry(shard: Described, targets: str) -> dict[str, object]:
    values: dict[str, object] = {name: found.values.figures() for name, found in shard.surveys.items()}
    counts = shard.surveys[targets].values.counts if shard.surveys else None
    if counts is not None:
        values[targets] = {**shard.surveys[targets].values.figures(), "counts": dict(sorted(counts.items()))}
    fields = {name: field.to_json() for name, field in shard.info.fields.items()}
    return {"part": shard.part, **asdict(shard.info), "fields": fields, "values": values}


def remarks_on(shards: Sequence[Described], names: Sequence[str]) -> list[str]:
    """What looks wrong in the shards of one path, one sentence each."""
    with_rows = [shard for shard in shards if shard.surveys]
    lines = [shard.unreadable for shard in shards if shard.unreadable]
    for shard in with_rows:
        lines += unlike(shard.info, with_rows[0].info)
    alike = [shard for shard in with_rows if shard.info.fields == with_rows[0].info.fields]
    if not alike:
        return lines
    inputs, targets = names[0], names[-1]
    info, surveys = alike[0].info, _together(alike)
    fields = info.fields
    tokens = is_class_dtype(fields[inputs].dtype) and len(fields[inputs].shape) == 1
    tokens = (
        tokens and is_class_dtype(fields[targets].dtype) and fields[inputs].shape == fields[targets].shape
    )
    integers: remarks.Integers = "tokens" if tokens else "unscaled" if info.scale is None else "scaled"
    lines += remarks.of_inputs(surveys[inputs], integers)
    lines += _on_targets(alike, surveys[targets], tokens)
    return list(dict.fromkeys(lines))


def _on_targets(shards: Sequence[Described], found: Survey, tokens: bool) -> Iterator[str]:
    recorded = [labels_of_header(shard.info, found.name) for shard in shards]
    labels = Labels()
    if is_class_dtype(found.field.dtype):
        labels = join(
            labels_of_values(shard.surveys[found.name].values, found.name, shard.info.path)
            if header is None
            else header
            for shard, header in zip(shards, recorded, strict=True)
        )
    refusal = remarks.refusal(labels, found.values, found.field, found.name, found.file)
    complete = found.complete or None not in recorded
    kind: remarks.Targets = "unknown"
    if tokens or (labels.count and complete and not refusal):
        kind = "tokens" if tokens else "classes"
    yield from remarks.of_targets(found, kind, labels)
    if refusal and not tokens:
        yield f"for the task `classification`: {refusal}"


def _together(shards: Sequence[Described]) -> dict[str, Survey]:
    surveys = [shard.surveys for shard in shards if shard.surveys]
    return join_surveys(surveys) if surveys else {}


def _header_row(shard: Described) -> tuple[str, ...]:
    info = shard.info
    fields = [str(field) for field in info.fields.values()]
    scale = "-" if info.scale is None else f"{info.scale:.4g}"
    checked = "-" if info.checksum_rows is None else f"per {info.checksum_rows} rows"
    head = (info.path, shard.part or "-", str(info.num_samples))
    return (*head, *fields, _layout(info), _classes(info.class_counts), scale, checked)


_VALUE_COLUMNS = (
    "values of",
    "dataset",
    "rows read",
    "range",
    "mean",
    "deviation",
    "NaN",
    "inf",
    "constant",
    "classes",
)


def _value_row(path: str, found: Survey, classes: str) -> tuple[str, ...]:
    values = found.values
    rows = f"{values.rows:,}" if found.complete else f"{values.rows:,} of {found.num_rows:,}"
    span = "-" if values.lowest is None else f"{values.lowest:.6g} to {values.highest:.6g}"
    if isinstance(values.lowest, int):
        span = f"{values.lowest} to {values.highest}"
    constant = "-" if values.constant is None else f"{len(values.constant):,} of {values.components:,}"
    return (
        path,
        found.name,
        rows,
        span,
        _number(values.mean),
        _number(values.deviation),
        f"{values.nan:,}",
        f"{values.plus_inf + values.minus_inf:,}",
        constant,
        classes,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _counts(shards: Sequence[Described], found: Survey, targets: str) -> str:
    """How many values of each class there are: by the headers if they all record it, else of the rows that
    were read."""
    if found.name != targets or not is_class_dtype(found.field.dtype):
        return "-"
    counts = found.values.counts
    headers = [shard.info.class_counts for shard in shards if shard.surveys]
    if None not in headers:
        counts = {}
        for header in headers:
            for label, count in enumerate(header or ()):
                counts[label] = counts.get(label, 0) + count
        counts = {label: count for label, count in counts.items() if count}
    if counts is None:
        return "many"
    if len(counts) > _MOST_COUNTED:
        return f"{len(counts):,} of {min(counts)} to {max(counts)}"
    if found.complete and found.values.filled:
        counts = {**counts, IGNORED: found.values.filled}
    return ", ".join(f"{label}: {count:,}" for label, count in sorted(counts.items())) or "-"


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _layout(shard: ShardInfo) -> str:
    if shard.contiguous:
        return "contiguous"
    chunks = "in one piece" if shard.chunk_rows is None else f"chunks of {shard.chunk_rows} rows"
    return f"compressed, {chunks}" if shard.compressed else chunks


def _classes(counts: Sequence[int] | None) -> str:
    """The classes that occur, as ranges: `0-4, 7`."""
    if counts is None:
        return "-"
    present = [label for label, count in enumerate(counts) if count]
    starts = [label for label in present if label - 1 not in present]
    stops = [label for label in present if label + 1 not in present]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, stops, strict=True))
