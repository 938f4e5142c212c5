"""Hosts for the tests of this folder; where they cannot be had, its tests are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import slurm as slurm_over_hosts
from tests.cluster.hosts import Hosts, missing
from tests.cluster.project import Project
from tests.cluster.slurm import Slurm


@pytest.fixture(scope="session")
def emulated() -> None:
    """For tests that make hosts of their own."""
    if reason := missing():
        pytest.skip(reason)


@pytest.fixture(scope="package")
def four_hosts(emulated: None) -> Iterator[Hosts]:
    with Hosts(4) as hosts:
        yield hosts


@pytest.fixture
def hosts(four_hosts: Hosts) -> Iterator[Hosts]:
    """Four hosts that are up, which the tests share: each leaves them as it found them."""
    yield four_hosts
    left = {number: four_hosts.shared_memory(number) for number in four_hosts.numbers}
    assert not any(left.values()), f"the test left files in /dev/shm, by host: {left}"


@pytest.fixture(scope="module")
def slurm_cluster(emulated: None) -> Iterator[Slurm]:
    if reason := slurm_over_hosts.missing():
        pytest.skip(reason)
    with Hosts(4) as hosts:
        yield Slurm(hosts)


@pytest.fixture
def slurm(slurm_cluster: Slurm) -> Slurm:
    """Slurm over four hosts of its own, all of them idle."""
    slurm_cluster.wait_for_nodes(*slurm_cluster.hosts.numbers)
    return slurm_cluster


@pytest.fixture
def project(tmp_path: Path, slurm: Slurm) -> Project:
    return Project(tmp_path, slurm)
