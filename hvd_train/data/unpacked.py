"""What reading shards does to values that are packed or marked as missing, in lines."""

from __future__ import annotations

from collections.abc import Sequence

from hvd_train.data.format import ShardInfo

_MOST_LINES = 3


def unpacked_lines(infos: Sequence[ShardInfo], most: int = _MOST_LINES) -> list[str]:
    """Each thing that is done, with the first shard to which it is done and the number of others; at most
    `most` lines, and then how many more there are. Empty if nothing is done."""
    shards: dict[str, list[str]] = {}
    for info in infos:
        for what in info.unpacked:
            shards.setdefault(what, []).append(info.path)
    lines = []
    for what, paths in list(shards.items())[:most]:
        others = f" and {len(paths) - 1:,} more" if len(paths) > 1 else ""
        lines.append(f"{paths[0]}{others}: {what}")
    if len(shards) > most:
        lines.append(f"{len(shards) - most:,} more such lines, which `hvd_train shard info` prints.")
    return lines
