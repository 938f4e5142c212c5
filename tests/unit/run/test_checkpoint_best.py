"""The best model that could not be written at once, and what is missing at the end."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from hvd_train.record.reports import CheckpointReport, FaultReport
from hvd_train.run.checkpoint import put
from tests.threads import ThreadCommunicator, on_ranks
from tests.unit.run.test_checkpoint import checkpoints, equal, full_disk, model, names, opened, reports


@pytest.mark.parametrize("written_since", [False, True])
def test_a_best_that_failed_is_written_unchanged_when_there_is_room(
    written_since: bool, tmp_path: Path
) -> None:
    """The model has changed meanwhile; what is written is that of the best round, of every rank."""

    def run(comm: ThreadCommunicator) -> list[str]:
        written = checkpoints(tmp_path, comm, every_rounds=5)
        comm.barrier(30)
        with full_disk() if comm.rank == 0 else nullcontext():
            comm.barrier(30)
            written.after_round(4, "", improved=True)
            comm.barrier(30)
        for value in (*written.model.state_dict().values(), *written.model.parameters()):
            value.data.fill_(77)
        written.parts["own"].load_state_dict({"count": 100 + comm.rank})
        written.after_round(5 if written_since else 6, "", improved=False, evaluated=True)
        comm.barrier(30)
        written.after_round(7, "interrupted", improved=False)
        return [f"{r.round} {r.reason}" for r in reports(written) if isinstance(r, CheckpointReport)]

    first, second = on_ranks(2, run)
    assert first == second == [*(["5 every"] if written_since else []), "4 best", "7 interrupted"]
    best = opened(tmp_path, "best")
    assert best.round == 4
    assert equal(best.model()["0.weight"], model().state_dict()["0.weight"])
    assert [best.parts(rank)["own"]["count"] for rank in range(2)] == [0, 1]
    newest = opened(tmp_path)
    assert (newest.round, newest.parts(1)["own"]) == (7, {"count": 101})
    assert names(tmp_path) == {
        "round-4",
        "round-7",
        "latest",
        "best",
        *(["round-5"] if written_since else []),
    }


def test_the_late_best_is_the_latest_only_where_none_was_written_since(tmp_path: Path) -> None:
    for folder, later in ((tmp_path / "a", 6), (tmp_path / "b", 5)):
        written = checkpoints(folder, every_rounds=5)
        with full_disk():
            written.after_round(4, "", improved=True)
        written.after_round(later, "", improved=False, evaluated=True)
        assert (opened(folder, "best").round, opened(folder).round) == (4, 4 if later == 6 else 5)


def test_a_better_one_takes_the_place_of_the_best_that_failed(tmp_path: Path) -> None:
    written = checkpoints(tmp_path)
    with full_disk():
        written.after_round(4, "", improved=True)
        written.after_round(6, "", improved=False, evaluated=True)
    written.after_round(8, "", improved=True)
    written.after_round(10, "", improved=False, evaluated=True)
    assert [r.round for r in reports(written) if isinstance(r, CheckpointReport)] == [8]
    assert [r.round for r in reports(written) if isinstance(r, FaultReport)] == [4], "one warning, not two"


def test_missing_models_at_the_end(tmp_path: Path) -> None:
    written = checkpoints(tmp_path)
    written.after_round(4, "", improved=True)
    assert written.missing(4, "patience", 4) == ""
    assert written.missing(4, "diverged", None) == ""
    message = (
        "the best model (round 2) could not be saved. On disk: best is of round 4, latest is of round 4."
    )
    assert written.missing(4, "patience", 2) == message
    assert written.missing(4, "interrupted", 2) == "", "the run goes on, and takes another best"
    with full_disk():
        written.after_round(6, "interrupted", improved=False)
    assert written.missing(6, "interrupted", 4).startswith(
        "the model of the end (round 6) could not be saved: "
    )


def test_a_folder_gets_its_name_or_the_one_that_had_it_stays(tmp_path: Path) -> None:
    final = tmp_path / "round-4"
    final.mkdir()
    (final / "a").write_text("old")
    with pytest.raises(FileNotFoundError):
        put(tmp_path / "nothing", final)
    assert (final / "a").read_text() == "old"
    new = tmp_path / "new"
    new.mkdir()
    (new / "a").write_text("new")
    put(new, final)
    assert ((final / "a").read_text(), os.listdir(tmp_path)) == ("new", ["round-4"])
