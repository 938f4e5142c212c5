"""What the pages and the report say of a run in words."""

from __future__ import annotations

from pathlib import Path

from hvd_train.monitor import views
from hvd_train.monitor.history import History
from hvd_train.monitor.state import State, state_by
from tests.unit.monitor.logs import Log, history_of, whole


def read(folder: Path) -> History:
    return history_of(folder / "events.jsonl")


def test_the_figures_of_a_run_that_has_ended(tmp_path: Path) -> None:
    history = read(whole(tmp_path).parent)
    facts = dict(views.facts(history, state_by(tmp_path, history)))
    assert facts["error"] == "0.2500"
    assert facts["best"] == "0.2500 in round 60"
    assert facts["round"] == "60"
    assert facts["ranks"] == "4 on 2 hosts"
    assert facts["sent by all ranks"] == "0.1 MB"
    assert "stops at" not in facts


def test_a_run_that_goes_on_has_what_will_stop_it(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.begin(stop_rules={"max_rounds": 100})
    log.rounds(1, 10)
    facts = dict(views.facts(read(tmp_path), State(name="running")))
    assert facts["stops at"] == "90 rounds to the limit"


def test_a_run_that_has_not_begun_has_none(tmp_path: Path) -> None:
    assert views.facts(History(tmp_path / "events.jsonl"), State(name="starting")) == []


def test_why_a_run_stopped_is_said_in_words(tmp_path: Path) -> None:
    history = read(whole(tmp_path).parent)
    said = views.detail(history, state_by(tmp_path, history))
    assert said == ", the error has not improved for 15 evaluations"


def test_a_reason_of_a_later_version_is_said_as_it_is(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.begin(stop_rules={})
    log.stop(1, "comet")
    history = read(tmp_path)
    assert views.detail(history, state_by(tmp_path, history)) == ", comet"


def test_what_stands_out_is_found(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.begin()
    log.rounds(1, 10, slow={3: 4.0})
    log.observe(10, update=(0.1, 1e-9, 0.1))
    slow, layer = views.findings(read(tmp_path))
    assert slow.startswith("rank 3 on h2 is busy 4.0 times as long as the median, in local steps")
    assert layer.startswith("`first.bias` hardly learns")


def test_a_healthy_run_has_no_findings(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.begin()
    log.rounds(1, 10)
    log.observe(10)
    assert views.findings(read(tmp_path)) == []


def test_events_are_the_newest_first_with_what_a_later_version_records(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.begin()
    log.rounds(1, 5)
    log.checkpoint(5)
    log.fault(5, "rank 1 was <b>not</b> finite")
    log.period(5, "every round has 20 from round 6 on.")
    log.stop(5, "interrupted")
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"event": "outer_step", "schema": 2, "time_s": 1e10, "round": 6, "momentum": 0.9}\n')
    rows = views.events(read(tmp_path))
    assert [(row[0], row[2]) for row in rows] == [
        ("6", "outer_step"),
        ("5", "checkpoint (best)"),
        ("5", "fault (not_finite)"),
        ("5", "period"),
        ("5", "stop (interrupted)"),
        ("0", "started"),
    ]
    assert rows[0][3] == '{"momentum":0.9}'
    assert rows[3][3] == "every round has 20 from round 6 on."
    assert rows[1][3] == "round-5, 0.0 MB in 0.2 s"


def test_a_time_that_is_none_is_shown_as_a_number() -> None:
    assert views.clock(1e300) == "1e+300 s"


def test_a_configuration_that_is_a_link_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "config.toml").symlink_to(tmp_path / "secret")
    said = views.configuration(tmp_path)
    assert said == "# config.toml cannot be read: it is a symbolic link, which is not followed"


def test_a_configuration_in_any_bytes(tmp_path: Path) -> None:
    assert views.configuration(tmp_path) == ""
    (tmp_path / "config.toml").write_bytes(b'name = "\xff"')
    assert views.configuration(tmp_path) == 'name = "\ufffd"'


def test_keys_that_differ() -> None:
    found = views.differences([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1}])
    assert found == [("b", "2", "3", "-")]
