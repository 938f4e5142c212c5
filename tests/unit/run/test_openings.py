"""How many times a training opens each of its files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import pytest

from hvd_train.app import train
from hvd_train.comm.solo import SoloCommunicator
from hvd_train.config import Config, DataConfig, StopConfig
from tests.unit.data.shards import write_foreign

FILES, SURVEYED = 300, 76


def test_each_of_many_files_is_opened_for_its_header_and_for_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some are opened twice more, once a field, for the survey of the values."""
    (tmp_path / "d").mkdir()
    for i in range(FILES):
        write_foreign(tmp_path / "d" / f"{i:03}.h5", 4, 4 * i)
    opened: Counter[str] = Counter()
    real = h5py.h5f.open

    def counting(name: bytes, *args: Any, **options: Any) -> Any:
        opened[Path(name.decode()).name] += 1
        return real(name, *args, **options)

    monkeypatch.setattr(h5py.h5f, "open", counting)
    config = Config(
        data=DataConfig(path=str(tmp_path / "d")),
        stop=StopConfig(max_rounds=1, patience=0),
        runs=str(tmp_path / "runs"),
    )
    train(config, comm=SoloCommunicator())
    assert len(opened) == FILES
    assert Counter(opened.values()) == {2: FILES - SURVEYED, 4: SURVEYED}
