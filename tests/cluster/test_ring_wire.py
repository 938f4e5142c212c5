"""What the ring sends between hosts, and what of the values arrives."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import ceil
from typing import Any

import pytest

from hvd_train.comm.buffer import slice_bounds
from tests.cluster.hosts import Hosts, mpirun
from tests.cluster.ring_wire_job import LARGEST

pytestmark = pytest.mark.cluster

NUMEL = 2 << 20
"""8 MiB of float32, which hosts can share evenly."""

LAYOUTS = [(2, 2), (1, 1, 1, 1), (3, 1)]

BLOCK = 256
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
HOP_ERROR = {"float32": 0.0, "bfloat16": 2**-8, "float16": 2**-11, "int8": (1 + 2**-15) / 254}
"""Of the largest value, as in the table of docs/ring.md."""

OVERHEAD = 1.06
"""Bytes of the frames that carry the payload over the payload, at most: of 1514 bytes in a frame 1448 are
TCP's stream, and MPI's own headers are in that."""

ACKNOWLEDGEMENTS = 66 / (2 * 1448)
"""Of what a host receives: TCP answers every second full frame by an empty one, or fewer."""

ROUNDINGS = 8 * 2**-24
"""What sums of some values below 1 lose in float32."""


def payload(wire: str, slots: Sequence[int]) -> int:
    """Bytes that a host must send: in each of 2 (h - 1) steps the part of a host, cut among the channels."""
    hosts, channels = len(slots), max(slots)
    part = NUMEL // hosts
    slices = [slice_bounds(part, channels, channel) for channel in range(channels)]
    scales = sum(ceil((end - begin) / BLOCK) for begin, end in slices) if wire == "int8" else 0
    return 2 * (hosts - 1) * (part * ELEMENT_BYTES[wire] + 4 * scales)


def by_host(values: Sequence[int], hosts: Sequence[str]) -> dict[str, list[int]]:
    """Of values by rank, those of each host."""
    return {
        host: [v for v, of in zip(values, hosts, strict=True) if of == host] for host in sorted(set(hosts))
    }


def check(wire: str, found: dict[str, Any], slots: Sequence[int]) -> None:
    sent = payload(wire, slots)
    payloads = by_host(found["payload"], found["host"])
    assert [len(ranks) for ranks in payloads.values()] == list(slots)
    assert [sum(ranks) for ranks in payloads.values()] == [sent] * len(slots), wire
    for host, ranks in by_host(found["eth0"], found["host"]).items():
        received = sent  # in each step a host receives a part as large as the one that it sends
        assert sent < max(ranks) <= OVERHEAD * sent + ACKNOWLEDGEMENTS * received, (wire, host)
    if len(set(slots)) == 1:
        assert len(set(found["payload"])) == 1, f"{wire}: not all ranks send as much"
    assert max(found["lo"]) < 0.001 * sent, wire
    assert max(found["error"]) <= len(slots) * LARGEST * HOP_ERROR[wire] + ROUNDINGS, wire
    assert len(set(found["digest"])) == 1, wire


@pytest.fixture
def calm_hosts(hosts: Hosts) -> Iterator[Hosts]:
    """A link without a limit, or with a high one, is faster than the kernel's queues, which then lose frames:
    they are sent again, and counted again."""
    for number in hosts.numbers:
        hosts.rate(number, "100mbit")
    yield hosts
    for number in hosts.numbers:
        hosts.norate(number)


@pytest.mark.parametrize("slots", LAYOUTS, ids=str)
def test_the_ring_sends_what_it_must_and_no_more(slots: Sequence[int], calm_hosts: Hosts) -> None:
    line = mpirun(slots, ["-m", "tests.cluster.ring_wire_job", str(NUMEL)])
    job = calm_hosts.run(1, line, deadline_s=120)
    assert job.returncode == 0, job.output
    found = json.loads(job.stdout)
    assert set(found) == set(ELEMENT_BYTES)
    for wire, figures in found.items():
        check(wire, figures, slots)
    full = payload("float32", slots)
    assert full == 2 * (len(slots) - 1) * NUMEL * 4 // len(slots)
    assert 2 * payload("bfloat16", slots) == 2 * payload("float16", slots) == full
    assert payload("int8", slots) < 0.28 * full
