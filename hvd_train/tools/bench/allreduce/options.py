"""The options of `hvd_train bench allreduce`. Imports neither torch nor MPI."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from hvd_train.config_values import require_usable
from hvd_train.errors import ConfigError

BACKENDS = ("ring", "mpi", "horovod", "gloo")

ITEM_BYTES = 4
"""Bytes of an element: everything is float32."""

_UNITS = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time one average of float32 by each backend, and compare it with the limit of memory and network.

    Start it by mpirun, horovodrun or srun, on at least 2 ranks. benchmarks/README.md explains the columns."""

    sizes: Annotated[str, arg(metavar="SIZE,...")] = "64B,4MiB,100MiB"
    """Bytes of each rank's buffer, with a unit: B, KiB, MiB, GiB, kB, MB or GB."""

    backends: Annotated[str, arg(metavar="NAME,...")] = ""
    """Backends to measure: ring, mpi, horovod, gloo. Default: all that this job can use."""

    repeat: Annotated[int, arg(metavar="N")] = 20
    """Timed calls for each backend and size, with cold and with warm caches, after one warm-up call."""

    wire: Literal["float32", "bfloat16", "float16", "int8"] = "float32"
    """Type of the elements that the ring sends between hosts."""

    wire_rate: Annotated[float | None, arg(metavar="BITS_PER_S")] = None
    """Bandwidth of a host in each direction, in bits per second. If given, it is part of the limit."""

    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self) -> None:
        require_usable(self, "--")
        unknown = [name for name in self.named_backends if name not in BACKENDS]
        if unknown:
            raise ConfigError(f"--backends {self.backends}: expected names of {', '.join(BACKENDS)}.")
        if self.repeat < 1:
            raise ConfigError(f"--repeat {self.repeat}: expected at least 1 call.")
        if self.wire_rate is not None and not 0 < self.wire_rate < float("inf"):
            raise ConfigError(f"--wire-rate {self.wire_rate:g}: expected bits per second, such as 1e9.")
        if not self.num_bytes:
            raise ConfigError("--sizes: expected at least one size, such as 4MiB.")

    @property
    def num_bytes(self) -> tuple[int, ...]:
        """The sizes, each once. Raises `ConfigError` for text that is none."""
        return tuple(dict.fromkeys(parse_size(text) for text in _words(self.sizes)))

    @property
    def named_backends(self) -> tuple[str, ...]:
        """What --backends names, each once."""
        return tuple(dict.fromkeys(_words(self.backends)))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def parse_size(text: str) -> int:
    """Bytes, of text such as `4MiB`. Raises `ConfigError` for other text, or parts of elements."""
    found = re.fullmatch(r"(\d+) ?([a-zA-Z]*)", text)
    if found is None or found[2] not in _UNITS:
        units = ", ".join(filter(None, _UNITS))
        raise ConfigError(f"--sizes: {text!r} is not a size. Expected a whole number and a unit of {units}.")
    num_bytes = int(found[1]) * _UNITS[found[2]]
    if num_bytes == 0 or num_bytes % ITEM_BYTES:
        raise ConfigError(f"--sizes: {text}: expected whole float32 elements, of {ITEM_BYTES} bytes each.")
    return num_bytes


def size_name(num_bytes: int) -> str:
    """`100 MiB`: in the largest unit that divides it."""
    binary = ("GiB", "MiB", "KiB", "B")
    unit = next(unit for unit in binary if num_bytes % _UNITS[unit] == 0)
    return f"{num_bytes // _UNITS[unit]} {unit}"
