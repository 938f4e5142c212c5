"""A rank is killed in each phase, and the others go on. `python -m tests.faults.count` does it more often."""

from __future__ import annotations

import pytest

from tests.cluster.hosts import Hosts
from tests.faults.trials import PHASES, carry_out, trial

ATTEMPTS = 5
"""A phase of microseconds may be over before the signal arrives. All is asserted of that death, too."""


def kill_in(layout: str, phase: str, hosts: Hosts | None = None) -> None:
    assert any(carry_out(trial(layout, phase, turn), hosts).struck for turn in range(ATTEMPTS))


@pytest.mark.parametrize("phase", PHASES["one host"])
def test_the_others_of_the_host_continue(phase: str, fault_tolerance: None) -> None:
    kill_in("one host", phase)


@pytest.mark.cluster
@pytest.mark.parametrize("phase", PHASES["two hosts"])
def test_the_others_of_both_hosts_continue(phase: str, two_hosts: Hosts) -> None:
    kill_in("two hosts", phase, two_hosts)
