"""The command line: help without torch, options and what they mean, files and flags, exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_train.cli import main, parse
from hvd_train.config import Config, DataConfig, GroupConfig, flatten
from hvd_train.config_file import embedded_config, to_toml
from hvd_train.errors import ConfigError, RunDirectoryError
from tests.deadlines import seconds
from tests.launching import ROOT, environment, tool
from tests.unit.data.shards import write_foreign

HEAVY = ("torch", "mpi4py", "h5py", "horovod")


def child(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", program, *args]
    env = environment({"PYTHONPATH": str(ROOT), "COLUMNS": "100"})
    return subprocess.run(argv, capture_output=True, text=True, timeout=seconds(60), env=env, check=False)


HELP = f"""
import sys
from hvd_train.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    code = end.code
loaded = [name for name in {HEAVY!r} if name in sys.modules]
print("exit", code, "loaded", loaded, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--help"], ["--period", "Local steps between two averages", "--resume RUN", "--config FILE.toml"]),
        (["train", "--help"], ["--target-error", "--max-seconds"]),
        (["launch", "--help"], ["--hosts", "--hostfile", "--fault-tolerance", "--dry-run", "75 interrupted"]),
        (["shard", "--help"], ["write", "info", "check"]),
        (["export", "--help"], ["--format", "--checkpoint", "--samples", "torch.export.load"]),
        (["doctor", "--help"], ["--parameters", "--json", "--timeout"]),
        (["predict", "--help"], ["RUN", "--data", "--out", "--part-rows", "best|latest|round-N"]),
        (["shard", "write", "--help"], ["--by-class", "--compression"]),
    ],
    ids=" ".join,
)
def test_help_loads_neither_torch_nor_mpi_nor_hdf5(args: list[str], said: list[str]) -> None:
    job = child(HELP, *args)
    assert job.stderr.strip() == "exit 0 loaded []"
    for words in said:
        assert words in job.stdout


def test_a_launch_loads_neither_torch_nor_mpi_nor_hdf5() -> None:
    program = f"""
import sys
from hvd_train.cli import main
main(sys.argv[1:])
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    tool("mpirun")
    job = child(program, "launch", "-np", "2", "--dry-run", "--", "--seed", "3")
    assert job.stderr.strip() == "[]"
    assert "-m hvd_train --seed 3 --name classification-" in job.stdout


def test_the_reader_of_the_help_may_close_the_pipe() -> None:
    argv = [sys.executable, "-m", "hvd_train", "--help"]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment({"PYTHONPATH": str(ROOT)})
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=seconds(60)) == 1


SHORT = [
    ("--data", "some/where", "data.path", "some/where"),
    ("--period", "3", "sync.period", 3),
    ("--patience", "7", "stop.patience", 7),
    ("--target-error", "0.125", "stop.target_error", 0.125),
    ("--max-epochs", "4", "stop.max_epochs", 4),
    ("--max-rounds", "5", "stop.max_rounds", 5),
    ("--max-seconds", "6.5", "stop.max_seconds", 6.5),
    ("--sync", "none", "sync.mode", "none"),
    ("--lr", "0.25", "optim.lr", 0.25),
    ("--batch-size", "17", "data.batch_size", 17),
    ("--name", "mine", "name", "mine"),
    ("--runs", "there", "runs", "there"),
    ("--task", "regression", "task", "regression"),
    ("--backend", "solo", "backend", "solo"),
    ("--seed", "9", "seed", 9),
]


@pytest.mark.parametrize(("option", "text", "key", "value"), SHORT, ids=[s[0] for s in SHORT])
def test_short_options_reach_their_field_and_no_other(
    option: str, text: str, key: str, value: object
) -> None:
    base = Config() if option in ("--data", "--task") else embedded_config()
    expected = {**flatten(base), key: value}
    assert flatten(parse([option, text])) == expected
    assert flatten(parse([f"{option}={text}"])) == expected


def test_every_field_has_its_long_option() -> None:
    args = ["--sync.period", "3", "--stop.max-rounds", "5", "--data.path", "x", "--optim.name", "Adam"]
    flat = flatten(parse(args))
    expected = {"sync.period": 3, "stop.max_rounds": 5, "data.path": "x", "optim.name": "Adam"}
    assert flat == {**flatten(Config()), **expected}
    assert parse(["--data", "x", "--model.hidden", "4", "5"]).model.hidden == (4, 5)
    assert parse(["--data", "x", "--data.validation", "0.25"]).data.validation == 0.25
    assert parse(["--data", "x", "--data.validation", "held-out"]).data.validation == "held-out"


def test_a_list_and_a_table_are_options_too(tmp_path: Path) -> None:
    weights = ["--model.init", "w", "--model.init-map", "a.", "b.", "", "c.", "--model.freeze", "a.*", "?"]
    model = parse(["--data", "x", *weights, "--model.no-init-strict"]).model
    assert (model.init, model.init_map, model.freeze) == ("w", {"a.": "b.", "": "c."}, ("a.*", "?"))
    assert not model.init_strict
    path = tmp_path / "run.toml"
    path.write_text("[[optim.groups]]\npattern = 'a.*'\n[[optim.groups]]\npattern = '*'\nweight_decay = 0\n")
    config = parse(["--config", str(path), "--optim.groups.0.lr-factor", "3", "--optim.decay", "matrices"])
    expected = (GroupConfig(pattern="a.*", lr_factor=3.0), GroupConfig(pattern="*", weight_decay=0.0))
    assert (config.optim.groups, config.optim.decay) == (expected, "matrices")


def test_without_options_it_is_the_embedded_default() -> None:
    assert parse([]) == embedded_config()
    assert parse(["--period", "3"]).data == embedded_config().data
    assert parse(["--data", "digits"]) == Config(data=DataConfig(path="digits"))
    assert parse(["--data=shards"]).data.batch_size == 64
    assert parse(["--task=regression"]).model == Config().model


def test_options_take_precedence_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('seed = 5\n[data]\npath = "x"\nbatch_size = 8\n[sync]\nperiod = 20\n', encoding="utf-8")
    for args in (["--config", str(file), "--period", "3"], ["--period=3", f"--config={file}"]):
        flat = flatten(parse(args))
        expected = {"seed": 5, "data.path": "x", "data.batch_size": 8, "sync.period": 3}
        assert flat == {**flatten(Config()), **expected}


def test_a_resumed_run_keeps_its_configuration(tmp_path: Path) -> None:
    """Its name is that of its folder, which may have been moved."""
    folder = tmp_path / "moved"
    (folder / "checkpoints").mkdir(parents=True)
    saved = Config(name="before", seed=8, data=DataConfig(path="x"))
    (folder / "config.toml").write_text(to_toml(saved), encoding="utf-8")
    expected = {**flatten(saved), "name": "moved"}
    for path in (folder, folder / "checkpoints" / "round-4"):
        assert flatten(parse(["--resume", str(path)])) == {**expected, "resume": str(path)}
        flat = flatten(parse(["--resume", str(path), "--max-rounds", "9", "--name", "new"]))
        assert flat == {**expected, "resume": str(path), "stop.max_rounds": 9, "name": "new"}
    assert parse(["--resume", "auto", "--name", "a"]).data == embedded_config().data
    with pytest.raises(RunDirectoryError, match=r"nowhere is not a run: there is no .*nowhere/config\.toml"):
        parse(["--resume", str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    ("args", "nearest"),
    [
        (["--perod", "3"], "--period"),
        (["--patiance", "3"], "--patience"),
        (["--sync.perod", "3"], "--sync.period"),
        (["--batchsize", "3"], "--batch-size"),
        (["--max-round", "3"], "--max-rounds"),
    ],
)
def test_a_mistyped_option_names_the_nearest(
    args: list[str], nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse(args)
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert args[0] in said.err
    assert re.search(rf"\s{nearest}[\s,]", said.err.partition("Perhaps you meant")[2]), said.err


def test_other_ranks_do_not_report_a_mistyped_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--perod", "3"], quiet=True)
    assert end.value.code == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config"], "--config is the last argument: expected a value after it."),
        (["--resume"], "--resume is the last argument: expected a value after it."),
        (["--config", "gone.toml"], "gone.toml: cannot read the configuration"),
        (["--period", "0"], "sync.period = 0: expected at least 1 local step"),
        (["--resume", "nowhere"], "nowhere is not a run"),
        (["--resume", "auto"], "expected --name NAME"),
        (["--data", "nowhere/*.h5"], "nowhere/*.h5"),
        (["--task", "clasification"], "Did you mean `classification`?"),
        (["--optim.name", "SDG"], "Did you mean `SGD`?"),
        (["--evaluate.metric", "eror"], "evaluate.metric = 'eror': the task gives error, loss"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_failed_start_is_one_line_and_exit_code_2(
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    try:
        code = main(["--backend", "solo", "--max-rounds", "2", "--patience", "0", *args])
    except SystemExit as end:  # the parser's own way
        code = end.code
    said = capsys.readouterr().err
    assert code == 2
    assert message in said
    assert "Traceback" not in said


def test_a_run_that_finishes_has_exit_code_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_foreign(tmp_path / "a.h5", 50)
    args = ["--data", str(tmp_path / "a.h5"), "--backend", "solo", "--runs", str(tmp_path), "--name", "r"]
    assert main(["train", *args, "--max-rounds", "2", "--threads", "1"]) == 0
    assert "stopped   the limit of rounds is reached (round 2)" in capsys.readouterr().out
    assert main([*args, "--max-rounds", "2"]) == 2
    assert "r exists already" in capsys.readouterr().err


FAILING = """
import hvd_train, torch
class Failing(hvd_train.Task):
    def build_model(self, spec):
        return torch.nn.Linear(3, 1)
    def loss(self, model, batch):
        raise RuntimeError("the loss is broken")
"""


def test_an_error_of_the_program_keeps_its_traceback(tmp_path: Path) -> None:
    """Python ends with it and exit code 1; a job of several ranks is in test_refusals.py."""
    write_foreign(tmp_path / "a.h5", 50)
    (tmp_path / "failing.py").write_text(FAILING, encoding="utf-8")
    args = ["--data", str(tmp_path / "a.h5"), "--backend", "solo", "--runs", str(tmp_path)]
    with pytest.raises(RuntimeError, match="the loss is broken"):
        main([*args, "--task", f"{tmp_path}/failing.py:Failing"])


def test_shard_commands_go_to_their_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_foreign(tmp_path / "a.h5", 50)
    assert main(["shard", "info", str(tmp_path / "a.h5")]) == 0
    assert "a.h5" in capsys.readouterr().out
    assert main(["shard", "info", str(tmp_path / "none.h5")]) == 2
    assert "none.h5" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is the last argument"):
        parse(["--config"])
