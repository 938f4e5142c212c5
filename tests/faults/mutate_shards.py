"""Damaged shards: how they are made, and what reading and checking them comes to.

A mutant is a pure function of the name of its layout and a number, where HDF5 writes the same bytes and
the same layouts can be written: those with parts of other files are others without hdf5plugin.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hvd_train.config import DataConfig
from hvd_train.data import format as fmt
from hvd_train.data.blocks import checksums
from hvd_train.data.catalog import open_catalog
from hvd_train.data.check import check_shards
from hvd_train.data.crash import in_child
from hvd_train.data.deal import deal
from hvd_train.data.facts import digest, digest_of, encode
from hvd_train.data.format import Array
from hvd_train.data.index import INDEX_NAME
from hvd_train.data.locate import in_groups, locate
from hvd_train.data.manifest import _digest
from hvd_train.data.places import places_of
from hvd_train.data.readers.make import make_reader
from hvd_train.data.rows import Rows
from hvd_train.data.survey import survey
from hvd_train.errors import DataError
from tests.faults.changes import change_bytes, change_json, change_like
from tests.faults.hdf5_structures import metadata_of, structures_of
from tests.faults.shard_damage import Target, damage
from tests.faults.shard_layouts import LAYOUTS, Layout

AT_HEADER = "refused at the header"
AT_VALUES = "refused while labels or rows were read"
HARMLESS = "accepted, equal values"
LEGAL = "accepted, other values, no checksums"
RESEALED = "accepted, other values, checksums corrected"
CRASH = "crash in HDF5, file named"
RIGHT = (AT_HEADER, AT_VALUES, HARMLESS, LEGAL, RESEALED, CRASH)

DIFFERS = "accepted, other values, though there are checksums"
UNNAMED = "refused without the file's name"
FOREIGN = "foreign exception"
UNSEEN = "refused, but not by check"
ALARM = "accepted with equal values, but not by check"
CRASH_UNNAMED = "crash, file not named"
HANG = "hang"
WRONG = (DIFFERS, UNNAMED, FOREIGN, UNSEEN, ALARM, CRASH_UNNAMED, HANG)

_SEALED_ROWS = 7


@dataclass
class Judgement:
    """What reading and checking a mutant came to."""

    outcome: str
    done: str
    """How it was damaged."""
    said: list[str] = field(default_factory=list)


def prepare(folder: Path, names: list[str]) -> None:
    """Writes the files of these layouts, each in a folder of its own, and reads them as they are, so that
    processes that are forked from this one need not."""
    for name in names:
        LAYOUTS[name].build(folder / name)
        for path in sorted((folder / name).glob("*.h5")):
            _target(path)
        _truth(folder, name, (folder / name / fmt.MANIFEST_NAME).exists())
        _truth(folder, name, False)
        if problems := _check(folder / name, LAYOUTS[name]):
            raise AssertionError(f"{name}, undamaged: {problems}")


def outcome_of(templates: Path, place: Path, name: str, number: int) -> Judgement:
    """Makes the mutant of layout `name` with this number at `place`, and reads it."""
    rng, layout = random.Random(f"{name} {number}"), LAYOUTS[name]
    shutil.copytree(templates / name, place)
    damaged = _damage_text if layout.text else _damage_shard
    done, resealed = damaged(templates, name, place, rng)
    judgement = Judgement("", done)
    with_manifest = (place / fmt.MANIFEST_NAME).exists()
    seen = _train(place, layout, _truth(templates, name, with_manifest), judgement.said)
    problems = _check(place, layout)
    judgement.said += problems
    judgement.outcome = _outcome(seen, problems, layout, resealed)
    return judgement


def _outcome(seen: str, problems: list[str], layout: Layout, resealed: bool) -> str:
    text = "\n".join(problems)
    if "died of SIGXCPU" in text:
        return HANG
    if "ended with exit code" in text:
        return FOREIGN
    if "died of SIG" in text:
        return CRASH
    if seen in (AT_HEADER, AT_VALUES) and not problems and layout.text != INDEX_NAME:
        return UNSEEN  # `shard check` reads no index
    if seen == HARMLESS and problems:
        return ALARM
    if seen != DIFFERS:
        return seen
    return RESEALED if resealed else DIFFERS if layout.checked else LEGAL


# --- Damage.


def _damage_shard(templates: Path, name: str, place: Path, rng: random.Random) -> tuple[str, bool]:
    """Returns what was done, and whether the program's own checksums fit the damage."""
    checked = LAYOUTS[name].checked
    how = rng.choices(("as it is", "hdf5", "facts"), (5, 3, 2) if checked else (5, 5, 0))[0]
    if rng.random() < 0.5 or how == "facts":
        (place / fmt.MANIFEST_NAME).unlink(missing_ok=True)
    path = rng.choice(sorted(place.glob("*.h5")))
    targets = [_target(file) for file in _all_files(templates)]
    others = [target.raw for target in targets]
    raw, done = damage(_target(templates / name / path.name), rng, others, corrected=how != "as it is")
    path.write_bytes(raw)
    if how == "facts":
        _reseal(path)
        done += ", own checksums corrected"
    return f"{path.name}: {done}", how == "facts"


def _damage_text(templates: Path, name: str, place: Path, rng: random.Random) -> tuple[str, bool]:
    path = place / LAYOUTS[name].text
    text = path.read_bytes()
    if path.name == INDEX_NAME:
        return _damage_index(path, text, rng)
    if rng.random() < 0.4:
        path.write_bytes(change_bytes(text, rng))
        return "bytes of the manifest", False
    values = json.loads(text)
    for _ in range(rng.choice((1, 1, 2))):
        values = change_json(values, rng)
    corrected = isinstance(values, dict) and rng.random() < 0.7
    if corrected:
        values["digest"] = _digest(json.loads(json.dumps(values), parse_constant=lambda _: None))
    path.write_text(json.dumps(values))
    return f"values of the manifest{', digest corrected' if corrected else ''}", corrected


def _damage_index(path: Path, text: bytes, rng: random.Random) -> tuple[str, bool]:
    if rng.random() < 0.2:
        path.write_bytes(change_bytes(text, rng))
        return "bytes of the index", False
    head, body, _ = text.split(b"\n")
    values = json.loads(body)
    for _ in range(rng.choice((1, 1, 2))):  # what has other types is no index
        part = rng.choice(("files", "kinds"))
        values[part] = change_like(values[part], rng)
    if rng.random() < 0.2:
        values = change_json(values, rng)
    body = json.dumps(values).encode()
    corrected = rng.random() < 0.9
    if corrected:
        head = json.dumps({**json.loads(head), "digest": digest(body)}).encode()
    path.write_bytes(head + b"\n" + body + b"\n")
    return f"values of the index{', digest corrected' if corrected else ''}", corrected


@cache
def _target(path: Path) -> Target:
    raw = path.read_bytes()
    return Target(raw, metadata_of(path), structures_of(raw))


@cache
def _all_files(templates: Path) -> list[Path]:
    return sorted(
        path
        for name, layout in LAYOUTS.items()
        for path in (templates / name).glob("*.h5")
        if layout.text != INDEX_NAME
    )


def _reseal(path: Path) -> None:
    """Makes the program's own checksums and facts fit what HDF5 reads from a damaged shard, where it can.
    In a child: HDF5 may fail in it."""
    try:
        in_child(path, lambda: _write_facts(path))
    except DataError:
        return


def _write_facts(path: Path) -> None:
    # Whatever goes wrong, the mutant stays as far as it got. HDF5 may write into a file without an end.
    signal.alarm(10)
    try:
        with h5py.File(path, "r+", locking=False) as file:
            if fmt.ATTR_FACTS in file.attrs:
                _seal(file)
    except Exception:
        return


def _seal(file: h5py.File) -> None:
    datasets = {}
    for name in ("inputs", "targets"):
        array: Array = file[name][()]
        sums = checksums(array, _SEALED_ROWS)
        is_label = name == "targets" and array.dtype.kind == "i"
        counts = np.bincount(array, minlength=5) if is_label else None
        for group, values in ((fmt.CHECKSUMS, sums), (fmt.CLASS_COUNTS, counts)):
            if f"{group}/{name}" in file:
                del file[f"{group}/{name}"]
            if values is not None:
                file[f"{group}/{name}"] = values
        datasets[name] = fmt.DatasetFacts(
            shape=array.shape,
            dtype=array.dtype.newbyteorder("=").name,
            checksums=digest_of(sums),
            scale=0.5 if name == "inputs" else None,
            class_counts=None if counts is None else digest_of(counts),
        )
    text = encode(fmt.Facts(schema=fmt.SCHEMA_VERSION, checksum_rows=_SEALED_ROWS, datasets=datasets))
    file.attrs[fmt.ATTR_SCHEMA] = fmt.SCHEMA_VERSION
    file.attrs[fmt.ATTR_FACTS] = np.bytes_(text)
    file.attrs[fmt.ATTR_FACTS_DIGEST] = np.bytes_(digest(text))


# --- Reading.


def _config(folder: Path, layout: Layout, reading: str = "auto") -> DataConfig:
    return DataConfig(path=str(folder), reading=reading, **layout.data)  # type: ignore[arg-type]


def _train(folder: Path, layout: Layout, truth: list[Any], said: list[str]) -> str:
    seen: list[Any] = []
    try:
        _read(folder, layout, seen)
    except DataError as error:
        said.append(str(error))
        if f"{folder}/" not in str(error):
            return UNNAMED
        return AT_VALUES if seen else AT_HEADER
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
        return FOREIGN
    return HARMLESS if _same(seen, truth) else DIFFERS


@cache
def _truth(templates: Path, name: str, with_manifest: bool) -> list[Any]:
    seen: list[Any] = []
    folder = templates / name
    if not with_manifest and (folder / fmt.MANIFEST_NAME).exists():
        # Without the manifest no part but `train` is known.
        folder = templates / f"{name} alone"
        shutil.copytree(templates / name, folder, ignore=lambda *_: [fmt.MANIFEST_NAME])
    if LAYOUTS[name].text == fmt.MANIFEST_NAME and not with_manifest:
        return seen
    _read(folder, LAYOUTS[name], seen)
    return seen


def _read(folder: Path, layout: Layout, seen: list[Any]) -> None:
    """Everything that a training takes from a folder: headers, a summary of the values, an epoch of both
    readers, validation rows. What has been read is appended to `seen`."""
    data = _config(folder, layout)
    catalog = open_catalog(data)
    seen.append([(s.num_samples, s.class_counts, s.scale) for s in catalog.shards])
    seen.append(repr(catalog.sample.to_json()))
    surveys = survey(catalog.train, catalog.sample.fields)
    seen.append([(found.values.count, repr(found.values.total)) for found in surveys.values()])
    for reading in ("memory", "stream"):
        data = _config(folder, layout, reading)
        spans, known = deal(catalog.train, 1)[0], catalog.shards
        reader = make_reader(spans, data, 0, catalog.sample.fields, 1 << 40, None, known)
        try:
            while (batch := reader.next_batch(1000)) is not None:
                seen.append(batch)
        finally:
            reader.close()
    rows = Rows(catalog.validation, catalog.sample.fields, known=catalog.shards)
    seen.append(rows.read(0, len(rows)))
    rows.close()


def _same(read: list[Any], truth: list[Any]) -> bool:
    if len(read) != len(truth):
        return False
    for ours, theirs in zip(read, truth, strict=True):
        if isinstance(theirs, dict):
            if not isinstance(ours, dict) or ours.keys() != theirs.keys():
                return False
            if any(ours[name].tobytes() != theirs[name].tobytes() for name in theirs):
                return False
        elif ours != theirs:
            return False
    return True


def _check(folder: Path, layout: Layout) -> list[str]:
    places = places_of(_config(folder, layout))
    try:
        source = locate(str(folder), "PATH")
        shards = list(in_groups((*source.train, *source.validation), places))
    except DataError as error:
        return [str(error)]
    if not source.train:
        return ["nothing to train on"]
    reports = [report for _, report in check_shards(shards, places)]
    return [p for r in reports for p in (*r.problems, *r.unsupported, *r.unlike)]
