"""What the dashboard costs: a page of a long run, an update of it, and a list of many runs.

For each number of rounds and ranks it writes a log by the event log itself, serves it, and looks at it in a
headless Chromium:

    first      s      of a dashboard and a browser that have just started, from the start of the navigation
    until
                      the first chart is drawn and the page answers: median, smallest and largest of five
    all        s      until all are
    memory     MB     resident memory of the server afterwards
    update     ms     CPU time of the server for a request that finds one new round and sends all charts again
    drawing    ms     of the page's main thread, to draw the charts that it was sent
    delay      s      from the write of an evaluation until it is drawn in the open page
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser

from tests.dashboards import chromium, dashboard, visit
from tests.unit.monitor.logs import Log

SIZES = ((2_000, 4), (20_000, 4), (2_000, 64), (20_000, 64), (20_000, 1024))
RUNS = 500
_STARTS = 5
_UPDATES = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        rows = [measure(Path(folder), browser, rounds, ranks) for rounds, ranks in SIZES]
        conditions = {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "load_before": load}
        conditions |= {"chromium": browser.version, "plotly": importlib.metadata.version("plotly")}
        found = {
            "conditions": conditions,
            "pages": rows,
            "list": measure_list(Path(folder) / "many", browser),
        }
    print(json.dumps(found, indent=2))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


def write(folder: Path, rounds: int, ranks: int) -> Log:
    """A log of so many rounds, one second each, with an evaluation every tenth."""
    log = Log(folder, ranks, [f"node{i}" for i in range(max(1, ranks // 16))])
    log.begin()
    for first in range(1, rounds + 1, 10):
        log.rounds(first, first + 9, slow={ranks // 3: 2.5}, loss=2 / first + 0.1, drift=1 / first)
        log.evaluate(first + 9, 0.9 / first + 0.01, 0.9 / first + 0.01, first + 9)
        if first % 100 == 1:
            log.observe(first + 9)
    return log


def measure(folder: Path, browser: Browser, rounds: int, ranks: int) -> dict[str, Any]:
    """One row: a run in a folder of its own."""
    runs = folder / f"{rounds}x{ranks}"
    log = write(runs / "r", rounds, ranks)
    log.now = time.time()
    first_s, all_s = [], []
    for _ in range(_STARTS):
        with dashboard(runs) as (_server, base):
            page = visit(browser, base).open("run/r/curves")
            for mark, times in (("begun", first_s), ("drawn", all_s)):
                times.append(float(page.evaluate(f"document.documentElement.dataset.{mark}")) / 1000)
            page.context.close()
    with dashboard(runs) as (server, base):
        seen = visit(browser, base)
        page = seen.open("run/r/curves")
        rss = int(Path(f"/proc/{server.pid}/status").read_text().split("VmRSS:")[1].split()[0]) / 1000
        drawing = page.evaluate(
            "(async () => { const t = performance.now(); await draw(shown); return performance.now() - t })()"
        )
        delays = []
        for number in range(rounds + 1, rounds + 11):
            points = seen.points("error")
            log.rounds(number, number)
            log.evaluate(number, 0.5, 0.01, rounds)
            began = time.perf_counter()
            seen.wait(f"document.getElementById('chart-error')._fullData[0]._length !== {points}")
            delays.append(time.perf_counter() - began)
        page.close()
        updates = []
        for number in range(rounds + 11, rounds + 11 + _UPDATES):
            log.rounds(number, number)
            before = cpu_s(server.pid)
            for which in ("curves", "ranks"):
                urllib.request.urlopen(f"{base}data/run/r/{which}").read()
            updates.append((cpu_s(server.pid) - before) / 2)
    return {
        "rounds": rounds,
        "ranks": ranks,
        "log_mb": round((runs / "r" / "events.jsonl").stat().st_size / 1e6, 1),
        "first_s": spread(first_s),
        "all_s": spread(all_s),
        "memory_mb": round(rss),
        "update_ms": round(1000 * statistics.mean(updates), 1),
        "drawing_ms": round(drawing),
        "delay_s": spread(delays),
    }


def spread(values: list[float]) -> dict[str, float]:
    named = {"median": statistics.median(values), "smallest": min(values), "largest": max(values)}
    return {name: round(value, 2) for name, value in named.items()}


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_list(runs: Path, browser: Browser) -> dict[str, Any]:
    """The list of many runs, of which one is being written."""
    for i in range(RUNS):
        log = write(runs / f"run-{i:03}", 200, 16)
        log.stop(200)
    with dashboard(runs) as (server, base):
        seen = visit(browser, base)
        began = time.perf_counter()
        page = seen.open("", drawn=False)
        page.locator("#runs tbody tr").nth(RUNS - 1).wait_for()
        first_s = time.perf_counter() - began
        before = cpu_s(server.pid)
        for _ in range(_UPDATES):
            urllib.request.urlopen(f"{base}data/runs").read()
        again_s = (cpu_s(server.pid) - before) / _UPDATES
        page.close()
    return {"runs": RUNS, "first_s": round(first_s, 2), "again_ms_of_cpu": round(1000 * again_s)}


if __name__ == "__main__":
    main()
