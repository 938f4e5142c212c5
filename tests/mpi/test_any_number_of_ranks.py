"""A run that goes on with other numbers of ranks within an epoch uses every row once."""

from __future__ import annotations

from pathlib import Path

from tests.mpi.jobs import events, train
from tests.unit.data.shards import write_foreign

PRIMES = (11, 23, 37, 5, 53, 2, 31)


def test_every_row_once_an_epoch(tmp_path: Path) -> None:
    """3, 2, 5 and 1 ranks; the first three stop in the middle of the first epoch, the last after two."""
    data, rows, runs = tmp_path / "data", tmp_path / "rows", tmp_path / "runs"
    data.mkdir()
    rows.mkdir()
    for number, size in enumerate(PRIMES):
        write_foreign(data / f"s{number}.h5", size, sum(PRIMES[:number]))
    options = ["--data", str(data), "--task", "tests/mpi/recording.py:Recording", "--batch-size", "2"]
    options += ["--period", "1", "--patience", "0", "--threads", "1", "--data.redeal", "epoch"]
    epochs = []
    for start, (ranks, limit) in enumerate([(3, "4"), (2, "9"), (5, "12"), (1, "")]):
        stop = (
            ["--stop.max-rounds", limit] if limit else ["--stop.max-epochs", "2", "--stop.max-rounds", "400"]
        )
        again = ["--resume", "auto"] if start else []
        job = train(
            "mpirun",
            ranks,
            runs,
            *["--name", "r", *options, *again, *stop],
            deadline_s=180,
            env={"ROWS_OF_RANKS": str(rows)},
        )
        epochs.append(events(runs / "r", "round")[-1]["epoch"])
        assert ("rows that it has left." in job.stderr) is (start > 0), job.stderr
    assert epochs == sorted(epochs)
    assert epochs[2] < 1
    assert epochs[3] == 2
    used = [int(line) for file in sorted(rows.iterdir()) for line in file.read_text().split()]
    assert sorted(used) == sorted([*range(sum(PRIMES))] * 2)
    last = [int(line) for line in (rows / "rank-0").read_text().split()]
    assert sorted(last[-sum(PRIMES) :]) == list(range(sum(PRIMES))), "the second epoch is of one rank"
