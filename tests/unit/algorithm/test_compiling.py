"""Before a model is compiled: what is missing is an error that says how to go on without."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch._dynamo.exc import Unsupported

from hvd_train.algorithm.compiling import compile_in_turn, private_folder
from hvd_train.comm.agree import RankFailed, SetupFailed
from hvd_train.comm.base import Communicator
from hvd_train.errors import EnvironmentMismatch
from tests.threads import on_ranks
from tests.unit.trainings import small, train


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("TORCHINDUCTOR_FX_GRAPH_CACHE", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, "1")  # so that the test leaves no other value behind
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_missing_compiler_is_an_error_before_the_first_step(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SetupFailed, match=r"the C\+\+ compiler `no-such-compiler` was not found") as caught:
        train(replace(config, model=replace(config.model, compile=True)), 1)
    assert str(caught.value).endswith("or set model.compile = false.")


def test_the_first_rank_of_a_host_compiles_before_the_others(cache: Path) -> None:
    order: list[int] = []

    def rank(comm: Communicator) -> list[float]:
        return compile_in_turn(comm, lambda: order.append(comm.local_rank))

    seconds = on_ranks(3, rank)
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]
    assert seconds[0] == seconds[1] == seconds[2]


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (Unsupported("a construct"), SetupFailed, "torch.compile failed: Unsupported: a construct"),
        (ValueError("of the model"), RankFailed, "ValueError: of the model"),
    ],
)
@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_cannot_compile_ends_the_start_on_all(
    raised: Exception, expected: type[Exception], message: str, failing: int, cache: Path
) -> None:
    def rank(comm: Communicator) -> str:
        def compile_it() -> None:
            if comm.rank == failing:
                raise raised

        with pytest.raises(expected, match=message) as caught:
            compile_in_turn(comm, compile_it)
        return str(caught.value)

    said = on_ranks(3, rank)
    assert said[0] == said[1] == said[2]


def test_the_cache_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    before = os.umask(0)
    try:
        folder = private_folder(tmp_path)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert private_folder(tmp_path) == folder


SPOILT: list[Callable[[Path], object]] = [
    lambda folder: folder.chmod(0o770),
    lambda folder: (folder.rename(folder.parent / "other"), folder.symlink_to(folder.parent / "other")),
    lambda folder: (folder.rmdir(), folder.write_text("")),
]


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_folder_that_others_could_have_filled_is_refused(
    tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    folder = private_folder(tmp_path)
    spoil(folder)
    with pytest.raises(EnvironmentMismatch, match=r"expected a folder that only you can use.*CACHE_DIR"):
        private_folder(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentMismatch, match="No such file or directory"):
        private_folder(tmp_path / "missing")
