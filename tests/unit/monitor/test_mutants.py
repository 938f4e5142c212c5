"""Any page of any damaged log is a page, with figures that a browser can parse, and never a traceback."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_train.monitor import report
from hvd_train.monitor.web import pages
from hvd_train.monitor.web.contents import WHICH, Page, compare_page, run_page
from hvd_train.monitor.web.site import Site
from tests.unit.monitor.logs import whole
from tests.unit.monitor.test_history import SETTINGS

ODD: list[Any] = [
    *(None, True, 0, -1, 1, 2**53, 2**63, -(2**70), 10**400, 0.5, 1e-308, 1e39, 1e308, -1e308),
    *("", "\x00\x1b[31m\n", "\ud800", "</script><script>", "{patience.real}", "{0}", [], {}, [None], [[1]]),
    *([1e308] * 4, [10**30] * 4, [0] * 4, [-1] * 3, {"patience": -1}, {"max_seconds": 1e308}),
    *({"target_error": 2**70}, {"min": None, "median": 1, "max": 1}, {"data": {"median": 1e308}}),
]
"""Values that no log of this program has in its place."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something is in an event."""
    found = [path] if path else []
    if isinstance(value, dict):
        return found + [place for key, item in value.items() for place in places(item, (*path, key))]
    return (
        found + [p for i, item in enumerate(value[:4]) for p in places(item, (*path, i))]
        if isinstance(value, list)
        else found
    )


def mutate(data: st.DataObject, log: list[Any]) -> None:
    kind = data.draw(st.sampled_from(sorted({event["event"] for event in log})))
    at = data.draw(st.sampled_from([i for i, event in enumerate(log) if event["event"] == kind]))
    what = data.draw(
        st.sampled_from(("value", "value", "value", "leave out", "repeat", "move", "other world"))
    )
    if what == "value":
        *way, last = data.draw(st.sampled_from(places(log[at])))
        inner = log[at]
        for step in way:
            inner = inner[step]
        inner[last] = copy.deepcopy(data.draw(st.sampled_from(ODD)))
        if not isinstance(log[at]["event"], str):
            log[at]["event"] = "header"
    elif what == "leave out" and len(log) > 1:
        del log[at]
    elif what == "repeat":
        log.insert(data.draw(st.integers(0, len(log))), copy.deepcopy(log[at]))
    elif what == "move":
        log.insert(data.draw(st.integers(0, len(log) - 1)), log.pop(at))
    else:
        size = data.draw(st.sampled_from((1, 2, 7, 100)))
        start = {**log[0], "event": "header", "world_size": size, "hosts": ["x"], "host_of_rank": [0] * size}
        start["layers"] = data.draw(st.sampled_from(([], ["a"], ["a", "b", "c", "d"])))
        log.insert(data.draw(st.integers(0, len(log))), start)


def refuse(constant: str) -> None:
    raise AssertionError(f"JSON has no {constant}")


def is_shown(page: Page) -> None:
    pages.render("parts.html", page=page).encode()
    pages.render("charts.html", charts=page.charts).encode()
    json.loads(json.dumps(pages.plain(page.charts)), parse_constant=refuse)


@settings(SETTINGS, max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "40")))
@given(data=st.data())
def test_every_page_of_any_damaged_log_is_shown(data: st.DataObject, tmp_path: Path) -> None:
    source = tmp_path / "whole" / "events.jsonl"
    lines = (source if source.exists() else whole(source.parent)).read_text().splitlines()
    events = [json.loads(line) for line in lines]
    log = tmp_path / "runs" / "a" / "events.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    site = Site(tmp_path / "runs")
    for _ in range(data.draw(st.integers(1, 4))):
        mutate(data, events)
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
    for over in ("rounds", "samples", "seconds"):
        is_shown(run_page(site, "a", "curves", over))  # type: ignore[arg-type]
    for which in WHICH:
        is_shown(run_page(site, "a", which, "rounds"))
    is_shown(compare_page(site, ["a", "a"], "seconds"))
    assert site.runs()[0][0].name == "a"
    with site.reading("a") as run:
        begun = run.history.start is not None
    if begun:
        assert "</html>" in report.report([log.parent])
