"""`hvd_train report`: one self-contained HTML file of a run, or of several that are compared."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from hvd_train._version import __version__
from hvd_train.config_values import require_usable
from hvd_train.errors import ConfigError, RunDirectoryError
from hvd_train.io.atomic import replacing
from hvd_train.monitor import views
from hvd_train.monitor.charts.figure import Chart
from hvd_train.monitor.charts.layers import layer_charts
from hvd_train.monitor.charts.ranks import rank_charts
from hvd_train.monitor.charts.run import run_charts
from hvd_train.monitor.history import History
from hvd_train.monitor.state import state_by
from hvd_train.monitor.web import pages
from hvd_train.monitor.web.contents import Page, differences, facts_of_all, run_parts
from hvd_train.monitor.web.site import MOST_COMPARED
from hvd_train.run.layout import EVENTS_FILE, run_of


@dataclass(frozen=True, kw_only=True)
class Options:
    """Write a report of a run: one HTML file that opens from disk and needs no network. Of several runs it is
    their comparison."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN [RUN ...]")]
    """The runs' folders; at most 8."""

    out: str = "report.html"
    """The file to write. An existing one is replaced."""

    def __post_init__(self) -> None:
        require_usable(self, "--")
        if not 1 <= len(self.runs) <= MOST_COMPARED:
            raise ConfigError(f"{len(self.runs)} runs: expected 1 to {MOST_COMPARED}.")
        if not Path(self.out).name:
            raise ConfigError(f"--out {self.out!r}: expected the name of a file.")


def parse(args: Sequence[str]) -> Options:
    """Raises `ConfigError`; exits with code 2 for an option that does not exist."""
    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(Options, prog="hvd_train report", args=list(args), config=config)


def main(options: Options) -> int:
    """Writes the report; returns the exit code. Raises `RunDirectoryError` for a run without a log."""
    num_bytes = write([Path(run) for run in options.runs], Path(options.out))
    print(f"{options.out}: {num_bytes / 1e6:.1f} MB", flush=True)
    return 0


def write(paths: Sequence[Path], out: Path) -> int:
    """Writes the report of these runs; returns its bytes. Raises `RunDirectoryError` for a run without a log,
    and if the report cannot be written, and `EnvironmentMismatch` without what draws it."""
    content = report(paths).encode()
    try:
        with replacing(out) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise RunDirectoryError(f"{out} cannot be written: {error.strerror}. Give another --out.") from None
    return len(content)


def report(paths: Sequence[Path]) -> str:
    """The report of these runs, as HTML."""
    pages.require()
    folders = [run_of(path) for path in paths]
    histories = [_history(folder) for folder in folders]
    alone = len(folders) == 1
    named = [(folder.name, history) for folder, history in zip(folders, histories, strict=True)]
    sections: list[tuple[str, list[Chart]]] = [("Curves", run_charts(named))]
    if alone:
        sections += [("Ranks", rank_charts(histories[0])), ("Layers", layer_charts(histories[0]))]
    charts = [chart for _, of_section in sections for chart in of_section]
    return pages.render(
        "report.html",
        title=folders[0].name if alone else f"{len(folders)} runs",
        version=__version__,
        written=time.strftime("%Y-%m-%d %H:%M"),
        style=pages.safe(pages.text_of("style.css")),
        draw=pages.safe(pages.text_of("draw.js")),
        plotly=pages.safe(pages.plotly().read_text(encoding="utf-8")),
        page=Page(version="", parts=_parts(folders, histories)),
        sections=sections,
        figures=pages.figures(charts),
    )


def _parts(folders: Sequence[Path], histories: Sequence[History]) -> dict[str, object]:
    pairs = list(zip(folders, histories, strict=True))
    alone = len(pairs) == 1
    return {
        "runs": [run_parts(f.name, history, state_by(f, history), history.problems) for f, history in pairs],
        "table": facts_of_all([(f.name, history, state_by(f, history)) for f, history in pairs]),
        "problems": [],
        "events": views.events(histories[0]) if alone else [],
        "configuration": views.configuration(folders[0]) if alone else "",
        "versions": views.versions(histories[0].start),
        "differences": differences(folders),
        "nothing": "",
    }


def _history(folder: Path) -> History:
    log = folder / EVENTS_FILE
    history = History(log)
    try:
        history.update()
    except OSError as error:
        raise RunDirectoryError(
            f"{log}: {error.strerror}. Expected a run's folder with an event log."
        ) from None
    if history.start is None:
        raise RunDirectoryError(f"{log} has no header. Expected the log of a run that has begun.")
    return history
