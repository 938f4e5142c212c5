"""The embedded default: two shards split by class, written once however many ask for it."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest

from hvd_train.config import DataConfig
from hvd_train.data.catalog import open_catalog
from hvd_train.data.check import check_shard
from hvd_train.data.demo import cache_folder, ensure_digits
from hvd_train.data.locate import locate
from hvd_train.data.places import plain
from hvd_train.data.rows import Rows
from hvd_train.data.sources import load_digits
from hvd_train.errors import DataError
from tests.deadlines import seconds


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HVD_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_each_training_shard_has_half_the_classes_and_validation_all(cache: Path) -> None:
    catalog = open_catalog(DataConfig())
    assert [info.class_counts is not None for info in catalog.shards] == [True] * 3
    present = [{c for c, n in enumerate(info.class_counts or ()) if n} for info in catalog.shards]
    assert present == [set(range(5)), set(range(5, 10)), set(range(10))]
    assert (catalog.sample.num_classes, catalog.sample.scale) == (10, 1 / 16)
    assert (catalog.sample.fields["inputs"].shape, catalog.sample.fields["inputs"].dtype) == ((8, 8), "uint8")
    counts = np.array(catalog.shards[2].class_counts)
    assert counts.sum() == 359
    assert counts.max() - counts.min() <= 2, "stratified"
    rows = Rows((*catalog.train, *catalog.validation), catalog.sample.fields)
    together = rows.read(0, len(rows))
    rows.close()
    digits = load_digits()
    found = sorted(
        (x.tobytes(), int(y)) for x, y in zip(together["inputs"], together["targets"], strict=True)
    )
    assert found == sorted((x.tobytes(), int(y)) for x, y in zip(digits.inputs, digits.targets, strict=True))


def test_it_is_written_once_and_checks(cache: Path) -> None:
    folder = ensure_digits()
    assert folder == cache / "digits-v2"
    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert ensure_digits() == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == times
    source = locate(str(folder), "PATH")
    for shard in (*source.train, *source.validation):
        assert check_shard(shard, plain(("inputs", "targets"))).problems == ()


def test_two_caches_hold_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = []
    for name in ("a", "b"):
        monkeypatch.setenv("HVD_TRAIN_CACHE", str(tmp_path / name))
        contents.append({p.name: p.read_bytes() for p in ensure_digits().iterdir()})
    assert contents[0] == contents[1]


def ensure_together(barrier: Barrier, results: SimpleQueue[str]) -> None:
    load_digits()  # imports scikit-learn before the barrier, so that the writing itself coincides
    barrier.wait(seconds(60))
    results.put(str(ensure_digits()))


def test_several_processes_at_once(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(6), context.SimpleQueue()
    processes = [context.Process(target=ensure_together, args=(barrier, results)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds(60))
    assert [process.exitcode for process in processes] == [0] * 6
    assert [results.get() for _ in processes] == [str(cache / "digits-v2")] * 6
    assert [p.name for p in cache.iterdir()] == ["digits-v2"], "nothing temporary is left"
    assert len(open_catalog(DataConfig()).train) == 2


def test_without_scikit_learn(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install hvd_train\[demo\]"):
        open_catalog(DataConfig())
    assert not cache.exists() or list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HVD_TRAIN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        DataError, match=r"digits-v2: the digits cannot be written here: .*Set HVD_TRAIN_CACHE"
    ):
        ensure_digits()


def test_the_location_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HVD_TRAIN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/hvd_train")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/hvd_train")
    assert "HVD_TRAIN_CACHE" not in os.environ
