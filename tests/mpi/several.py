"""Several trainings in one program: `several.py FOLDER BACKEND`. For test_ends.py."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

import hvd_train
from hvd_train.errors import UserError

folder, backend = Path(sys.argv[1]), sys.argv[2]
config = dataclasses.replace(
    hvd_train.load_config(folder / "run.toml"), runs=str(folder), threads=1, backend=backend
)

first = hvd_train.train(dataclasses.replace(config, name="first"))
with pytest.raises(UserError, match="exists already"):
    hvd_train.train(dataclasses.replace(config, name="first"))
with hvd_train.connect(backend) as comm:
    second = hvd_train.train(dataclasses.replace(config, name="second"), comm=comm)
third = hvd_train.train(dataclasses.replace(config, name="third"))
if comm.rank == 0:
    print(f"three runs: {first.run.name}, {second.run.name}, {third.run.name}", flush=True)
