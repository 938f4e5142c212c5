"""Shards that a program adds rows to while they are read (SWMR): all ranks use the same rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from hvd_train.data.catalog import Shards
from hvd_train.data.format import ShardInfo
from hvd_train.errors import DataError, UnsupportedShard

_MOST_LINES = 3


def growing(shards: Shards) -> list[str]:
    """The paths of those that grow."""
    return [info.path for info in (*shards.train, *shards.validation) if info.growing]


def rows_of(shards: Shards, paths: Iterable[str]) -> dict[str, int]:
    """How many rows some of the shards have; 0 of those that were left out."""
    seen = {info.path: info.num_samples for info in (*shards.train, *shards.validation)}
    return {path: seen.get(path, 0) for path in paths}


def settled(shards: Shards, rows: Mapping[str, int]) -> Shards:
    """With these numbers of rows of shards that grow, and a line for each of them.

    Raises `DataError` where no row is left.
    """
    if not rows:
        return shards
    train, validation = (
        tuple(_limited(info, rows[info.path]) if info.path in rows else info for info in part)
        for part in (shards.train, shards.validation)
    )
    parts = [tuple(info for info in part if info.num_samples) for part in (train, validation)]
    if not parts[0]:
        raise DataError(f"{train[0].path}: no samples yet. Start the run when the program has written some.")
    lines = [_line(path, count) for path, count in list(rows.items())[:_MOST_LINES]]
    if len(rows) > _MOST_LINES:
        lines.append(f"{len(rows) - _MOST_LINES:,} more shards are being written, and used like that.")
    return replace(shards, train=parts[0], validation=parts[1], warnings=(*shards.warnings, *lines))


def refuse_growing(infos: Iterable[ShardInfo]) -> None:
    """Raises `UnsupportedShard` where a program adds rows to a shard: two ranks may see other rows."""
    for info in infos:
        if info.growing:
            names = ", ".join(map(repr, dict.fromkeys(f.place or name for name, f in info.fields.items())))
            raise UnsupportedShard(
                f"{info.path}: a program is writing it (SWMR). Expected a file that is complete: wait for "
                "that program, or copy the rows that are there now, with h5py, from `old = h5py.File(NAME, "
                f"'r', swmr=True)` to a new file, `new`: `for name in ({names},): new[name] = old[name]"
                f"[:{info.num_samples}]`."
            )


def _limited(info: ShardInfo, rows: int) -> ShardInfo:
    layouts = {
        name: replace(layout, shape=(rows, *layout.shape[1:])) for name, layout in info.layouts.items()
    }
    return replace(info, num_samples=rows, layouts=layouts, growing=True)


def _line(path: str, rows: int) -> str:
    return (
        f"{path}: a program is writing it (SWMR). The run uses the {rows:,} rows that it had when the run "
        "began; a resumed run uses those that it has then."
    )
