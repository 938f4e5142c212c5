"""Checkpoints: a round trip, damage that is noticed, what is kept, and disks that cannot be written."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import pytest
import torch
from torch import Tensor, nn

from hvd_train.comm.agree import SetupFailed
from hvd_train.comm.base import Communicator
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import CheckpointConfig
from hvd_train.data.format import FieldSpec, SampleSpec
from hvd_train.errors import RunDirectoryError
from hvd_train.record.reports import CheckpointReport, FaultReport, Recorder, Report, RunStart
from hvd_train.run.checkpoint import Checkpoints
from hvd_train.run.saved_checkpoint import SavedCheckpoint, find_checkpoint, rank_file
from tests.threads import ThreadCommunicator, on_ranks

SAMPLE = SampleSpec(
    inputs="x",
    targets="y",
    fields={"x": FieldSpec(shape=(3,), dtype="float32"), "y": FieldSpec(shape=(), dtype="int64")},
)


@final
class Remembered(Recorder):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.reports: list[Report] = []

    def header(self, header: RunStart) -> None: ...

    def report(self, report: Report) -> None:
        self.reports.append(report)

    def close(self) -> None: ...


@dataclass
class Part:
    """State of every kind."""

    values: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values = dict(state)


def model(value: float = 0.0) -> nn.Module:
    """A model whose parameters are views of one tensor, and which has an integer buffer."""
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    flat = torch.arange(8.0) + value
    module[0].weight.data, module[0].bias.data = flat[:6].view(2, 3), flat[6:]
    module[1].num_batches_tracked.fill_(int(value))
    return module


def checkpoints(
    folder: Path, comm: Communicator | None = None, value: float = 0.0, **config: int
) -> Checkpoints:
    comm = comm or SoloCommunicator()
    own = {
        "numbers": torch.tensor([comm.rank + value, 2.5], dtype=torch.float64),
        "bits": torch.arange(5, dtype=torch.uint8),
        "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "a/b": torch.tensor(7),
        "count": comm.rank,
        "text": "é",
        "list": [[1, 0.1], [2, None]],
        "big": 2**80,
    }
    return Checkpoints(
        folder=folder / "checkpoints",
        comm=comm,
        config=CheckpointConfig(**config),
        model=model(value),
        parts={"own": Part(own), "same": Part({"rounds": 1, "tensor": torch.ones(2)}), "nothing": Part()},
        shared=frozenset(("same",)),
        sample=SAMPLE,
        recorder=Remembered(),
    )


def reports(of: Checkpoints) -> list[Report]:
    assert isinstance(of.recorder, Remembered)
    return of.recorder.reports


def names(folder: Path) -> set[str]:
    """What is in the folder of the checkpoints, but for the index, which is always there."""
    return {p.name for p in (folder / "checkpoints").iterdir()} - {"index.json"}


def opened(folder: Path, pointer: str = "latest") -> SavedCheckpoint:
    found = find_checkpoint(folder, pointer)
    assert found is not None
    return found


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype is b.dtype and torch.equal(a.nan_to_num(nan=99), b.nan_to_num(nan=99))
    return type(a) is type(b) and a == b


def test_a_round_trip_of_two_ranks(tmp_path: Path) -> None:
    def run(comm: ThreadCommunicator) -> dict[str, Any]:
        written = checkpoints(tmp_path, comm)
        written.save(12, "every", best=True)
        return {name: part.state_dict() for name, part in written.parts.items()}

    saved_by = on_ranks(2, run)
    saved = opened(tmp_path)
    assert (saved.round, saved.world_size, saved.sample) == (12, 2, SAMPLE)
    state = saved.model()
    assert all(equal(value, state[name]) for name, value in model().state_dict().items())
    assert state.keys() == model().state_dict().keys()
    for rank, expected in enumerate(saved_by):
        parts = saved.parts(rank)
        assert parts.keys() == {"own", "same", "nothing"}
        for part, values in expected.items():
            assert parts[part].keys() == values.keys()
            assert all(equal(value, parts[part][key]) for key, value in values.items()), part
    assert names(tmp_path) == {"round-12", "latest", "best"}


def test_only_rank_0_writes_what_is_shared(tmp_path: Path) -> None:
    on_ranks(2, lambda comm: checkpoints(tmp_path, comm).save(1, "every", best=False))
    folder = tmp_path / "checkpoints" / "round-1"
    assert {p.name for p in folder.iterdir()} == {
        "manifest.json",
        "model.safetensors",
        rank_file(0),
        rank_file(1),
    }
    assert b"same/tensor" in (folder / rank_file(0)).read_bytes()
    assert b"same/tensor" not in (folder / rank_file(1)).read_bytes()


def test_another_world_size_takes_the_ranks_in_turn(tmp_path: Path) -> None:
    on_ranks(2, lambda comm: checkpoints(tmp_path, comm).save(1, "every", best=False))
    saved = opened(tmp_path)
    assert [saved.parts(rank)["own"]["count"] for rank in range(5)] == [0, 1, 0, 1, 0]
    assert all(saved.parts(rank)["same"]["rounds"] == 1 for rank in range(5))


def test_what_is_reported(tmp_path: Path) -> None:
    written = checkpoints(tmp_path)
    written.save(3, "best", best=True)
    (report,) = reports(written)
    assert isinstance(report, CheckpointReport)
    folder = tmp_path / "checkpoints" / "round-3"
    assert (report.round, report.path, report.reason) == (3, str(folder), "best")
    assert report.num_bytes == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {n: f["num_bytes"] for n, f in manifest["files"].items()} == {
        p.name: p.stat().st_size for p in folder.glob("*.safetensors")
    }


@pytest.mark.parametrize("name", ["model.safetensors", rank_file(0)])
@pytest.mark.parametrize("where", [0, 9, 0.5, -1])
def test_one_flipped_bit_is_found(name: str, where: float, tmp_path: Path) -> None:
    checkpoints(tmp_path).save(3, "end", best=True)
    file = tmp_path / "checkpoints" / "round-3" / name
    content = bytearray(file.read_bytes())
    content[int(len(content) * where) if isinstance(where, float) else where] ^= 16
    file.write_bytes(content)
    saved = opened(tmp_path)
    read = saved.model if name.startswith("model") else lambda: saved.parts(0)
    with pytest.raises(
        RunDirectoryError, match=rf"{name}: damaged: {len(content)} bytes whose checksum differs"
    ):
        read()


@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_a_truncated_file_is_found(left: int, tmp_path: Path) -> None:
    checkpoints(tmp_path).save(3, "end", best=True)
    file = tmp_path / "checkpoints" / "round-3" / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, left % size)
    expected = rf"model\.safetensors: damaged: {left % size} bytes .*\({size} bytes\)\. No other checkpoint"
    with pytest.raises(RunDirectoryError, match=expected):
        opened(tmp_path).model()


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    checkpoints(tmp_path).save(3, "end", best=True)
    (tmp_path / "checkpoints" / "round-3" / rank_file(0)).unlink()
    with pytest.raises(RunDirectoryError, match=r"rank-00000\.safetensors: cannot be read: .*No such file"):
        opened(tmp_path).parts(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read"),
        ('{"schema": 1, "round": 3', "cannot be read"),
        ("[1]", "cannot be read"),
        ('{"schema": 3}', "schema 3; this program reads 1 to 2. Use the version that wrote it"),
        ('{"schema": 2}', "damaged: its checksum is None"),
        ('{"schema": 1, "round": 3, "world_size": 1}', "damaged: Object missing required field `sample`"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_named(content: str, message: str, tmp_path: Path) -> None:
    checkpoints(tmp_path).save(3, "end", best=True)
    manifest = tmp_path / "checkpoints" / "round-3" / "manifest.json"
    manifest.write_text(content)
    with pytest.raises(RunDirectoryError) as caught:
        find_checkpoint(tmp_path, "latest")
    assert str(caught.value).startswith(f"{manifest}: {message}")


def test_what_is_kept(tmp_path: Path) -> None:
    written = checkpoints(tmp_path, keep=2)
    for rounds, best in ((2, True), (4, False), (6, True), (8, False)):
        written.save(rounds, "every", best)
    assert names(tmp_path) == {"round-6", "round-8", "latest", "best"}
    for rounds in (10, 100):
        written.save(rounds, "every", best=False)
    assert names(tmp_path) == {"round-6", "round-10", "round-100", "latest", "best"}
    assert (opened(tmp_path, "best").round, opened(tmp_path).round) == (6, 100)
    written.save(102, "best", best=True)
    assert names(tmp_path) == {"round-100", "round-102", "latest", "best"}
    kept = {p: str(tmp_path / "checkpoints" / "round-102") for p in ("best", "latest")}
    assert written.kept() == kept
    one = checkpoints(tmp_path, keep=1)
    one.save(104, "every", best=False)
    assert names(tmp_path) == {"round-102", "round-104", "latest", "best"}


def test_rounds_that_a_resume_has_undone_do_not_displace_those_being_done(tmp_path: Path) -> None:
    first = checkpoints(tmp_path, keep=2)
    for rounds in (10, 20, 30):
        first.save(rounds, "every", best=rounds == 20)
    again = checkpoints(tmp_path, value=5, keep=2)  # goes on from round 10
    again.save(12, "every", best=False)
    assert names(tmp_path) == {"round-20", "round-12", "latest", "best"}, "20 is still named the best"
    again.save(14, "every", best=True)
    assert names(tmp_path) == {"round-12", "round-14", "latest", "best"}
    again.save(20, "every", best=False)
    assert float(opened(tmp_path).model()["0.weight"][0, 0]) == 5, "a round that is done again replaces"


@pytest.mark.parametrize(
    ("every", "rounds", "reason", "improved", "expected"),
    [
        (0, 3, "", False, None),
        (0, 3, "", True, "best"),
        (3, 3, "", False, "every"),
        (3, 4, "", False, None),
        (3, 3, "", True, "best"),
        (0, 3, "patience", False, "end"),
        (0, 3, "diverged", True, "end"),
        (3, 3, "interrupted", False, "interrupted"),
    ],
)
def test_rounds_of_checkpoints(
    every: int, rounds: int, reason: str, improved: bool, expected: str | None, tmp_path: Path
) -> None:
    written = checkpoints(tmp_path, every_rounds=every)
    written.after_round(rounds, reason, improved)
    assert [r.reason for r in reports(written) if isinstance(r, CheckpointReport)] == [expected] * bool(
        expected
    )
    assert ("best" in written.kept()) is improved


@contextmanager
def full_disk(num_bytes: int = 100) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes; what is written beyond them fails, as on a disk
    that is full: a part of it is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_reported_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    def run(comm: ThreadCommunicator) -> Checkpoints:
        written = checkpoints(tmp_path, comm)
        written.after_round(2, "", improved=True)
        if comm.rank == 0:
            before = names(tmp_path)
        comm.barrier(30)
        with full_disk() if comm.rank == 0 else nullcontext():
            comm.barrier(30)
            written.after_round(4, "", improved=True)
            assert written.failure
            written.after_round(6, "max_rounds", improved=False)  # the run ends; there is a checkpoint
            comm.barrier(30)
        if comm.rank == 0:
            assert names(tmp_path) == before
        comm.barrier(30)
        return written

    written = on_ranks(2, run)
    kinds = [type(r).__name__ for r in reports(written[0])]
    assert kinds == ["CheckpointReport", "FaultReport", "FaultReport"]
    fault = reports(written[0])[1]
    assert isinstance(fault, FaultReport)
    assert (fault.round, fault.kind) == (4, "checkpoint_not_saved")
    assert "rank 0 (here): [Errno 27] File too large" in fault.message
    assert "The last good one stays; make room" in fault.message
    saved = opened(tmp_path, "best")
    assert saved.round == 2
    assert saved.parts(1)["own"]["count"] == 1


def test_when_there_is_room_again_it_is_saved_again(tmp_path: Path) -> None:
    written = checkpoints(tmp_path)
    with full_disk():
        written.after_round(4, "", improved=True)
    assert names(tmp_path) == set()
    written.after_round(6, "end", improved=False)
    assert written.failure == ""
    assert opened(tmp_path).round == 6


def test_a_run_without_any_checkpoint_says_so_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")

    def run(comm: ThreadCommunicator) -> str:
        written = checkpoints(tmp_path, comm)
        with pytest.raises(SetupFailed, match=r"a checkpoint cannot be written there: .* Make room"):
            written.prepare()
        written.after_round(2, "", improved=True)
        written.after_round(4, "patience", improved=False)
        return written.missing(4, "patience", 2)

    (message,) = set(on_ranks(3, run))
    assert message.startswith(
        "the model of the end (round 4) and the best model (round 2) could not be saved: "
    )
    assert "rank 0 (here): " in message
    assert message.endswith("On disk: no checkpoint.")


def test_one_rank_that_does_not_see_the_folder_is_enough(tmp_path: Path) -> None:
    """A checkpoint that lacks a rank's state is none."""

    def run(comm: ThreadCommunicator) -> str:
        written = checkpoints(tmp_path / "not-mounted-here" if comm.rank == 1 else tmp_path, comm)
        with pytest.raises(
            SetupFailed, match=r"rank 1 of 2: .*not-mounted-here/checkpoints: a checkpoint cannot"
        ):
            written.prepare()
        written.after_round(2, "", improved=True)
        return written.failure

    (failure,) = set(on_ranks(2, run))
    assert failure.startswith("rank 1 (here): [Errno 2] No such file or directory: ")
    assert "not-mounted-here" in failure
    assert names(tmp_path) == set()


def test_what_a_killed_run_left_is_harmless_and_goes_away(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoints(tmp_path).save(4, "every", best=True)
    torn = folder / ".round-6.tmp"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    (folder / ".latest.0123abcd.tmp").write_text("round-")
    half_removed = folder / "round-9"
    half_removed.mkdir()
    (half_removed / rank_file(0)).write_bytes(b"half")
    assert opened(tmp_path).round == 4
    (folder / "latest").unlink()
    assert opened(tmp_path).round == 4, "a folder without a manifest is no checkpoint"
    checkpoints(tmp_path).save(8, "every", best=False)
    assert opened(tmp_path).round == 8
    assert names(tmp_path) - {".latest.0123abcd.tmp"} == {"round-4", "round-8", "latest", "best"}


def test_killed_between_the_folder_and_its_name(tmp_path: Path) -> None:
    """The first checkpoint is complete, but nothing names it yet."""
    checkpoints(tmp_path).save(4, "every", best=True)
    for pointer in ("latest", "best"):
        (tmp_path / "checkpoints" / pointer).unlink()
        assert opened(tmp_path, pointer).round == 4


@pytest.mark.parametrize("text", ["", "round-99\n", "../../elsewhere\n", "/etc\n"])
def test_a_dangling_pointer_is_not_followed(text: str, tmp_path: Path) -> None:
    checkpoints(tmp_path).save(4, "every", best=True)
    (tmp_path / "checkpoints" / "latest").write_text(text)
    assert opened(tmp_path).round == 4


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="neither a run's folder nor a checkpoint"):
        find_checkpoint(tmp_path, "latest")
    (tmp_path / "checkpoints").mkdir()
    assert find_checkpoint(tmp_path, "latest") is None
