"""The network interfaces of this host."""

from __future__ import annotations

import fcntl
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Interface

_FLAGS, _ADDRESS, _MASK = 0x8913, 0x8915, 0x891B
"""SIOCGIFFLAGS, SIOCGIFADDR and SIOCGIFNETMASK of linux/sockios.h."""

_UP, _LOOPBACK = 0x1, 0x8


@dataclass(frozen=True)
class Interface:
    """One interface that has an address."""

    name: str
    address: IPv4Interface
    """The first, with the mask of its network."""
    up: bool
    loopback: bool

    def __str__(self) -> str:
        return f"{self.name} ({self.address.network})"


def interfaces() -> list[Interface]:
    """Those of this host, or container, that have an IPv4 address."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                flags, address, mask = (fcntl.ioctl(asked, c, request) for c in (_FLAGS, _ADDRESS, _MASK))
            except OSError:  # it has no address
                continue
            (bits,) = struct.unpack("H", flags[16:18])
            at = f"{socket.inet_ntoa(address[20:24])}/{socket.inet_ntoa(mask[20:24])}"
            found.append(Interface(name, IPv4Interface(at), bool(bits & _UP), bool(bits & _LOOPBACK)))
    return found
