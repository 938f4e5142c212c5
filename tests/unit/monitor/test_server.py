"""The dashboard's answers: who gets one, what can be reached, and what is shown of runs of every kind."""

from __future__ import annotations

import html
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from hvd_train.monitor.web.server import application
from hvd_train.monitor.web.site import Site
from tests.unit.monitor.logs import START_S, Log, whole

TOKEN = "a-token"
BASE = f"/{TOKEN}"
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    whole(folder / "a")
    (folder / "a" / "config.toml").write_text('task = "classification"\n[optim]\nlr = 0.1\n')
    return folder


@pytest.fixture
def client(runs: Path) -> Iterator[TestClient]:
    with TestClient(application(Site(runs), TOKEN), base_url="http://127.0.0.1:8765") as client:
        yield client


def status(client: TestClient, path: str, **headers: str) -> int:
    return client.get(path, headers=headers).status_code


def page(client: TestClient, path: str) -> str:
    """A page, and what it asks for."""
    answer = client.get(BASE + path)
    assert answer.status_code == 200, answer.text
    (source,) = re.findall('data-source="([^"]*)"', answer.text)
    data = client.get(html.unescape(source)).json()
    return f"{answer.text}{data['parts']}{data.get('frames', '')}"


@pytest.mark.parametrize(
    "path", ["/", "/wrong/", "/a-token2/", "/a-toke/", "//", "/?token=a-token", "/run/a/curves"]
)
def test_nothing_is_shown_without_the_token(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 403
    assert answer.text == (
        "The token is missing or wrong: open the address that `hvd_train dashboard` has printed.\n"
    )


@pytest.mark.parametrize("path", ["/", "", "/run/a/curves", "/data/runs", "/style.css", "/plotly.js"])
def test_what_the_token_shows(client: TestClient, path: str) -> None:
    assert status(client, BASE + path) == 200


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1.example.org", "", "[", "10.0.0.1:8765"])
def test_another_name_is_refused(client: TestClient, host: str) -> None:
    assert status(client, BASE + "/", host=host) == 403


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost:1", "localhost", "[::1]:8765"])
def test_names_of_this_host(client: TestClient, host: str) -> None:
    assert status(client, BASE + "/", host=host) == 200


@pytest.mark.parametrize("origin", ["http://example.org", "null", "http://127.0.0.1:1", "http://[", ""])
def test_another_site_is_refused(client: TestClient, origin: str) -> None:
    assert status(client, BASE + "/", origin=origin) == 403


def test_this_site_is_not(client: TestClient) -> None:
    assert status(client, BASE + "/", origin="http://127.0.0.1:8765") == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_it_only_shows(client: TestClient, method: str) -> None:
    answer = client.request(method, BASE + "/")
    assert (answer.status_code, answer.text) == (403, "This dashboard only shows runs.\n")


def test_nothing_from_elsewhere_is_loaded_or_kept(client: TestClient) -> None:
    for path in ("/", "/run/a/curves", "/data/run/a/curves", "/run/none/curves", "/style.css"):
        headers = client.get(BASE + path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "name",
    ["none", "..", ".", "%2e%2e", "..%2f..", "%2fetc", "a%2f..%2fa", "a%00", "..%5c", "", "%ff", "x" * 5000],
)
def test_a_name_that_is_no_run(client: TestClient, name: str) -> None:
    answer = client.get(f"{BASE}/run/{name}/curves")
    assert answer.status_code == 404
    assert "there is no" in answer.text.lower()


@pytest.mark.parametrize("name", ["page/style.css", "%2e%2e/server.py", "frame.html", "setup.py"])
def test_a_file_that_is_no_page(client: TestClient, name: str) -> None:
    assert status(client, f"{BASE}/{name}") == 404


def test_runs_that_are_links_are_left_out(client: TestClient, runs: Path, tmp_path: Path) -> None:
    whole(tmp_path / "elsewhere")
    (runs / "link").symlink_to(tmp_path / "elsewhere")
    (runs / "up").symlink_to(tmp_path)
    assert ">link</a>" not in page(client, "/")
    assert status(client, f"{BASE}/run/link/curves") == 404
    assert status(client, f"{BASE}/run/up/curves") == 404


def test_a_log_that_is_a_link_or_a_pipe_is_not_read(client: TestClient, runs: Path, tmp_path: Path) -> None:
    log = whole(tmp_path / "elsewhere")
    (runs / "link").mkdir()
    (runs / "link" / "events.jsonl").symlink_to(log)
    (runs / "pipe").mkdir()
    os.mkfifo(runs / "pipe" / "events.jsonl")
    listed = page(client, "/")
    assert "its log cannot be read: it is a symbolic link, which is not followed" in listed
    assert "its log cannot be read: it is not a regular file" in listed
    assert "The event log cannot be read: it is a symbolic link" in page(client, "/run/link/curves")
    assert "The event log cannot be read: it is not a regular file" in page(client, "/run/pipe/ranks")


def test_a_configuration_that_is_a_link_is_not_read(client: TestClient, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret-value")
    (runs / "a" / "config.toml").unlink()
    (runs / "a" / "config.toml").symlink_to(tmp_path / "secret")
    shown = page(client, "/run/a/configuration")
    assert "secret-value" not in shown
    assert "symbolic link" in shown
    whole(runs / "b")
    (runs / "b" / "config.toml").write_text("[optim]\nlr = 0.1\n")
    (tmp_path / "secret").write_text('name = "secret-value"')
    assert "secret-value" not in page(client, "/compare?run=a&run=b")


def test_names_and_messages_are_text(client: TestClient, runs: Path) -> None:
    name = SCRIPT.replace("/", "|")
    log = Log(runs / name, hosts=(SCRIPT,))
    log.begin(model=SCRIPT, metric=SCRIPT, data=SCRIPT)
    log.rounds(1, 3, slow={0: 9.0})
    log.evaluate(3, 0.5, 0.5, 3)
    log.fault(3, SCRIPT)
    address = "%3Cscript%3Ealert(1)%3C%7Cscript%3E"
    (runs / name / "config.toml").write_text(SCRIPT)
    for path in (
        "/",
        *(f"/run/{address}/{which}" for which in ("curves", "ranks", "events", "configuration")),
    ):
        shown = page(client, path)
        assert "<script>alert" not in shown
        assert "alert(1)" in shown
    compared = page(client, f"/compare?run={address.replace('%', '%25')}&run=a")
    assert "<script>alert" not in compared
    assert "alert(1)" in compared


def test_a_name_that_is_not_utf8(client: TestClient, runs: Path) -> None:
    os.rename(runs / "a", os.fsencode(runs) + b"/\xff\xfe")
    assert "\\udcff\\udcfe" in page(client, "/")
    assert "finished" in page(client, "/run/%FF%FE/events")
    assert "finished" in page(client, "/compare?run=%25FF%25FE")


def test_the_list_is_the_newest_first_and_says_what_is_wrong(client: TestClient, runs: Path) -> None:
    log = Log(runs / "newer")
    log.now = START_S + 1e6
    log.begin()
    (runs / "empty").mkdir()
    (runs / "empty" / "events.jsonl").touch()
    (runs / "foreign").mkdir()
    (runs / "foreign" / "events.jsonl").write_bytes(b"\x00\xff\x1f\x8b" * 1000)
    (runs / "half").mkdir()
    (runs / "half" / "events.jsonl").write_bytes(b"one\ntwo")
    (runs / "folder").mkdir()
    (runs / "folder" / "events.jsonl").mkdir()
    (runs / "no-run").mkdir()
    shown = page(client, "/")
    order = [name for name in ("newer", "a", "empty", "foreign", "folder") if f">{name}</a>" in shown]
    assert order == ["newer", "a", "empty", "foreign", "folder"]
    assert shown.index(">newer<") < shown.index(">a<")
    assert "its log does not begin with a header" in shown
    assert "its log has no complete line" in shown
    assert "its log cannot be read: Is a directory" in shown
    assert "no-run" not in shown


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda lines: [], "There is no round in the log yet."),
        (lambda lines: [*lines[:5], lines[5][:20] + b"\n"], "cannot be read"),
        (lambda lines: [*lines[:5], b"\xff\xfe\n"], "cannot be read"),
        (lambda lines: [*lines[:5], lines[5][:-1]], "crashed"),
        (lambda lines: [*lines[:5], b"x" * (17 << 20) + b"\n", lines[5]], "is too long for an event"),
        (lambda lines: [re.sub(rb'"schema":\d+', b'"schema":9', line) for line in lines], "has schema 9"),
        (lambda lines: lines[1:], "an event before the first header"),
        (lambda lines: [lines[0], *lines], "finished"),
    ],
)
def test_a_damaged_log_is_shown_as_far_as_it_goes(
    client: TestClient, runs: Path, damage: object, said: str
) -> None:
    log = runs / "a" / "events.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    assert callable(damage)
    log.write_bytes(b"".join(damage(lines)))
    for which in ("curves", "ranks", "layers", "events", "configuration"):
        shown = page(client, f"/run/a/{which}")
        if which == "curves":
            assert said in shown


def test_a_folder_that_vanishes_and_comes_back(client: TestClient, runs: Path) -> None:
    before = client.get(f"{BASE}/data/run/a/curves").json()
    assert before["charts"]
    os.rename(runs / "a" / "events.jsonl", runs / "kept")
    gone = client.get(f"{BASE}/data/run/a/curves?version={before['version']}").json()
    assert "There is no event log any more." in gone["parts"]
    shutil.move(runs, runs.parent / "moved")
    answer = client.get(f"{BASE}/data/run/a/curves")
    assert (answer.status_code, list(answer.json())) == (404, ["problem"])
    assert "No such file or directory" in page(client, "/")
    shutil.move(runs.parent / "moved", runs)
    os.rename(runs / "kept", runs / "a" / "events.jsonl")
    assert "any more" not in page(client, "/run/a/curves")


def test_a_run_that_is_starting(client: TestClient, runs: Path) -> None:
    (runs / "new").mkdir()
    (runs / "new" / "config.toml").touch()
    shown = page(client, "/run/new/curves")
    assert "There is no event log yet." in shown
    assert "empty" in shown


def test_only_what_has_changed_is_sent(client: TestClient, runs: Path) -> None:
    log = Log(runs / "b")
    log.begin()
    log.rounds(1, 10)
    address = f"{BASE}/data/run/b/curves"
    first = client.get(address).json()
    assert [chart["name"] for chart in first["charts"]] == ["loss", "schedule", "speed", "shares"]
    again = client.get(f"{address}?version={first['version']}").json()
    assert (again["version"], again["parts"]) == (first["version"], first["parts"])
    assert "charts" not in again
    log.rounds(11, 11)
    log.evaluate(11, 0.5, 0.5, 11)
    later = client.get(f"{address}?version={first['version']}").json()
    assert later["version"] != first["version"]
    assert [chart["name"] for chart in later["charts"]][:2] == ["error", "loss"]
    assert 'id="chart-error"' in later["frames"]


def test_the_list_is_sent_when_it_has_changed(client: TestClient, runs: Path) -> None:
    (runs / "a" / "events.jsonl").write_bytes(b"")
    first = client.get(f"{BASE}/data/runs").json()
    assert client.get(f"{BASE}/data/runs?version={first['version']}").json() == {"version": first["version"]}
    whole(runs / "b")
    assert ">b</a>" in client.get(f"{BASE}/data/runs?version={first['version']}").json()["parts"]


def test_a_run_that_has_ended_is_listed_anew_when_it_is_resumed(client: TestClient, runs: Path) -> None:
    assert "finished" in page(client, "/")
    assert "finished" in page(client, "/")
    log = Log(runs / "a")
    log.begin(60)
    log.rounds(61, 70)
    shown = page(client, "/")
    assert "finished" not in shown
    assert ">70<" in shown


def test_a_comparison(client: TestClient, runs: Path) -> None:
    whole(runs / "b")
    (runs / "b" / "config.toml").write_text('task = "classification"\n[optim]\nlr = 0.25\n')
    shown = page(client, "/compare?run=a&run=b&run=none&over=seconds")
    assert "there is no run &#39;none&#39; in" in shown
    assert "<td>optim.lr</td><td>0.1</td><td>0.25</td>" in shown
    charts = client.get(f"{BASE}/data/compare?run=a&run=b&over=seconds").json()["charts"]
    assert [line["name"] for line in charts[0]["data"]] == ["a", "b"]
    assert charts[0]["layout"]["xaxis"]["title"]["text"] == "seconds of training"


def test_a_comparison_of_none_and_of_too_many(client: TestClient, runs: Path) -> None:
    assert "No run was chosen" in page(client, "/compare")
    for i in range(9):
        whole(runs / f"r{i}")
    shown = page(client, "/compare?" + "&".join(f"run=r{i}" for i in range(9)))
    assert "9 runs were chosen; the first 8 are shown." in shown


def test_many_runs_are_kept_in_bounded_memory(runs: Path) -> None:
    site = Site(runs)
    for i in range(25):
        whole(runs / f"r{i}")
        with site.reading(f"r{i}") as run:
            assert run.history.last is not None
    assert len(site._kept) == 20


def test_a_run_that_was_forgotten_meanwhile_has_another_version(runs: Path) -> None:
    site = Site(runs)
    versions = []
    for _ in range(2):
        for i in range(21):
            whole(runs / f"r{i}") if not (runs / f"r{i}").exists() else None
            with site.reading(f"r{i}") as run:
                versions.append(run.version)
    assert len(set(versions)) == 42


def test_a_name_with_a_line_break(client: TestClient, runs: Path) -> None:
    os.rename(runs / "a", runs / "a\nb")
    assert "finished" in page(client, "/run/a%0Ab/curves")
