"""Interrupted runs go on: with the same ranks to the bit, with others to the normal error."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

from hvd_train.run.saved_checkpoint import what_is_wrong
from tests.deadlines import seconds
from tests.launching import Process, command, ranks_of, send, start, wait_for
from tests.mpi.jobs import events, has_recorded, model_bytes, train

TASKS = "tests/mpi/sleepy.py"
DIGITS = ("--config", "hvd_train/demo/digits.toml")
LONG = (*DIGITS, "--task", f"{TASKS}:Slow", "--patience", "0", "--max-rounds", "400")


def wait_for_rounds(folder: Path, rounds: int, process: Process) -> None:
    """Until the event log tells of so many rounds."""
    wait_for(lambda: has_recorded(folder, "round", rounds), 60, process)


def interrupt(launcher: str, runs: Path, name: str, number: int, *, to_ranks: bool) -> Process:
    """Starts a long training of two ranks and asks it to stop after some rounds."""
    argv = command(launcher, 2, ["-m", "hvd_train", "--runs", str(runs), "--name", name, *LONG])
    with start(argv) as process:
        wait_for_rounds(runs / name, 5, process)
        if to_ranks:
            ranks = ranks_of(process)
            assert len(ranks) == 2
            send(ranks, number)
        else:
            process.send_signal(number)
        process.wait(timeout=seconds(30))
    return process


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    process = interrupt("mpirun", tmp_path, "r", signal.SIGUSR1, to_ranks=False)
    assert process.returncode == 0
    (stop,) = events(tmp_path / "r", "stop")
    assert stop["reason"] == "interrupted"
    assert 5 <= stop["round"] < 400
    (saved,) = events(tmp_path / "r", "checkpoint")[-1:]
    assert (saved["reason"], saved["round"]) == ("interrupted", stop["round"])

    refused = train("mpirun", 2, tmp_path, "--name", "r", *DIGITS, succeeds=False)
    assert refused.returncode == 2
    assert "r exists already" in refused.output
    assert "--resume auto" in refused.output

    for ranks in (2, 3):
        name = f"with-{ranks}"
        shutil.copytree(tmp_path / "r", tmp_path / name)
        again = ("--name", name, "--resume", "auto")
        resumed = train("mpirun", ranks, tmp_path, *again, *DIGITS, deadline_s=90)
        last = events(tmp_path / name, "stop")[-1]
        assert last["reason"] == "patience", resumed.output
        assert last["best"] < 0.045
        rounds = [e["round"] for e in events(tmp_path / name, "round")]
        assert rounds == sorted(set(rounds)), "a round was done twice or out of order"
        assert events(tmp_path / name, "header")[-1]["round"] == stop["round"]


def test_one_interrupted_rank_stops_all(tmp_path: Path) -> None:
    """A signal that reaches the ranks themselves, as from a batch system; SIGTERM this time."""
    process = interrupt("horovodrun-gloo", tmp_path, "r", signal.SIGTERM, to_ranks=True)
    assert process.returncode == 0
    (stop,) = events(tmp_path / "r", "stop")
    assert stop["reason"] == "interrupted"


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    """Stopped in the middle of an epoch, with momentum, dropout and a learning rate that changes."""
    fixed = (
        *DIGITS,
        "--patience",
        "0",
        "--threads",
        "1",
        "--task",
        f"{TASKS}:Dropout",
        "--evaluate.every-rounds",
        "7",
    )
    rate = (
        "--learning-rate.schedule",
        "cosine",
        "--learning-rate.total",
        "30",
        "--optim.name",
        "AdamW",
        "--lr",
        "0.003",
    )
    train("mpirun", 2, tmp_path, "--name", "whole", *fixed, *rate, "--max-rounds", "23")
    train("mpirun", 2, tmp_path, "--name", "parts", *fixed, *rate, "--max-rounds", "11")
    again = ("--resume", str(tmp_path / "parts"), "--max-rounds", "23")
    train("mpirun", 2, tmp_path, *again)
    assert model_bytes(tmp_path / "parts") == model_bytes(tmp_path / "whole")
    curves = [
        {e["round"]: e["error"] for e in events(tmp_path / name, "evaluation")} for name in ("whole", "parts")
    ]
    assert curves[0] == {r: e for r, e in curves[1].items() if r != 11}, "11 is the end of the first part"
    assert list(curves[0]) == [7, 14, 21, 23]
    over = train("mpirun", 2, tmp_path, *again, succeeds=False)
    assert over.returncode == 2
    assert "stop.max_rounds = 23: the run has done 23; expected a higher limit" in over.output


def test_a_damaged_checkpoint_is_refused_or_left_out(tmp_path: Path) -> None:
    """By the path of the run it is refused, once for all ranks; `auto` goes on from the one before."""
    long = ("--patience", "0", "--evaluate.every-rounds", "4", "--checkpoint.every-rounds", "2")
    train("mpirun", 2, tmp_path, "--name", "r", "--max-rounds", "8", *DIGITS, *long)
    folder = tmp_path / "r" / "checkpoints"
    assert (folder / "latest").read_text() == "round-8\n"
    manifest = json.loads((folder / "round-8" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"model.safetensors", "rank-00000.safetensors", "rank-00001.safetensors"}
    content = bytearray((folder / "round-8" / "rank-00001.safetensors").read_bytes())
    content[-9] ^= 1
    (folder / "round-8" / "rank-00001.safetensors").write_bytes(content)
    job = train("mpirun", 2, tmp_path, "--resume", str(tmp_path / "r"), "--max-rounds", "9", succeeds=False)
    assert job.returncode == 2
    message = f"Go on from {folder / 'round-6'}, which is whole."
    assert job.stderr.count(message) == 1
    assert "rank-00001.safetensors: damaged" in job.stderr
    train("mpirun", 2, tmp_path, "--name", "r", "--resume", "auto", "--max-rounds", "9", *DIGITS, *long)
    (fault,) = [e for e in events(tmp_path / "r", "fault") if e["kind"] == "checkpoint_left_out"]
    assert fault["round"] == 6
    assert events(tmp_path / "r", "stop")[-1]["round"] == 9
    assert what_is_wrong(folder / "round-8") == "", "its rounds were done again"
