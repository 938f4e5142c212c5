"""Each file is copied once a host, as far as there is room; what cannot be used is an error everywhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from hvd_train.comm.agree import SetupFailed
from hvd_train.data.local_copy import copy
from hvd_train.run import node_cache as caching
from hvd_train.run.node_cache import Copies, node_cache
from tests.threads import ThreadCommunicator, on_ranks, outcomes

PARTS = {0: "ab", 1: "bc", 2: "c", 3: "ad"}
"""Of four ranks, on two hosts."""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    paths = {}
    for name in "abcd":
        paths[name] = str(tmp_path / f"{name}.h5")
        Path(paths[name]).write_text(f"rows of {name}")
    return paths


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that any rank copied."""
    seen: list[str] = []

    def recording(source: str, target: Path) -> None:
        seen.append(Path(source).stem)
        copy(source, target)

    monkeypatch.setattr(caching, "copy", recording)
    return seen


def use(comm: ThreadCommunicator, cache: Path | str, files: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """What the copies of this rank's files hold, and the words; returns once every rank has left them."""
    comm.host = f"host{comm.rank // 2}"
    mine = [files[name] for name in PARTS[comm.rank]]
    with node_cache(comm, str(cache), mine) as copies:
        found = {Path(file).stem: Path(path).read_text() for file, path in copies.paths.items()}
        comm.barrier()
    comm.barrier()
    return found, copies.words


def test_each_file_is_copied_once_a_host(files: dict[str, str], copied: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for rank, (found, words) in enumerate(on_ranks(4, lambda comm: use(comm, cache, files))):
        assert found == {name: f"rows of {name}" for name in PARTS[rank]}
        of = "1 of 1 file" if rank == 2 else "2 of 2 files"
        assert words == f"; {of} copied to {cache}"
    assert sorted(copied) == ["a", "a", "b", "c", "c", "d"]
    assert list(cache.iterdir()) == []


def test_what_does_not_fit_is_read_from_where_it_is_with_one_warning(
    files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(caching, "fitting", lambda sizes, folder: list(sizes)[:1])

    def full(source: str, target: Path) -> None:
        if Path(source).stem == "c":
            raise OSError(28, "No space left on device")
        copy(source, target)

    monkeypatch.setattr(caching, "copy", full)
    cache = tmp_path / "cache"
    found = [found for found, _ in on_ranks(4, lambda comm: use(comm, cache, files))]
    assert [set(names) for names in found] == [{"a"}, set(), set(), set()]
    assert capsys.readouterr().err == (
        f"hvd_train: data.cache = '{cache}' has no room on host0: 2 of 3 files, the first is {files['b']} "
        "(and on 1 more host). They are read from where they are.\n"
    )


def test_no_cache(files: dict[str, str], copied: list[str]) -> None:
    def empty(comm: ThreadCommunicator) -> Copies:
        with node_cache(comm, "", list(files.values())) as copies:
            return copies

    assert on_ranks(2, empty) == [Copies(), Copies()]
    assert copied == []


def test_a_folder_that_cannot_be_used_is_an_error_on_every_rank(
    files: dict[str, str], tmp_path: Path
) -> None:
    cache = tmp_path / "a file"
    cache.write_text("")
    for outcome in outcomes(4, lambda comm: use(comm, cache, files)):
        assert isinstance(outcome, SetupFailed)
        assert str(outcome) == (
            f"rank 0, 2 of 4: data.cache = '{cache}': File exists. Expected a folder on a disk of the host, "
            "with locks, in which this user can write: name one, or leave data.cache out."
        )


def test_an_error_of_one_rank_leaves_no_folder(files: dict[str, str], tmp_path: Path) -> None:
    os.unlink(files["d"])  # of the second host
    cache = tmp_path / "cache"
    for outcome in outcomes(4, lambda comm: use(comm, cache, files)):
        assert isinstance(outcome, SetupFailed)
        expected = f"rank 2 of 4: {files['d']}: No such file or directory. Every rank must see its shards."
        assert str(outcome) == expected
    assert list(cache.iterdir()) == []
