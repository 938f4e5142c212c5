"""The report: one file that needs nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hvd_train.errors import ConfigError, EnvironmentMismatch, RunDirectoryError
from hvd_train.monitor import report
from tests.unit.monitor.logs import Log, whole


def write(out: Path, *runs: Path) -> str:
    options = report.parse([*(str(run) for run in runs), "--out", str(out)])
    assert report.main(options) == 0
    return out.read_text()


def charts(html: str) -> list[dict[str, object]]:
    found = json.loads(html.split('id="charts">')[1].split("</script>")[0])
    assert isinstance(found, list)
    return found


def without_scripts(html: str) -> str:
    return re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)


def test_a_report_has_all_of_a_run_and_loads_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole(tmp_path / "a")
    (tmp_path / "a" / "config.toml").write_text("[optim]\nlr = 0.125\n")
    html = write(tmp_path / "out.html", tmp_path / "a")
    names = {str(chart["name"]) for chart in charts(html)}
    assert {"error", "loss", "lanes", "busy", "memory", "steps", "gradients"} <= names
    text = without_scripts(html)
    assert not re.search(r'\b(src|href|action)="(?!#)', text)
    assert "url(" not in text
    assert html.index("chart-error") < html.index("chart-lanes") < html.index("stop (patience)")
    for said in ("finished", "lr = 0.125", "stop (patience)", "0.2500 in round 60", "first.bias"):
        assert said in html, said
    for chart in names:
        assert f'id="chart-{chart}"' in html
    assert re.fullmatch(r".*out\.html: \d\.\d MB\n", capsys.readouterr().out)


def test_a_report_of_20_000_rounds_is_below_6_mb(tmp_path: Path) -> None:
    log = Log(tmp_path / "a", ranks=64, hosts=[f"h{i}" for i in range(8)])
    log.begin()
    for first in range(1, 20_001, 500):
        log.rounds(first, first + 499)
        log.observe(first + 499)
        log.evaluate(first + 499, 1 / first, 1 / first, first + 499)
    assert len(write(tmp_path / "out.html", tmp_path / "a")) < 6e6


def test_a_report_of_several_runs_is_their_comparison(tmp_path: Path) -> None:
    for name, rate in (("a", 0.125), ("b", 0.5)):
        whole(tmp_path / name)
        (tmp_path / name / "config.toml").write_text(f"[optim]\nlr = {rate}\n")
    html = write(tmp_path / "out.html", tmp_path / "a", tmp_path / "b")
    assert "<td>optim.lr</td><td>0.125</td><td>0.5</td>" in html
    assert not any(chart["name"] == "lanes" for chart in charts(html))


def test_a_name_cannot_end_the_script(tmp_path: Path) -> None:
    whole(tmp_path / "<|script><script>alert(1)<!--")
    html = write(tmp_path / "out.html", tmp_path / "<|script><script>alert(1)<!--")
    assert "<script>alert" not in html
    assert len(charts(html)) > 5


def test_a_report_of_a_running_run(tmp_path: Path) -> None:
    log = Log(tmp_path / "a")
    log.begin()
    assert charts(write(tmp_path / "out.html", tmp_path / "a")) == []


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file"), (b"", "has no header"), (b"x\n", "has no")]
)
def test_a_folder_without_a_run(tmp_path: Path, content: bytes | None, said: str) -> None:
    (tmp_path / "a").mkdir()
    if content is not None:
        (tmp_path / "a" / "events.jsonl").write_bytes(content)
    with pytest.raises(RunDirectoryError, match=said):
        write(tmp_path / "out.html", tmp_path / "a")
    assert not (tmp_path / "out.html").exists()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    whole(tmp_path / "a")
    with pytest.raises(RunDirectoryError, match=r"none/out\.html cannot be written: No such file"):
        write(tmp_path / "none" / "out.html", tmp_path / "a")


def test_too_many_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="9 runs: expected 1 to 8"):
        report.parse([f"r{i}" for i in range(9)])


@pytest.mark.parametrize("out", ["", ".", "/"])
def test_a_file_without_a_name(out: str) -> None:
    with pytest.raises(ConfigError, match=r"--out .*: expected the name of a file"):
        report.parse(["r", "--out", out])


def test_without_what_draws_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole(tmp_path / "a")
    monkeypatch.setattr("hvd_train.monitor.web.pages.find_spec", lambda name: None)
    with pytest.raises(
        EnvironmentMismatch, match=r"plotly is not installed.*pip install 'hvd_train\[monitor\]'"
    ):
        write(tmp_path / "out.html", tmp_path / "a")
