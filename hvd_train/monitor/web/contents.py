"""What each page shows of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvd_train.config_file import flat_values
from hvd_train.errors import RunDirectoryError
from hvd_train.monitor import views
from hvd_train.monitor.charts.figure import Chart, Over
from hvd_train.monitor.charts.layers import layer_charts
from hvd_train.monitor.charts.ranks import rank_charts
from hvd_train.monitor.charts.run import run_charts
from hvd_train.monitor.history import History
from hvd_train.monitor.state import State
from hvd_train.monitor.web.site import MOST_COMPARED, Site

WHICH = ("curves", "ranks", "layers", "events", "configuration")
"""The pages of a run."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page shows, for its template."""

    version: str
    """Changes with the charts."""
    parts: dict[str, Any]
    """What is shown besides the charts."""
    charts: Sequence[Chart] = ()


def run_page(site: Site, name: str, which: str, over: Over) -> Page:
    """One page of a run. Raises `RunDirectoryError` if there is none of this name."""
    with site.reading(name) as run:
        history = run.history
        charts: list[Chart] = []
        if which == "curves" and history.start is not None:
            charts = run_charts([(name, history)], over)
        elif which == "ranks":
            charts = rank_charts(history)
        elif which == "layers":
            charts = layer_charts(history)
        parts = {
            "runs": [run_parts(name, history, run.state, run.problems)],
            "events": views.events(history) if which == "events" else [],
            "configuration": views.configuration(run.folder) if which == "configuration" else "",
            "versions": views.versions(history.start),
            "table": None,
            "problems": [],
            "differences": None,
            "nothing": _NOTHING.get(which, "") if not charts else "",
        }
        return Page(version=run.version, parts=parts, charts=charts)


_NOTHING = {
    "curves": "There is no round in the log yet.",
    "ranks": "The log has no figures of the ranks: they come a few seconds after the start, unless "
    "`record.observe` is false.",
    "layers": "The log has no figures of the layers: they come a few seconds after the start, unless "
    "`record.observe` is false or the ranks are never averaged.",
}


def compare_page(site: Site, names: Sequence[str], over: Over) -> Page:
    """Several runs side by side."""
    names = list(dict.fromkeys(names))
    problems = []
    if len(names) > MOST_COMPARED:
        problems.append(f"{len(names)} runs were chosen; the first {MOST_COMPARED} are shown.")
    if not names:
        problems.append("No run was chosen: choose up to eight in the list of the runs.")
    runs = []
    with ExitStack() as stack:
        for name in sorted(
            names[:MOST_COMPARED]
        ):  # in one order, so that two threads never wait for each other
            try:
                runs.append(stack.enter_context(site.reading(name)))
            except RunDirectoryError as error:
                problems.append(str(error))
        parts = {
            "runs": [run_parts(run.name, run.history, run.state, run.problems) for run in runs],
            "table": facts_of_all([(run.name, run.history, run.state) for run in runs]),
            "problems": problems,
            "events": [],
            "configuration": "",
            "versions": "",
            "differences": differences([run.folder for run in runs]),
            "nothing": "",
        }
        begun = [(run.name, run.history) for run in runs if run.history.start is not None]
        version = " ".join(run.version for run in runs)
        return Page(version=version, parts=parts, charts=run_charts(begun, over) if begun else [])


def facts_of_all(runs: Sequence[tuple[str, History, State]]) -> dict[str, Any] | None:
    """The figures of several runs as a table; None for a single one."""
    if len(runs) < 2:
        return None
    facts = [dict(views.facts(history, state)) for _, history, state in runs]
    names = dict.fromkeys(name for of_run in facts for name in of_run)
    rows = [(name, *(of_run.get(name, "-") for of_run in facts)) for name in names]
    return {"head": ["figure", *(name for name, _, _ in runs)], "rows": rows}


def run_parts(name: str, history: History, state: State, problems: Sequence[str]) -> dict[str, Any]:
    """What is said of a run above its charts."""
    return {
        "name": name,
        "state": state.name,
        "kind": views.KINDS.get(state.name, ""),
        "detail": views.detail(history, state),
        "facts": views.facts(history, state),
        "findings": views.findings(history),
        "problems": problems,
    }


def differences(folders: Sequence[Path]) -> dict[str, Any] | None:
    """What differs between the configurations of runs, as a table; None for a single run."""
    if len(folders) < 2:
        return None
    found: list[dict[str, object]] = []
    for folder in folders:
        try:
            found.append(flat_values(views.configuration(folder)))
        except ValueError:
            found.append({})
    return {"head": ["key", *(folder.name for folder in folders)], "rows": views.differences(found)}
