"""Samples of this process, by what it did between them."""

from __future__ import annotations

import time

import pytest

from hvd_train.environment import machine
from hvd_train.environment.usage import UsageSampler


def test_cpu_is_that_since_the_last_sample() -> None:
    sampler = UsageSampler()
    began = time.process_time()
    while time.process_time() - began < 0.1:
        pass
    busy = sampler.sample()
    time.sleep(0.5)
    idle = sampler.sample()
    assert busy.cpu > idle.cpu >= 0
    assert busy.rss_bytes > 1 << 20
    assert busy.available_bytes > 0


def test_throttling_is_a_share_of_the_periods_since_the_last_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([(100, 40), (110, 45), (110, 45), (300, 0), (310, 200)])
    monkeypatch.setattr(machine, "throttling", lambda: next(counts))
    sampler = UsageSampler()
    assert [sampler.sample().throttled for _ in range(4)] == [0.5, 0.0, 0.0, 1.0]
