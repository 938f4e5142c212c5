"""A few of the mutants of `python -m tests.faults.mutants shards`."""

from __future__ import annotations

import re
import sys

import pytest

from tests.faults.mutate_shards import HARMLESS, OTHER_VALUES, REFUSED
from tests.launching import run

COUNT = 150


@pytest.mark.parametrize("corrected", [False, True], ids=["as-they-were", "corrected"])
def test_no_damage_is_read_as_data(corrected: bool) -> None:
    options = ["shards", "--count", str(COUNT), "--seed", "3", *(["--corrected"] if corrected else [])]
    job = run([sys.executable, "-m", "tests.faults.mutants", *options], deadline_s=280)
    assert job.returncode == 0, job.output
    table = {name: int(number) for name, number in re.findall(r"^\| (.+) \| (\d+) \|$", job.stdout, re.M)}
    assert sum(table.values()) == COUNT
    assert table[REFUSED] > COUNT // 4
    assert table[HARMLESS] > 0
    assert (OTHER_VALUES in table) == corrected
