"""Which network leads to another host, by this host's own routes. Sends nothing."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B
_ANY_PORT = 9


@dataclass(frozen=True)
class Interface:
    """One interface of this host."""

    name: str
    network: str
    """Address and prefix length (`10.1.0.0/16`) where the other host is in the same network; else empty. On
    hosts whose interfaces have other names it still means the same."""


def leading_to_others(hosts: Iterable[str]) -> Interface | None:
    """The interface on the way to the first of `hosts` that is another host than this one; None if there is
    none, or it cannot be told. Without it an MPI may take one that no other host can reach, such as docker0.

    Asks for the addresses of the hosts, which takes seconds where the name service does not answer.
    """
    for host in hosts:
        local, remote = _route(host)
        if remote and not _is_here(local, remote):
            return _interface_of(local, remote)
    return None


def is_this_host(host: str) -> bool:
    """Whether a name means this host; no where it cannot be told."""
    local, remote = _route(host)
    return bool(remote) and _is_here(local, remote)


def _is_here(local: str, remote: str) -> bool:
    return local == remote or ipaddress.ip_address(remote).is_loopback


def _route(host: str) -> tuple[str, str]:
    """This host's address on the way to `host`, and that one's address; empty where there is no way."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        any_socket.connect((host, _ANY_PORT))  # binds the address, and sends nothing
        return any_socket.getsockname()[0], any_socket.getpeername()[0]
    return "", ""


def _interface_of(local: str, remote: str) -> Interface | None:
    for name, address, mask in _interfaces():
        if address == local:
            network = ipaddress.ip_network(f"{address}/{mask}", strict=False)
            return Interface(name, str(network) if ipaddress.ip_address(remote) in network else "")
    return None


def _interfaces() -> Iterator[tuple[str, str, str]]:
    """Name, IPv4 address and mask of each interface that has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            with contextlib.suppress(OSError):
                answers = [
                    fcntl.ioctl(any_socket, c, request)[20:24] for c in (_SIOCGIFADDR, _SIOCGIFNETMASK)
                ]
                yield name, socket.inet_ntoa(answers[0]), socket.inet_ntoa(answers[1])
