"""Which network leads to another host, by this host's own routes. Sends nothing."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from hvd_train.environment.interfaces import interfaces

_ANY_PORT = 9


@dataclass(frozen=True)
class Way:
    """How another host is reached."""

    interface: str
    """By its name on this host."""
    network: str
    """Its address and prefix length (`10.1.0.0/16`) where the other host is in it too: that means the same on
    hosts whose interfaces have other names. Else the interface."""


def leading_to_others(hosts: Iterable[str]) -> Way | None:
    """The way to the first of `hosts` that is another host than this one; None if there is
    none, or if it is unknown. Without it an MPI may take one that no other host can reach, such as docker0.

    Asks for the addresses of the hosts, which takes seconds where the name service does not answer.
    """
    for host in hosts:
        local, remote = _route(host)
        if remote and not _is_here(local, remote):
            return _way(local, remote)
    return None


def is_this_host(host: str) -> bool:
    """Whether a name means this host; False if that is unknown."""
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


def _way(local: str, remote: str) -> Way | None:
    for interface in interfaces():
        if str(interface.address.ip) == local:
            network = interface.address.network
            same = ipaddress.ip_address(remote) in network
            return Way(interface.name, str(network) if same else interface.name)
    return None
