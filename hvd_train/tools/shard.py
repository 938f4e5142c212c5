"""`hvd_train shard`: write, describe, check and index shards. Imports neither torch nor MPI.

What reads and writes HDF5 is imported by the command that needs it, so that --help answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional, arg

from hvd_train.config_values import require
from hvd_train.errors import DataError, UserError
from hvd_train.tools.shard_index import PROG, IndexArgs, index
from hvd_train.tools.shard_write import WriteArgs, write

if TYPE_CHECKING:
    from hvd_train.data.locate import Found


def _require_length(length: int | None) -> None:
    """Raises `ConfigError` for a length of rows that none can have."""
    require(length is None or 1 <= length < 2**31, "--max-length", length, "at least 1 value")


@dataclass(frozen=True, kw_only=True)
class InfoArgs:
    """Describe shards: samples, shapes, layout, classes, values, and what looks wrong in the values."""

    paths: Annotated[Positional[tuple[str, ...]], arg(metavar="PATH...")]
    """Files, folders or glob patterns."""

    inputs: str = "inputs"
    """The dataset of inputs, or its place in the files: `table[x,y]`, `spectrum[100:900]`, `*/data`."""

    targets: str = "targets"
    """The dataset of targets, or its place in the files."""

    follow_links: bool = False
    """Take datasets that links lead to in other files of the folder, and virtual datasets."""

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

    follow_links: bool = False
    """Take datasets that links lead to in other files of the folder, and virtual datasets."""

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
        args: WriteArgs | InfoArgs | CheckArgs | IndexArgs = tyro.extras.subcommand_cli_from_dict(
            {"write": WriteArgs, "info": InfoArgs, "check": CheckArgs, "index": IndexArgs},
            prog=PROG,
            description="Write, describe, check and index HDF5 shards.",
            args=list(argv),
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        if isinstance(args, WriteArgs):
            return write(args)
        if isinstance(args, IndexArgs):
            return index(args, list(argv)[1:])
        return info(args) if isinstance(args, InfoArgs) else check(args)
    except UserError as error:
        print(f"hvd_train: {error}", file=sys.stderr)
        return 2


def info(args: InfoArgs) -> int:
    """`shard info`. Raises `DataError` for the first shard whose header cannot be read."""
    from hvd_train.data.places import plain
    from hvd_train.tools.shard_info import describe, show, show_json

    names = tuple(dict.fromkeys((args.inputs, args.targets)))
    layout = plain(names, args.max_length, follow_links=args.follow_links)
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

    names = tuple(dict.fromkeys((args.inputs, args.targets)))
    layout = plain(names, args.max_length, follow_links=args.follow_links)
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
    sources = [locate(path, "PATH", files_only=True) for path in paths]
    return [
        {"": s.train} if s.manifest is None else {"train": s.train, "validation": s.validation}
        for s in sources
    ]
