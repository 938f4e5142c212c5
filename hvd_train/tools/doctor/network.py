"""Network interfaces: which of them an MPI over TCP may choose, and should."""

from __future__ import annotations

import fcntl
import re
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network

from hvd_train.tools.doctor.check import Check

_FLAGS, _ADDRESS, _MASK = 0x8913, 0x8915, 0x891B
"""SIOCGIFFLAGS, SIOCGIFADDR and SIOCGIFNETMASK of linux/sockios.h."""

_UP, _LOOPBACK = 0x1, 0x8

_LOCAL = re.compile(r"(docker|virbr|br-|veth|cni|flannel|podman|lxc|lxd|vmnet|vboxnet|cali|tun|tap)")
"""Names of interfaces that lead to containers and virtual machines of this host, or into a tunnel."""


@dataclass(frozen=True)
class Interface:
    """One interface that has an address."""

    name: str
    network: str
    """IPv4, with the length of its prefix: the same on all hosts of it."""
    up: bool
    loopback: bool

    @property
    def local(self) -> bool:
        """Whether it leads to no other host."""
        return self.loopback or _LOCAL.match(self.name) is not None

    def __str__(self) -> str:
        return f"{self.name} ({self.network})"


def interfaces() -> list[Interface]:
    """Those of this host, or container, that have an IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:

        def request(code: int, name: str) -> bytes:
            return fcntl.ioctl(asked, code, struct.pack("256s", name.encode()[:15]))

        found = []
        for _, name in socket.if_nameindex():
            try:
                address, mask = (socket.inet_ntoa(request(c, name)[20:24]) for c in (_ADDRESS, _MASK))
                (flags,) = struct.unpack("H", request(_FLAGS, name)[16:18])
            except OSError:  # it has no address
                continue
            network = str(IPv4Network(f"{address}/{mask}", strict=False))
            found.append(Interface(name, network, bool(flags & _UP), bool(flags & _LOOPBACK)))
    return found


def judge(found: Sequence[Interface], mpi: str) -> Check:
    """What TCP has to choose from.

    Args:
        mpi: family and version of the MPI; decides whose options are named.
    """
    name = "interfaces"
    up = [i for i in found if i.up]
    outward = [i for i in up if not i.local]
    inward = [i for i in up if i.local and not i.loopback]
    if not outward:
        seen = f"none leads to another host: {_list(up) or 'none has an address'}"
        return Check(name=name, seen=f"{seen}; ranks on this host alone do not need one")
    best = outward[0].name
    if inward:
        seen = f"{_list(outward)}; but also {_list(inward)}, which other hosts have too or cannot reach"
        remedy = f"MPI over TCP may choose these. On several hosts name the right one: {_options(mpi, best)}."
        return Check(name=name, status="warning", seen=seen, remedy=remedy)
    if len(outward) > 1:
        return Check(name=name, seen=f"{_list(outward)}; to have TCP use one of them: {_options(mpi, best)}")
    return Check(name=name, seen=_list(outward))


def _list(found: Sequence[Interface]) -> str:
    return ", ".join(map(str, found))


def _options(mpi: str, name: str) -> str:
    """How each launcher is told which interface to use."""
    gloo = f"horovodrun --gloo: `--network-interfaces {name}`"
    if mpi.startswith("Open MPI"):
        daemons = "--mca" if mpi.startswith("Open MPI 4") else "--prtemca"
        return f"`mpirun --mca btl_tcp_if_include {name} {daemons} oob_tcp_if_include {name}`; {gloo}"
    if mpi:
        return f"`mpirun -iface {name}`; {gloo}"
    return gloo
