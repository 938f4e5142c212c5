"""Damaged shards: how they are made, and what reading and checking them comes to."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hvd_train.config import DataConfig
from hvd_train.data import format as fmt
from hvd_train.data import shard_file
from hvd_train.data.blocks import checksums
from hvd_train.data.catalog import open_catalog
from hvd_train.data.check import check_shards
from hvd_train.data.crash import in_child
from hvd_train.data.deal import deal
from hvd_train.data.facts import digest, digest_of, encode
from hvd_train.data.format import Array
from hvd_train.data.locate import locate
from hvd_train.data.places import plain
from hvd_train.data.reader import make_reader
from hvd_train.data.rows import Rows
from hvd_train.data.sources import Arrays
from hvd_train.data.writer import write_part
from hvd_train.errors import DataError
from tests.launching import ROOT

NAMES = ("inputs", "targets")
SHARD = "train-00000-of-00001.h5"
OLD = ROOT / "tests" / "fixtures" / "shards-schema-1"

HARMLESS = "harmless: same values"
REFUSED = "refused, and found by check"
OTHER_VALUES = "other values, legal as the checksums fit"
RIGHT = frozenset({HARMLESS, REFUSED, OTHER_VALUES})

ROWS = 30


def prepare(folder: Path) -> None:
    """Writes the shards that are to be damaged: each layout, and foreign files for `corrected`."""
    random = np.random.default_rng(0)
    numbers = random.normal(size=(ROWS, 4)).astype(np.float32)
    images = random.integers(0, 256, (ROWS, 3, 3)).astype(np.uint8)
    labels = np.arange(ROWS) % 5
    whole, shard_file.CHECKSUM_BYTES = shard_file.CHECKSUM_BYTES, 200
    try:
        write_part(folder / "contiguous", Arrays(numbers, labels))
        write_part(folder / "images", Arrays(images, labels, 1 / 255), part="train")
        write_part(folder / "images", Arrays(images[:9], labels[:9], 1 / 255), part="validation")
        write_part(folder / "chunked", Arrays(numbers, numbers[:, 0].copy()), chunk_rows=7)
        write_part(folder / "gzip", Arrays(images, labels, 1 / 255), compression="gzip", chunk_rows=7)
    finally:
        shard_file.CHECKSUM_BYTES = whole
    for name, options in (("foreign-old", {}), ("foreign-new", {"libver": ("v108", "v108")})):
        (folder / name).mkdir()
        with h5py.File(folder / name / SHARD, "w", **options) as file:
            file.create_dataset("inputs", data=numbers, chunks=(7, 4), compression="gzip", shuffle=True)
            file.create_dataset("targets", data=labels)
    (folder / "schema-1").mkdir()
    shutil.copy(OLD / "train-00000-of-00002.h5", folder / "schema-1" / SHARD)


CHECKED = ("contiguous", "images", "chunked", "gzip")
UNCHECKED = ("foreign-old", "foreign-new", "schema-1")
"""Without checksums of ours that cover everything: other values are legal."""


def outcome_of(templates: Path, place: Path, index: int, seed: int, corrected: bool) -> tuple[str, str]:
    """Makes a mutant at `place` and reads it; returns the outcome, and a line about it."""
    rng = random.Random(f"{seed} {index} {corrected}")
    name = rng.choice(CHECKED + UNCHECKED if corrected else CHECKED)
    template = templates / name
    shutil.copytree(template, place)
    if rng.random() < 0.5 or corrected:
        (place / fmt.MANIFEST_NAME).unlink(missing_ok=True)
    victim = rng.choice(sorted(path.name for path in place.iterdir()) + [SHARD] * 4)
    path = place / victim
    done = _damage(path, rng, _structures(template / victim) if corrected else ())
    if corrected and victim.endswith(".h5"):
        _correct(path)
    detail = f"{name}, {victim}: {done}"
    seen, said = _train(place, template)
    problems = _check(place)
    if any("ended with exit code" in problem for problem in problems):
        return "foreign exception in check", f"{detail}: {problems}"
    if any("died of" in problem for problem in problems):
        return "crash in check, file named", f"{detail}: {problems}"
    return _outcome(seen, bool(problems), corrected), f"{detail}: {said} {problems}"


def _outcome(seen: str, found: bool, legal: bool) -> str:
    if seen == "refused":
        return REFUSED if found else "refused, but check says good"
    if seen == "same":
        return HARMLESS if not found else "same values, but check says damaged"
    if seen == "other":
        if legal:
            return OTHER_VALUES
        return "other values accepted, found by check" if found else "other values accepted, called good"
    return "foreign exception"


def _train(folder: Path, template: Path) -> tuple[str, str]:
    try:
        read = _read(folder)
    except DataError as error:
        return "refused", str(error)
    except Exception as error:
        return "foreign", f"{type(error).__name__}: {error}"
    # Without the manifest no part but `train` is known.
    return ("same" if _same(read, _truth(template, (folder / fmt.MANIFEST_NAME).exists())) else "other"), ""


@cache
def _truth(template: Path, with_manifest: bool) -> list[Any]:
    if with_manifest:
        return _read(template)
    alone = template.with_name(f"{template.name}-alone")
    shutil.copytree(template, alone, ignore=lambda *_: [fmt.MANIFEST_NAME], dirs_exist_ok=True)
    return _read(alone)


def _read(folder: Path) -> list[Any]:
    """Everything that a training takes from a folder: facts, batches of both readers, validation rows."""
    seen: list[Any] = []
    for reading in ("memory", "stream"):
        data = DataConfig(path=str(folder), reading=reading)  # type: ignore[arg-type]
        catalog = open_catalog(data)
        reader = make_reader(deal(catalog.train, 1)[0], data, 0, catalog.sample.fields, 1 << 40)
        try:
            while (batch := reader.next_batch(1000)) is not None:
                seen.append(batch)
        finally:
            reader.close()
    rows = Rows(catalog.validation, catalog.sample.fields)
    seen += [rows.read(0, len(rows)), repr(catalog.sample.to_json())]
    rows.close()
    return [*seen, *((s.num_samples, s.class_counts, s.scale) for s in catalog.shards)]


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


def _check(folder: Path) -> list[str]:
    try:
        source = locate(str(folder), "PATH")
    except DataError as error:
        return [str(error)]
    shards = (*source.train, *source.validation)
    reports = [report for _, report in check_shards(shards, plain(NAMES))]
    return [p for r in reports for p in (*r.problems, *r.unsupported, *r.unlike)]


# --- Damage.


def _damage(path: Path, rng: random.Random, structures: tuple[Structure, ...]) -> str:
    """Changes a file; the HDF5 checksums of `structures` are made to fit. Returns what was done."""
    raw = bytearray(path.read_bytes())
    done = []
    # Most offsets lie within what HDF5 or the program keeps of the file; `structures` are all of that.
    places = [range(s.start, s.stop) for s in structures] or [range(len(raw))]
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5))):
        operation = rng.choice(_CHANGES if structures and rng.random() < 0.9 else _CHANGES + _CUTS)
        place = rng.choice(places) if rng.random() < 0.7 else range(len(raw))
        at = rng.choice(place) if len(raw) > place.stop else rng.randrange(max(1, len(raw)))
        operation(raw, at, rng)
        done.append(f"{operation.__name__[1:]} at {at}")
    for structure in structures:
        structure.correct(raw)
    path.write_bytes(raw)
    return ", ".join(done)


def _bit(raw: bytearray, at: int, rng: random.Random) -> None:
    raw[at : at + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in raw[at : at + 1])


def _bytes(raw: bytearray, at: int, rng: random.Random) -> None:
    stop = min(at + rng.choice((1, 1, 2, 4, 8, 16)), len(raw))
    raw[at:stop] = rng.randbytes(stop - at)


def _run(raw: bytearray, at: int, rng: random.Random) -> None:
    stop = min(at + rng.choice((4, 16, 64, 512, 4096)), len(raw))
    raw[at:stop] = rng.choice((b"\0", b"\xff")) * (stop - at)


def _number(raw: bytearray, at: int, rng: random.Random) -> None:
    size, kind = rng.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
    if at + size <= len(raw):
        (value,) = struct.unpack_from(f"<{kind}", raw, at)
        value += rng.choice((1, -1, 2, 256, 1 << (8 * size - 1), 1 << (4 * size)))
        struct.pack_into(f"<{kind}", raw, at, value % (1 << 8 * size))


def _copy(raw: bytearray, at: int, rng: random.Random) -> None:
    stop = min(at + rng.choice((4, 8, 40, 200)), len(raw))
    source = rng.randrange(max(1, len(raw) - (stop - at)))
    raw[at:stop] = raw[source : source + stop - at]


def _swap(raw: bytearray, at: int, rng: random.Random) -> None:
    size = min(rng.choice((1, 8, 20, 100)), len(raw) - at)
    other = rng.randrange(max(1, len(raw) - size))
    if abs(other - at) >= size:
        raw[at : at + size], raw[other : other + size] = raw[other : other + size], raw[at : at + size]


def _cut(raw: bytearray, at: int, rng: random.Random) -> None:
    del raw[at:]


def _delete(raw: bytearray, at: int, rng: random.Random) -> None:
    del raw[at : at + rng.choice((1, 8, 64))]


def _insert(raw: bytearray, at: int, rng: random.Random) -> None:
    raw[at:at] = rng.randbytes(rng.choice((1, 8, 64)))


_CHANGES: list[Callable[[bytearray, int, random.Random], None]] = [
    _bit,
    _bit,
    _bytes,
    _run,
    _number,
    _copy,
    _swap,
]
_CUTS: list[Callable[[bytearray, int, random.Random], None]] = [_cut, _delete, _insert]


# --- Checksums that fit the damage.


@dataclass(frozen=True)
class Structure:
    """A part of an HDF5 file. Its checksum, if it has one, is in the four bytes from `stop` on."""

    start: int
    stop: int
    has_checksum: bool

    def correct(self, raw: bytearray) -> None:
        if self.has_checksum and self.stop + 4 <= len(raw):
            struct.pack_into("<I", raw, self.stop, _lookup3(bytes(raw[self.start : self.stop])))


@cache
def _structures(path: Path) -> tuple[Structure, ...]:
    """The headers in an undamaged file, found by their signatures."""
    return tuple(_find_structures(path.read_bytes()))


def _find_structures(raw: bytes) -> Iterator[Structure]:
    for start in _all(raw, b"\x89HDF"):
        yield (
            Structure(start, start + 44, True) if raw[start + 8] >= 2 else Structure(start, start + 96, False)
        )
    for start in _all(raw, b"OHDR"):
        flags = raw[start + 5]
        size_at = start + 6 + 16 * bool(flags & 0x20) + 4 * bool(flags & 0x10)
        size_bytes = 1 << (flags & 3)
        size = int.from_bytes(raw[size_at : size_at + size_bytes], "little")
        yield Structure(start, size_at + size_bytes + size, True)
    for signature in (b"TREE", b"HEAP", b"SNOD", b"GCOL"):
        for start in _all(raw, signature):
            yield Structure(start, min(start + 120, len(raw)), False)


def _all(raw: bytes, signature: bytes) -> Iterator[int]:
    start = raw.find(signature)
    while start >= 0:
        yield start
        start = raw.find(signature, start + 1)


def _lookup3(data: bytes) -> int:
    """The checksum of HDF5's metadata: `hashlittle` of Bob Jenkins' lookup3.c, with seed 0."""
    mask = 0xFFFFFFFF

    def rotated(x: int, k: int) -> int:
        return ((x << k) | (x >> (32 - k))) & mask

    a = b = c = (0xDEADBEEF + len(data)) & mask
    while len(data) > 12:
        x, y, z = struct.unpack_from("<III", data)
        a, b, c = (a + x) & mask, (b + y) & mask, (c + z) & mask
        for k in (4, 6, 8, 16, 19, 4):
            # (a, b, c) takes the next role in turn: a -= c; a ^= rot(c, k); c += b
            a = ((a - c) & mask) ^ rotated(c, k)
            c = (c + b) & mask
            a, b, c = b, c, a
        data = data[12:]
    if not data:
        return c
    x, y, z = struct.unpack("<III", data.ljust(12, b"\0"))
    a, b, c = (a + x) & mask, (b + y) & mask, (c + z) & mask
    for k in (14, 11, 25, 16, 4, 14, 24):
        # c ^= b; c -= rot(b, k), likewise
        c = ((c ^ b) - rotated(b, k)) & mask
        a, b, c = b, c, a
    return b


def _correct(path: Path) -> None:
    """Makes the program's own checksums and facts fit what HDF5 reads from a damaged shard, where it can.
    In a child: HDF5 may fail in it."""
    with contextlib.suppress(DataError):
        in_child(path, lambda: _write_facts(path))


def _write_facts(path: Path) -> None:
    # Whatever goes wrong, the mutant stays as far as it got. HDF5 may write into a file without an end.
    signal.alarm(10)
    with contextlib.suppress(Exception), h5py.File(path, "r+", locking=False) as file:
        if fmt.ATTR_FACTS not in file.attrs:
            return
        rows, datasets = 7, {}
        for name in NAMES:
            array: Array = file[name][()]
            sums = checksums(array, rows)
            counts = (
                np.bincount(array, minlength=5) if name == "targets" and array.dtype.kind == "i" else None
            )
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
        text = encode(fmt.Facts(schema=fmt.SCHEMA_VERSION, checksum_rows=rows, datasets=datasets))
        file.attrs[fmt.ATTR_SCHEMA] = fmt.SCHEMA_VERSION
        file.attrs[fmt.ATTR_FACTS] = np.bytes_(text)
        file.attrs[fmt.ATTR_FACTS_DIGEST] = np.bytes_(digest(text))
