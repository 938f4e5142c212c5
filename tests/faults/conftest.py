"""Two hosts for the trials between hosts; where trials cannot be had, the tests are skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.hosts import Hosts, missing
from tests.faults import trials


@pytest.fixture(scope="package")
def fault_tolerance() -> None:
    if reason := trials.missing():
        pytest.skip(reason)


@pytest.fixture(scope="package")
def two_hosts(fault_tolerance: None) -> Iterator[Hosts]:
    if reason := missing():
        pytest.skip(reason)
    with Hosts(2) as hosts:
        yield hosts
