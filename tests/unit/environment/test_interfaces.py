"""The interfaces of this host, as the kernel lists them."""

from __future__ import annotations

import socket
from ipaddress import IPv4Interface

from hvd_train.environment.interfaces import Interface, interfaces


def test_the_loopback() -> None:
    (loopback,) = (i for i in interfaces() if i.name == "lo")
    assert loopback == Interface("lo", IPv4Interface("127.0.0.1/8"), up=True, loopback=True)
    assert str(loopback) == "lo (127.0.0.0/8)"


def test_only_interfaces_that_exist() -> None:
    names = [i.name for i in interfaces()]
    assert len(set(names)) == len(names)
    assert set(names) <= {name for _, name in socket.if_nameindex()}
