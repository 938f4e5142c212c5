"""The dashboard of a real job in a real browser: what it shows while the job runs, stops, and is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from tests.dashboards import Visit, chromium, dashboard, visit
from tests.deadlines import seconds
from tests.launching import Process, command, ranks_of, run, send, start, wait_for
from tests.mpi.jobs import events
from tests.mpi.test_resume import DIGITS, TASKS, wait_for_rounds

LONG = (*DIGITS, "--task", f"{TASKS}:Straggling", "--patience", "1000", "--max-rounds", "4000")
PAGES = ("curves", "ranks", "layers", "events", "configuration")

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


def job(runs: Path, name: str, *options: str) -> list[str]:
    given = ["--runs", str(runs), "--name", name, "--evaluate.every-rounds", "2"]
    return command("mpirun", 4, ["-m", "hvd_train", *given, *LONG, *options])


def has_begun(folder: Path, process: Process) -> None:
    wait_for_rounds(folder, 6, process)
    wait_for(lambda: all(events(folder, kind) for kind in ("machine", "layers", "evaluation")), 60, process)


def assert_accessible(seen: Visit) -> None:
    """Nothing serious by axe-core, whose name is in the message."""
    found = Axe().run(seen.page).response["violations"]
    serious = [
        f"{one['id']}: {[node['target'] for node in one['nodes']]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert not serious, seen.page.url


def test_a_job_that_runs_and_is_killed(tmp_path: Path, browser: Browser) -> None:
    with start(job(tmp_path, "r")) as process, dashboard(tmp_path) as (server, base):
        has_begun(tmp_path / "r", process)
        seen = visit(browser, base)
        page = seen.open("", drawn=False)
        row = page.locator("#runs tbody tr", has_text="running")
        assert row.locator("a").inner_text() == "r"
        row.locator("a").click()
        page.wait_for_selector("html[data-drawn]", state="attached")

        points, (patience,) = seen.points("error"), seen.texts("error", "annotation-text")
        assert patience.startswith("patience: ")
        assert patience.endswith(" of 1000 evaluations left")
        seen.wait(f"document.getElementById('chart-error').calcdata[0].length > {points + 1}")
        seen.wait(f"document.querySelector('#chart-error .annotation-text').textContent !== '{patience}'")
        assert "rounds to the limit" in page.locator(".facts").inner_text()

        seen.open("run/r/ranks")
        assert sorted(seen.texts("lanes", "ytick")) == ["0", "1", "2 ◀ slow", "3"]
        assert set(seen.texts("lanes", "legendtext")) == {"data", "compute", "wait", "communication"}
        assert page.evaluate("document.getElementById('chart-busy')._fullData[0].z.length") == 4
        assert page.locator(".notes").inner_text().startswith("rank 2 on ")
        assert seen.texts("memory", "legendtext") == [f"rank {rank}" for rank in range(4)]

        seen.open("run/r/layers")
        layers = events(tmp_path / "r", "header")[0]["layers"]
        assert seen.texts("steps", "legendtext") == layers
        assert page.evaluate("document.getElementById('chart-steps')._fullLayout.shapes[0].y0") == -4

        seen.open("run/r/curves")
        send(ranks_of(process), signal.SIGKILL)
        process.communicate(timeout=seconds(60))
        page.locator(".state", has_text="crashed").wait_for()
        assert page.locator(".summary").inner_text().endswith("was killed")
        assert seen.elsewhere() == seen.errors == []
        server.kill()
        page.locator("#live", has_text="the dashboard does not answer").wait_for()


def test_a_job_that_is_stopped_and_its_comparison(tmp_path: Path, browser: Browser) -> None:
    with dashboard(tmp_path) as (_, base):
        seen = visit(browser, base, color_scheme="dark")
        with start(job(tmp_path, "a")) as process:
            has_begun(tmp_path / "a", process)
            page = seen.open("run/a/curves")
            os.kill(ranks_of(process)[0], signal.SIGUSR1)
            page.locator(".state", has_text="interrupted").wait_for()
            assert page.locator(".summary").inner_text() == "interrupted, it was asked to stop"
            page.locator("#chart-error .annotation-text", has_text="stopped").wait_for()
            assert seen.texts("error", "annotation-text") == ["stopped: interrupted"]
            process.communicate(timeout=seconds(60))
        seen.open("run/a/events")
        assert page.locator("tbody tr").first.inner_text().split("\t")[2] == "stop (interrupted)"
        assert page.locator("tbody tr").last.inner_text().split("\t")[2] == "started"
        seen.open("run/a/configuration")
        assert "patience = 1000" in page.locator("pre").inner_text()
        by_keyboard(tmp_path, seen)
        for which in (*(f"run/a/{one}" for one in PAGES), "", "compare?run=a&run=b"):
            seen.open(which, drawn=which != "")
            for scheme in ("dark", "light"):
                page.emulate_media(color_scheme=scheme)
                assert_accessible(seen)
            page.set_viewport_size({"width": 390, "height": 800})
            seen.wait("document.documentElement.scrollWidth <= 390")  # once the charts have been drawn anew
            page.set_viewport_size({"width": 1280, "height": 800})
        assert seen.elsewhere() == seen.errors == []
    looks_at_reports(tmp_path, browser)
    looks_at_an_evaluation(tmp_path, browser)


def by_keyboard(runs: Path, seen: Visit) -> None:
    """Filters, sorts, chooses and compares without a mouse."""
    options = ["--runs", str(runs), "--name", "b", *DIGITS, "--seed", "5", "--max-rounds", "4"]
    assert run(command("mpirun", 2, ["-m", "hvd_train", *options]), deadline_s=60).returncode == 0
    page = seen.open("", drawn=False)
    names = page.locator("#runs tbody tr:visible a")
    page.locator("#filter").focus()
    page.keyboard.type("B")
    assert names.all_inner_texts() == ["b"]
    page.keyboard.press("Backspace")
    page.get_by_role("button", name="round", exact=True).focus()
    for expected, arrow in ((["b", "a"], "ascending"), (["a", "b"], "descending")):
        page.keyboard.press("Enter")
        assert names.all_inner_texts() == expected
        assert page.locator("th[aria-sort]", has_text="round").get_attribute("aria-sort") == arrow
    for name in ("a", "b"):
        page.get_by_role("checkbox", name=f"compare {name}").focus()
        page.keyboard.press("Space")
    renewed = page.evaluate("document.documentElement.dataset.renewed || '0'")
    seen.wait(f"document.documentElement.dataset.renewed > '{renewed}'")
    page.get_by_role("button", name="compare the chosen runs").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("html[data-drawn]", state="attached")
    assert seen.texts("error", "legendtext") == ["a", "b"]
    rows = dict(row.split("\t")[0::2] for row in page.locator("tbody tr").all_inner_texts())
    assert rows["seed"] == "5"
    assert rows["ranks"] == "2 on 1 host"
    page.get_by_role("link", name="seconds").press("Enter")
    page.wait_for_selector("html[data-drawn]", state="attached")
    seen.wait("document.querySelector('#chart-error .xtitle').textContent === 'seconds of training'")


def looks_at_reports(runs: Path, browser: Browser) -> None:
    """Reports open from disk and load nothing."""
    for names, chart in ((["a"], "lanes"), (["a", "b"], "loss")):
        out = runs / f"{'-'.join(names)}.html"
        given = ["-m", "hvd_train", "report", *(str(runs / name) for name in names), "--out", str(out)]
        made = run(command("python", 1, given), deadline_s=60)
        assert made.returncode == 0, made.output
        seen = visit(browser, f"file://{runs}/", offline=True)
        seen.open(out.name)
        assert seen.points("error") > 1
        assert seen.page.locator(f"#chart-{chart} .main-svg").count() > 0
        assert seen.requested == [f"file://{out}"]
        assert seen.errors == []
        assert_accessible(seen)


def looks_at_an_evaluation(runs: Path, browser: Browser) -> None:
    """Its page opens from disk, too."""
    out = runs / "evaluation.html"
    given = ["-m", "hvd_train", "evaluate", str(runs / "b"), "--checkpoint", "latest", "--page", str(out)]
    made = run(command("python", 1, given), deadline_s=60)
    assert made.returncode == 0, made.output
    seen = visit(browser, f"file://{runs}/", offline=True)
    page = seen.open(out.name)
    assert len(seen.texts("roc", "legendtext")) == 8, "the classes with the smallest areas"
    for chart in ("confusion", "calibration"):
        assert page.locator(f"#chart-{chart} .main-svg").count() > 0
    assert page.get_by_role("region", name="By class").locator("tbody tr").count() == 10
    assert page.get_by_role("region", name="Worst samples").locator("tbody tr").count() == 10
    assert (seen.requested, seen.errors) == ([f"file://{out}"], [])
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        assert_accessible(seen)
