"""`hvd_train shard`: write, describe and check shards. Imports neither torch nor MPI.

What reads and writes HDF5 is imported by the command that needs it, so that --help answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from hvd_train.config_values import require, require_usable
from hvd_train.errors import DataError, UserError
from hvd_train.io.output import warn

if TYPE_CHECKING:
    from hvd_train.data.locate import Found


def _require_length(length: int | None) -> None:
    """Raises `ConfigError` for a length of rows that none can have."""
    require(length is None or 1 <= length < 2**31, "--max-length", length, "at least 1 value")


@dataclass(frozen=True, kw_only=True)
class WriteArgs:
    """Write HDF5 shards, and the manifest beside them, from idx files, a .npz file or the digits."""

    sources: Annotated[Positional[tuple[str, ...]], arg(metavar="SOURCE...")]
    """An idx file of inputs and one of targets (plain or .gz), one .npz file, or the word `digits`."""

    out: str
    """Folder for the shards and their manifest.json; created if missing."""

    part: Literal["train", "validation"] = "train"
    """Which part of the data set the shards are; the manifest keeps both."""

    shards: int = 1
    """Number of files; usually one per rank."""

    by_class: bool = False
    """Split by contiguous ranges of classes instead of equal ranges of rows."""

    shuffle: bool = False
    """Shuffle the rows before they are split. Readers shuffle too, but only within a rank's shards."""

    seed: int = 0
    """Seed of --shuffle."""

    compression: Literal["none", "gzip"] = "none"
    """`gzip` makes smaller files that are slower to read."""

    chunk_rows: int | None = None
    """Rows of one HDF5 chunk. Default: contiguous, with gzip chunks of about 256 KiB."""

    inputs: str = "inputs"
    """Name of the array of inputs in a .npz file."""

    targets: str = "targets"
    """Name of the array of targets in a .npz file."""

    scale: float | None = None
    """Factor for integer inputs, recorded in the shards. Default: 1/255 for 8-bit images, 1/16 for digits."""

    force: bool = False
    """Replace shards that exist."""

    def __post_init__(self) -> None:
        require_usable(self, "--")
        require(self.out != "", "--out", self.out, "a folder")
        require(self.seed >= 0, "--seed", self.seed, "a seed of at least 0")
        require(self.scale != 0, "--scale", self.scale, "a factor other than 0")


@dataclass(frozen=True, kw_only=True)
class InfoArgs:
    """Describe shards: samples, shapes, layout, classes, values, and what looks wrong in the values."""

    paths: Annotated[Positional[tuple[str, ...]], arg(metavar="PATH...")]
    """Files, folders or glob patterns."""

    inputs: str = "inputs"
    """The dataset of inputs, or its place in the files: `table[x,y]`, `spectrum[100:900]`, `*/data`."""

    targets: str = "targets"
    """The dataset of targets, or its place in the files."""

    max_length: int | None = None
    """Values to which rows of any length are padded, as by data.max_length. The padding is not summarised."""

    all: bool = False
    """Summarise every row. Default: about 1 MiB of a dataset in each shard, 16 MiB in all of them."""

    json: bool = False
    """Print JSON instead of tables: one entry a shard, with the summary of its own values."""

    def __post_init__(self) -> None:
        _require_length(self.max_length)


@dataclass(frozen=True, kw_only=True)
class CheckArgs:
    """Read every row and compare it with the recorded checksums, counts and manifest; count values that are
    not finite. Exit code 1 if anything differs from what was written, or a training would refuse a shard."""

    paths: Annotated[Positional[tuple[str, ...]], arg(metavar="PATH...")]
    """Files, folders or glob patterns."""

    inputs: str = "inputs"
    """The dataset of inputs, or its place in the files: `table[x,y]`, `spectrum[100:900]`, `*/data`."""

    targets: str = "targets"
    """The dataset of targets, or its place in the files."""

    max_length: int | None = None
    """Values to which rows of any length are padded, as by data.max_length. Longer ones are reported."""

    def __post_init__(self) -> None:
        _require_length(self.max_length)


def main(argv: Sequence[str]) -> int:
    """Runs `shard` with the arguments after that word.

    Returns the exit code: 0, 1 for shards that `check` found damaged or that a training would refuse, 2 with
    a message on stderr for a request that cannot be carried out.
    """
    try:
        args: WriteArgs | InfoArgs | CheckArgs = tyro.extras.subcommand_cli_from_dict(
            {"write": WriteArgs, "info": InfoArgs, "check": CheckArgs},
            prog="python -m hvd_train shard",
            description="Write, describe and check HDF5 shards.",
            args=list(argv),
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        if isinstance(args, WriteArgs):
            return write(args)
        return info(args) if isinstance(args, InfoArgs) else check(args)
    except UserError as error:
        print(f"hvd_train: {error}", file=sys.stderr)
        return 2


def write(args: WriteArgs) -> int:
    """`shard write`. Raises `DataError` where a source cannot be read or a shard not be written."""
    from hvd_train.data.remarks import refusal_of
    from hvd_train.data.sources import load_source
    from hvd_train.data.writer import write_part

    arrays = load_source(args.sources, args.inputs, args.targets)
    if not 1 <= args.shards <= len(arrays.inputs):
        expected = f"expected 1 to {len(arrays.inputs)}, the number of samples"
        raise DataError(f"--shards {args.shards}: {expected}.")
    if args.scale is not None:
        arrays = replace(arrays, scale=args.scale)
    try:
        manifest = write_part(
            args.out,
            arrays,
            part=args.part,
            shards=args.shards,
            by_class=args.by_class,
            shuffle_seed=args.seed if args.shuffle else None,
            compression=args.compression,
            chunk_rows=args.chunk_rows,
            force=args.force,
        )
    except OSError as error:
        raise DataError(f"{args.out}: cannot be written: {error}. Give --out a folder that can be.") from None
    said = refusal_of(arrays.targets, args.targets, args.sources[-1])
    if said:
        warn(f"written, but the task `classification` would refuse it: {said}")
    for entry in manifest.train if args.part == "train" else manifest.validation:
        print(f"{os.path.join(args.out, entry.file)}: {entry.num_samples} samples")
    return 0


def info(args: InfoArgs) -> int:
    """`shard info`. Raises `DataError` for the first shard whose header cannot be read."""
    from hvd_train.data.places import plain
    from hvd_train.tools.shard_info import describe, show, show_json

    names = tuple(dict.fromkeys((args.inputs, args.targets)))
    layout = plain(names, args.max_length)
    described = [describe(parts, layout, whole=args.all) for parts in _sources(args.paths)]
    if args.json:
        show_json(described, names)
    else:
        show(args.paths, described, names)
    return 0


def check(args: CheckArgs) -> int:
    """`shard check`: 0 if every shard is what was written and can be read, 1 if not. Raises `DataError` where
    a path names no shards."""
    from hvd_train.data.check import check_shards
    from hvd_train.data.locate import in_groups
    from hvd_train.data.places import plain

    layout = plain(tuple(dict.fromkeys((args.inputs, args.targets))), args.max_length)
    num_wrong = 0
    for parts in _sources(args.paths):
        shards = [shard for found in parts.values() for shard in found]
        for shard, report in check_shards(list(in_groups(shards, layout)), layout):
            wrong = {
                "damaged": report.problems,
                "not supported": report.unsupported,
                "unlike the others": report.unlike,
            }
            for messages in wrong.values():
                for message in messages:
                    print(message, file=sys.stderr)
            state = next((state for state, messages in wrong.items() if messages), "good")
            num_wrong += state != "good"
            print("; ".join((f"{shard.path}: {state}", *report.remarks)))
    return 1 if num_wrong else 0


def _sources(paths: Sequence[str]) -> list[dict[str, tuple[Found, ...]]]:
    """Each path's shards by part; the part of shards without a manifest is not known, hence empty."""
    from hvd_train.data.locate import locate

    if not paths:
        raise DataError("no PATH was given. Expected files, folders or glob patterns.")
    sources = [locate(path, "PATH") for path in paths]
    return [
        {"": s.train} if s.manifest is None else {"train": s.train, "validation": s.validation}
        for s in sources
    ]
