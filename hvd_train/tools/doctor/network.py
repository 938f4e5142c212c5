"""Which network interface an MPI over TCP may choose, and should."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hvd_train.environment.interfaces import Interface
from hvd_train.tools.doctor.check import Check

_LOCAL = re.compile(r"(docker|virbr|br-|veth|cni|flannel|podman|lxc|lxd|vmnet|vboxnet|cali|tun|tap)")
"""Names of interfaces that lead to containers and virtual machines of this host, or into a tunnel."""


def check(found: Sequence[Interface], mpi: str) -> Check:
    """What TCP has to choose from.

    Args:
        mpi: family and version of the MPI; decides whose options are named.
    """
    name = "interfaces"
    up = [i for i in found if i.up]
    inward = [i for i in up if _LOCAL.match(i.name)]
    outward = [i for i in up if not i.loopback and i not in inward]
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
    """The options of each launcher that name the interface to use."""
    gloo = f"horovodrun --gloo: `--network-interfaces {name}`"
    if mpi.startswith("Open MPI"):
        daemons = "--mca" if mpi.startswith("Open MPI 4") else "--prtemca"
        return f"`mpirun --mca btl_tcp_if_include {name} {daemons} oob_tcp_if_include {name}`; {gloo}"
    if mpi:
        return f"`mpirun -iface {name}`; {gloo}"
    return gloo
