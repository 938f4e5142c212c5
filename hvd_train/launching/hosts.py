"""Which hosts a job runs on and how many ranks each takes: the value of --hosts, or a host file in the
syntax of any launcher.

    node1 slots=2      Open MPI, horovodrun
    node1:2            MPICH, Intel MPI, and each entry of --hosts
    node1              one rank

The launchers themselves never see the file: they get the hosts on their command line, since no syntax is
read by all of them (horovodrun's reader fails on a comment).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hvd_train.errors import ConfigError
from hvd_train.io.text import read_text

MOST_SLOTS = 1_000_000
"""More than any cluster has cores."""

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_EXPECTED = "Expected `node1`, `node1:2` or `node1 slots=2`"


@dataclass(frozen=True)
class Host:
    """A host by its name or IPv4 address, and how many ranks it takes, at least 1."""

    name: str
    slots: int

    def __str__(self) -> str:
        return f"{self.name}:{self.slots}"


def parse_hosts(text: str) -> list[Host]:
    """The hosts of `h1:2,h2:2`, each once, in the order of their first mention: the slots of one that is
    named again are added up. Raises `ConfigError`."""
    return _each_once(_parse_host(entry.strip(), f"--hosts {text}") for entry in text.split(","))


def read_hostfile(path: str | Path) -> list[Host]:
    """The hosts of a file with one in a line, as `parse_hosts` gives them. Comments begin with `#`.

    Raises `ConfigError` with the file, and with the line that cannot be read.
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot read the hosts: {error}. Give --hostfile a file of hosts."
        ) from None
    stripped = [(number, line.partition("#")[0].strip()) for number, line in enumerate(lines, 1)]
    hosts = _each_once(_parse_host(line, f"{path}, line {number}") for number, line in stripped if line)
    if not hosts:
        raise ConfigError(f"{path}: names no host. {_EXPECTED}, one host in a line.")
    return hosts


def _parse_host(entry: str, where: str) -> Host:
    name_and_count, *options = entry.split() or [""]
    name, colon, count = name_and_count.partition(":")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: {name_and_count!r} names no host. {_EXPECTED}.")
    slots = _count(count, where) if colon else None
    most = None
    for option in options:
        key, _, value = option.partition("=")
        if key == "slots" and slots is None:
            slots = _count(value, where)
        elif key in ("max_slots", "max-slots") and most is None:
            most = _count(value, where)
        else:
            raise ConfigError(f"{where}: {option!r} is not understood. {_EXPECTED}.")
    slots = slots or 1
    if most is not None and most < slots:
        raise ConfigError(f"{where}: {slots} slots, but at most {most}. Raise max_slots, or leave it out.")
    return Host(name, slots)


def _count(text: str, where: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:20]) <= MOST_SLOTS:
        raise ConfigError(f"{where}: {text!r} is no number of ranks. {_EXPECTED}.")
    return int(text)


def _each_once(hosts: Iterable[Host]) -> list[Host]:
    slots: dict[str, int] = {}
    for host in hosts:
        slots[host.name] = slots.get(host.name, 0) + host.slots
    return [Host(name, count) for name, count in slots.items()]
