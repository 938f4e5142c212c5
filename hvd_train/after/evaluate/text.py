"""An evaluation as text for a terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from hvd_train.io.text import listed
from hvd_train.record.evaluation import Evaluation
from hvd_train.record.wording import figure, number

_WIDTH = 160
_MOST_ROWS = 100
_MOST_COLUMNS = 20
"""Classes up to which the confusion matrix is printed."""


def text(evaluation: Evaluation) -> str:
    """Figures, a table by class or output, the confusion matrix of a few classes, the worst samples."""
    e = evaluation
    lines = [f"model     {e.run}, {e.checkpoint}", f"data      {e.data}: {e.num_samples:,} samples"]
    lines += [f"{name:<18} {number(value)}" for name, value in sorted(e.metrics.items())]
    parts = ["\n".join(lines)]
    for ending, heading in (("_by_class", "class"), ("_by_output", "output")):
        columns = {n.removesuffix(ending): v for n, v in e.values.items() if n.endswith(ending)}
        if columns:
            parts.append(_by_entry(heading, columns, e.class_names if heading == "class" else []))
    confusion = e.values.get("confusion")
    if confusion and len(confusion) <= _MOST_COLUMNS:
        names = e.class_names or [str(c) for c in range(len(confusion))]
        body = [[names[i], *(f"{n:,.0f}" for n in row)] for i, row in enumerate(confusion)]
        parts.append(f"confusion: rows are classes, columns predictions\n{_table(['', *names], body)}")
    if e.worst:
        parts.append(f"worst samples\n{_worst(e)}")
    notes = [f"note      {remark}" for remark in e.remarks]
    if e.undefined:
        notes.append(f"note      not defined: {listed(e.undefined)}")
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def _by_entry(heading: str, columns: dict[str, list[float]], entries: Sequence[str]) -> str:
    names, values = list(columns), list(columns.values())
    entries = entries or [str(i) for i in range(len(values[0]))]
    rows = zip(entries, zip(*values, strict=True), strict=True)
    body = [[entry, *(figure(value) for value in row)] for entry, row in rows]
    more = f"\n... and {len(body) - _MOST_ROWS:,} more" if len(body) > _MOST_ROWS else ""
    return _table([heading, *names], body[:_MOST_ROWS]) + more


def _worst(evaluation: Evaluation) -> str:
    predicted = list(evaluation.worst[0].predicted)
    body = [
        [
            number(sample.loss),
            sample.shard,
            str(sample.row),
            "" if sample.target is None else figure(sample.target),
            *(figure(sample.predicted[name]) for name in predicted),
        ]
        for sample in evaluation.worst
    ]
    return _table(["loss", "shard", "row", "target", *predicted], body)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    table = Table(box=None, pad_edge=False, header_style="")
    for name in head:
        table.add_column(name, justify="left" if name.endswith("shard") else "right", no_wrap=True)
    for row in body:
        table.add_row(*row)
    # Plain, whatever the terminal and its variables say: a launcher may read it.
    out = io.StringIO()
    width = max(_WIDTH, 12 * len(head))
    Console(file=out, width=width, force_terminal=False, color_system=None, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
