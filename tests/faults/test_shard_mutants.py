"""A part of the mutants of `python -m tests.faults.mutants`, and those that were read wrongly before."""

from __future__ import annotations

import re
import sys

import pytest

from tests.faults.mutants import Mutant, run
from tests.faults.mutate_shards import AT_HEADER, AT_VALUES, CRASH, DIFFERS, HARMLESS, LEGAL, RESEALED, WRONG
from tests.launching import run as run_job

COUNT = 6000
"""Two minutes of two cores."""

FORMER = [
    # An empty heap of strings: HDF5 goes through it without an end.
    *(Mutant("classes, strings", number) for number in (7000004, 8000018, 8000036, 8000074)),
    # Chunks of no bytes, with a checksum: HDF5 reads what is before them in memory.
    *(Mutant("shuffle, gzip, fletcher32", number) for number in (8000000, 8000016, 8000022, 8000044)),
    # More chunks than the shape can have: HDF5 writes beyond the end of its memory.
    *(Mutant("newest format, arrays", number) for number in (8000113, 9000201)),
    # An index with 2**60 chunks: HDF5 goes through all numbers.
    *(Mutant("newest format, B-tree", number) for number in (1000170, 1000214)),
    # An index that HDF5 measured when the address of a dataset was asked for, and failed in.
    *(Mutant("newest format, B-tree", number) for number in (1000338, 1000391, 1000398)),
    Mutant("newest format, arrays", 1000282),
    Mutant("newest format, arrays", 1000888),
    # A dataset in fewer bytes than its values have: HDF5 read others, a few at a time.
    Mutant("written, contiguous", 1000678),
    # A part or a column of a dataset without checksums: `shard check` read all of it, and refused it.
    Mutant("table", 7000026),
    Mutant("part, last axis", 7000026),
    # Manifests without a training part: the message did not name the file.
    *(Mutant("manifest", number) for number in (8000010, 8000080)),
]
"""Their seeds give the same files as long as HDF5 writes the layouts with the same bytes."""


def test_no_damage_is_read_as_data() -> None:
    options = ["--mutants", str(COUNT), "--seed", "3", "--jobs", "2"]
    job = run_job([sys.executable, "-m", "tests.faults.mutants", *options], deadline_s=900)
    assert job.returncode == 0, job.output
    lines = re.findall(r"^\| (.+) \|$", job.stdout, re.M)
    names = lines[0].split(" | ")[1:]
    counts = [int(cell.replace(",", "")) for cell in lines[-1].split(" | ")[1:]]
    table = dict(zip(names, counts, strict=True))
    assert table.pop("mutants") == sum(table.values()) == COUNT
    assert not {*WRONG} & {*table}
    assert table[AT_HEADER] > COUNT // 2
    assert all(table[outcome] > COUNT // 100 for outcome in (AT_VALUES, HARMLESS, LEGAL))
    assert table[RESEALED] > 0


def test_mutants_that_were_read_wrongly(capsys: pytest.CaptureFixture[str]) -> None:
    total = run(FORMER, jobs=2).total()
    assert total.total() == len(FORMER)
    assert not {CRASH, DIFFERS, *WRONG} & {*total}, capsys.readouterr().out
