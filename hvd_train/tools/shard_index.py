"""`hvd_train shard index`: writes the headers of the files of a folder into one file. Loads neither torch nor
MPI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from hvd_train.config import DataConfig
from hvd_train.config_file import load_config
from hvd_train.io.text import counted

_LISTED = 3
PROG = "python -m hvd_train shard"


@dataclass(frozen=True, kw_only=True)
class IndexArgs:
    """Write the headers of many files into one, so that a training opens none of them for its header. Give
    the data options of the training, or its --config: an index of other fields is not used."""

    paths: Annotated[Positional[tuple[str, ...]], arg(metavar="PATH...")] = ()
    """Folders, files or glob patterns; an index is written into each folder of these files. Default: those of
    data.path and data.validation."""

    config: str = ""
    """A configuration, whose [data] is taken; options take precedence."""

    data: DataConfig = field(default_factory=DataConfig)
    """The data options."""


def index(args: IndexArgs, argv: Sequence[str]) -> int:
    """`shard index`. `argv`: what `args` was parsed from. Raises `DataError` for the first file whose header
    cannot be read, and where an index cannot be written."""
    from hvd_train.data.indexing import write_indexes
    from hvd_train.data.locate import locate
    from hvd_train.data.places import places_of

    if args.config:
        base = replace(args, data=load_config(args.config).data)
        args = tyro.cli(IndexArgs, prog=f"{PROG} index", args=list(argv), default=base)
    data = args.data
    paths = args.paths or tuple(
        path for path in (data.path, data.validation) if isinstance(path, str) and path
    )
    sources = [locate(path, "PATH", files_only=True) for path in paths]
    found = {file.path: file for source in sources for file in (*source.train, *source.validation)}
    for written in write_indexes(list(found.values()), places_of(data)):
        print(f"{written.path}: the headers of {counted(written.num_files, 'file')}")
        for line in written.left_out[:_LISTED]:
            print(f"left out: {line}")
        if len(written.left_out) > _LISTED:
            print(f"left out: {len(written.left_out) - _LISTED:,} more")
    return 0
