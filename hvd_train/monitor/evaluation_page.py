"""The page of an evaluation: one HTML file that needs nothing else."""

from __future__ import annotations

import time
from pathlib import Path

from hvd_train._version import __version__
from hvd_train.errors import RunDirectoryError
from hvd_train.io.atomic import replacing
from hvd_train.io.text import listed
from hvd_train.monitor.charts.evaluation import evaluation_charts
from hvd_train.monitor.web import pages
from hvd_train.record.evaluation import Evaluation, WorstSample
from hvd_train.record.wording import figure, number

_MOST_ROWS = 1000


def require() -> None:
    """Raises `EnvironmentMismatch` where what draws the page is missing."""
    pages.require()


def write(evaluation: Evaluation, out: Path) -> None:
    """Writes the page. Raises `RunDirectoryError` if it cannot be written."""
    content = page(evaluation).encode()
    try:
        with replacing(out) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise RunDirectoryError(f"{out} cannot be written: {error.strerror}. Give another --page.") from None


def page(evaluation: Evaluation) -> str:
    """The page, as HTML."""
    e = evaluation
    charts = evaluation_charts(e)
    notes = list(e.remarks)
    if e.undefined:
        notes.append(f"Not defined: {listed(e.undefined)}.")
    facts = [("checkpoint", e.checkpoint), ("round", str(e.round)), ("data", e.data)]
    return pages.render(
        "evaluation.html",
        title=f"Evaluation of {Path(e.run).name}",
        version=__version__,
        written=time.strftime("%Y-%m-%d %H:%M"),
        style=pages.safe(pages.text_of("style.css")),
        draw=pages.safe(pages.text_of("draw.js")),
        plotly=pages.safe(pages.plotly().read_text(encoding="utf-8")),
        facts=[*facts, ("samples", f"{e.num_samples:,}")],
        figures_of_all=[[name, number(value)] for name, value in sorted(e.metrics.items())],
        notes=notes,
        charts=charts,
        tables=[table for ending in ("class", "output") if (table := _by_entry(e, ending))],
        worst=_worst(e.worst),
        figures=pages.figures(charts),
    )


def _by_entry(e: Evaluation, of: str) -> dict[str, object] | None:
    ending = f"_by_{of}"
    columns = {n.removesuffix(ending): values for n, values in e.values.items() if n.endswith(ending)}
    if not columns:
        return None
    rows = [[str(i), *map(figure, row)] for i, row in enumerate(zip(*columns.values(), strict=True))]
    return {"caption": f"By {of}", "head": [of, *columns], "rows": rows[:_MOST_ROWS]}


def _worst(worst: list[WorstSample]) -> dict[str, object] | None:
    if not worst:
        return None
    predicted = list(worst[0].predicted)
    rows = [
        [
            number(sample.loss),
            sample.shard,
            str(sample.row),
            "" if sample.target is None else figure(sample.target),
            *(figure(sample.predicted[name]) for name in predicted),
        ]
        for sample in worst
    ]
    return {"caption": "Worst samples", "head": ["loss", "shard", "row", "target", *predicted], "rows": rows}
