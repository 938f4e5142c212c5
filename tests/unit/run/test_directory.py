"""The folder of a run: how it is named, what is refused, and what a resume finds."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import CheckpointConfig, Config, DataConfig, RecordConfig, SyncConfig
from hvd_train.config_file import load_config
from hvd_train.data.format import FieldSpec, SampleSpec
from hvd_train.errors import ConfigError, RunDirectoryError
from hvd_train.record.reports import NullRecorder
from hvd_train.run.checkpoint import Checkpoints
from hvd_train.run.directory import RunDirectory, open_run, write_config
from hvd_train.run.holder import Holder
from hvd_train.run.layout import anchored, run_name, run_of, saved_config


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)


def opened(config: Config) -> RunDirectory:
    """What a job finds that starts with this configuration, and ends at once."""
    run, claim = open_run(config)
    claim.release()
    return run


def files(folder: Path) -> list[str]:
    """Names of all but the claims."""
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith(".claim-"))


def save(folder: Path, rounds: int) -> None:
    """A checkpoint in the run `folder`."""
    Checkpoints(
        folder=folder / "checkpoints",
        comm=SoloCommunicator(),
        config=CheckpointConfig(),
        model=nn.Linear(2, 1),
        parts={},
        shared=frozenset(),
        sample=SampleSpec(inputs="x", targets="x", fields={"x": FieldSpec(shape=(2,), dtype="float32")}),
        recorder=NullRecorder(),
    ).save(rounds, "every", best=rounds == 10)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run named `first` with checkpoints after 10 (the best) and 20 rounds."""
    folder = opened(Config(name="first", runs=str(tmp_path), seed=7)).folder
    save(folder, 10)
    save(folder, 20)
    return folder


@pytest.mark.parametrize(
    ("config", "environ", "name"),
    [
        (Config(name="mine"), {}, "mine"),
        (Config(name="mine"), {"SLURM_JOB_ID": "17"}, "mine"),
        (Config(), {"SLURM_JOB_ID": "17"}, "17"),
        (Config(), {"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}, "17_2"),
        (Config(), {"SLURM_ARRAY_JOB_ID": "17", "SLURM_JOB_ID": "19"}, "19"),
    ],
)
def test_names(config: Config, environ: dict[str, str], name: str) -> None:
    assert run_name(config, environ) == name


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("classification", "classification"),
        ("next-token", "next-token"),
        ("some/where/mine.py:Mine", "mine-Mine"),
        ("package.module:Mine", "package.module-Mine"),
        ("../my tasks/the täsk (2).py:Mine", "the-täsk--2--Mine"),
        (".hidden.py:Mine", "hidden-Mine"),
    ],
)
def test_a_run_without_a_name_is_named_after_its_task(task: str, name: str, tmp_path: Path) -> None:
    config = Config(task=task, runs=str(tmp_path))
    days = {time.strftime("%Y%m%d")}
    first, second = opened(config).folder.name, opened(config).folder.name
    days.add(time.strftime("%Y%m%d"))
    assert first != second
    for found in (first, second):
        match = re.fullmatch(rf"{re.escape(name)}-(\d{{8}})-[0-9a-f]{{4}}", found)
        assert match, found
        assert match[1] in days
    assert load_config(tmp_path / first / "config.toml").name == first


def test_a_new_run_has_its_whole_configuration_in_its_folder(tmp_path: Path) -> None:
    config = Config(name="r", runs=str(tmp_path / "deep" / "down"), sync=SyncConfig(period=3), seed=5)
    made = opened(config)
    assert (made.folder, made.checkpoint) == (tmp_path / "deep" / "down" / "r", None)
    assert files(made.folder) == ["config.toml"]
    assert load_config(made.folder / "config.toml") == config
    assert saved_config(made.folder) == config


def test_a_name_that_exists_is_refused_and_left_as_it_is(run: Path) -> None:
    before = (run / "config.toml").read_text()
    with pytest.raises(RunDirectoryError, match=r"first exists already; expected a new name.*--resume auto"):
        opened(Config(name="first", runs=str(run.parent), seed=8))
    assert (run / "config.toml").read_text() == before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunDirectoryError, match=r"file/r: cannot be created: Not a directory\. Choose another --runs"
    ):
        opened(Config(name="r", runs=str(tmp_path / "file")))


def test_resume_auto_goes_on_from_the_newest(run: Path) -> None:
    config = Config(name="first", runs=str(run.parent), resume="auto", seed=9)
    found = opened(config)
    assert (found.folder, found.checkpoint) == (run, run / "checkpoints" / "round-20")
    assert saved_config(run).seed == 7, "it may yet be refused"
    again, claim = open_run(config)
    write_config(config, again.folder, claim)
    claim.release()
    saved = load_config(run / "config.toml")
    assert (saved.seed, saved.resume, saved.name) == (9, "", "first"), "what is done from now on"


def test_resume_auto_starts_a_missing_run(tmp_path: Path) -> None:
    found = opened(Config(name="new", runs=str(tmp_path), resume="auto"))
    assert (found.folder, found.checkpoint) == (tmp_path / "new", None)
    again = opened(Config(name="new", runs=str(tmp_path), resume="auto"))
    assert (found.is_new, again.is_new) == (True, False)
    assert again == replace(found, is_new=False), "killed before its first checkpoint"
    (tmp_path / "new" / "checkpoints" / ".round-4.tmp").mkdir(parents=True)
    assert opened(Config(name="new", runs=str(tmp_path), resume="auto")) == again, "or in the middle of it"


def test_resume_auto_needs_a_name_that_recurs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(runs=str(tmp_path), resume="auto")
    with pytest.raises(ConfigError, match="expected --name NAME, or a Slurm job"):
        opened(config)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert opened(config).folder == tmp_path / "17"
    save(tmp_path / "17", 4)
    assert opened(config).checkpoint == tmp_path / "17" / "checkpoints" / "round-4", "the job was requeued"


@pytest.mark.parametrize(
    ("path", "rounds"), [("", 20), ("checkpoints/round-10", 10), ("checkpoints/round-20", 20)]
)
def test_resume_from_a_path(path: str, rounds: int, run: Path) -> None:
    where = run / path
    assert run_of(where) == run
    assert saved_config(where).seed == 7
    found = opened(Config(name="first", runs="elsewhere", resume=str(where)))
    assert (found.folder, found.checkpoint) == (run, run / "checkpoints" / f"round-{rounds}")


def test_resume_under_a_new_name_leaves_the_old_run_as_it_is(run: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    config = Config(name="second", runs=str(tmp_path / "others"), resume=str(run))
    found = opened(config)
    assert (found.folder, found.checkpoint) == (
        tmp_path / "others" / "second",
        run / "checkpoints" / "round-20",
    )
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    assert saved_config(found.folder).name == "second"
    with pytest.raises(RunDirectoryError, match="second exists already"):
        opened(config)


def test_resume_from_within_and_of_a_copy(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    config = saved_config(Path())
    assert config.name == "first"
    assert opened(Config(name="first", resume=".")).folder == run
    copy = run.with_name("copy")
    shutil.copytree(run, copy)
    assert saved_config(copy).name == "copy"
    assert opened(Config(name="copy", resume=str(copy))).checkpoint == copy / "checkpoints" / "round-20"


def test_a_folder_may_have_been_given_a_name_that_no_run_has(run: Path) -> None:
    copy = run.with_name("first (2), .bäckup")
    shutil.copytree(run, copy)
    config = saved_config(copy)
    assert (config.name, config.seed) == ("", 7)
    again = replace(config, resume=str(copy))
    found, claim = open_run(again)
    write_config(again, found.folder, claim)
    claim.release()
    assert (found.folder, found.checkpoint) == (copy, copy / "checkpoints" / "round-20")
    assert saved_config(copy) == config


def test_runs_that_cannot_be_resumed(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="neither a run's folder nor a checkpoint"):
        opened(Config(resume=str(tmp_path / "nowhere")))
    with pytest.raises(RunDirectoryError, match="nowhere is not a run"):
        saved_config(tmp_path / "nowhere")
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    with pytest.raises(RunDirectoryError, match="first has no checkpoint to go on from"):
        opened(Config(name="first", resume=str(run)))


def test_an_earlier_holder_cannot_publish_what_it_prepared(run: Path) -> None:
    """It was stopped between its last look at the claim and what it was about to do."""
    dead = dataclasses.replace(Holder.this_process({}), start=1)
    (run / ".claim-1.json").write_text(json.dumps(dataclasses.asdict(dead)))
    log = run / "events.jsonl"
    log.write_text("before\n")
    checkpoints = run / "checkpoints"
    names = (run / ".config.toml.1.tmp", checkpoints / ".round-30.tmp", checkpoints / ".latest.2.tmp")
    for path in names:
        path.mkdir() if path.name == ".round-30.tmp" else path.write_text("late")
    (checkpoints / ".round-30.tmp" / "manifest.json").write_text("{}")
    with open(log, "a") as late:
        opened(Config(name="first", runs=str(run.parent), resume="auto"))
        late.write("late\n")
    for path in names:
        with pytest.raises(FileNotFoundError):
            os.replace(path, path.with_name("late"))
    assert log.read_text() == "before\n"
    assert files(run) == ["checkpoints", "config.toml", "events.jsonl"]
    assert sorted(p.name for p in checkpoints.iterdir()) == [
        *("best", "index.json", "latest", "round-10", "round-20")
    ]


def test_a_folder_that_is_not_a_run_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(RunDirectoryError, match="neither a run's folder nor a checkpoint"):
        open_run(Config(resume=str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_of_two_new_runs_of_one_name_one_begins(tmp_path: Path) -> None:
    config = Config(name="r", runs=str(tmp_path))
    _, claim = open_run(config)
    with claim:
        with pytest.raises(RunDirectoryError, match="r exists already; expected a new name"):
            open_run(config)
        with pytest.raises(RunDirectoryError, match="r is in use by process"):
            open_run(replace(config, resume="auto"))
    assert opened(replace(config, resume="auto")).checkpoint is None


def test_a_runs_own_configuration_can_be_used_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tmp_path / "pröject [1]"
    start.mkdir()
    monkeypatch.chdir(start)
    (start / "a.h5").write_text("")
    paths = DataConfig(path="a.h5", validation="held out/*.h5")
    made = opened(Config(name="r", task="my tasks/mine.py:Mine", data=paths))
    assert made.folder == start / "runs" / "r"
    monkeypatch.chdir(tmp_path)
    saved = saved_config(made.folder)
    assert saved.runs == str(start / "runs")
    assert saved.task == f"{start}/my tasks/mine.py:Mine"
    assert saved.data.path == f"{start}/a.h5"
    assert saved.data.validation == f"{tmp_path}/pröject [[]1]/held out/*.h5", (
        "a pattern from its last part on"
    )
    sinks = RecordConfig(sinks=("mine/sink.py:make", "package.module:make"))
    assert anchored(Config(record=sinks)).record.sinks == (
        f"{tmp_path}/mine/sink.py:make",
        "package.module:make",
    )
    plain = Config(name="s", task="package.module:Mine", data=DataConfig(validation=0.1))
    assert anchored(plain) == replace(plain, runs=str(tmp_path / "runs"))
