"""Checkpoint intervals and goodput, against brute force and against failures that are drawn."""

import math

import numpy as np
import pytest

from ldm.cluster.reliability import Reliability, between_failures

JOBS = [Reliability(7.9 * 3600, 15, 300), Reliability(12 * 3600, 1, 120), Reliability(3600, 60, 600)]


@pytest.mark.parametrize("job", JOBS)
def test_the_interval_is_the_best_one(job):
    """Against the goodput of 3,000 other intervals."""
    grid = np.geomspace(1, 10 * job.between, 3_000)
    best = max(job.goodput(t) for t in grid)
    assert job.goodput(job.interval()) == pytest.approx(best, rel=2e-5)
    assert job.interval() == pytest.approx(grid[np.argmax([job.goodput(t) for t in grid])], rel=0.02)


def test_rare_failures_give_young_s_formula():
    """At RSC's rate, 1,024 GPUs: 7.6 minutes if a save takes 1 s, 29 if it takes 15."""
    between = between_failures(1024)
    assert between == pytest.approx(29 * 3600, rel=0.02)
    for save, minutes in ((1, 7.6), (15, 29)):
        found = Reliability(between, save, 300).interval()
        assert found == pytest.approx(math.sqrt(2 * save * between), rel=0.01)
        assert found / 60 == pytest.approx(minutes, rel=0.02)


def test_published_losses():
    """At a mean of 7.9 h: 15 minutes between saves and 5 to restart lose 2.6 %, 5 and 5 lose 1.6 %."""
    for minutes, loss in ((15, 0.026), (5, 0.016)):
        assert 1 - Reliability(7.9 * 3600, 0, 300).goodput(60 * minutes) == pytest.approx(loss, abs=0.0005)


@pytest.mark.parametrize("job", JOBS)
def test_goodput_of_failures_that_are_drawn(job):
    """1,500 segments trained through exponential failures; each failure costs the segment and restarts."""
    rng = np.random.default_rng(1)
    interval = 2 * job.interval()

    def through(need):
        """Time until `need` seconds pass without a failure, each failure followed by a restart, too."""
        spent = 0.0
        while (failure := rng.exponential(job.between)) < need:
            spent += failure + through(job.restart)
        return spent + need

    spent = [through(interval + job.save) for _ in range(1500)]
    error = np.std(spent) / np.mean(spent) / math.sqrt(len(spent))
    assert interval / np.mean(spent) == pytest.approx(job.goodput(interval), rel=4 * error)
    expected = job.failures(1e6, interval)
    assert expected == pytest.approx(1e6 / job.goodput(interval) / job.between)


def test_limits():
    never = Reliability(math.inf, 10, 300)
    assert (never.interval(), never.goodput(math.inf), never.failures(1e9, 1e3)) == (math.inf, 1.0, 0.0)
    assert never.goodput(90) == pytest.approx(0.9)
    hopeless = Reliability(10, 3600, 36000)
    assert hopeless.goodput(hopeless.interval()) == 0.0
    assert hopeless.failures(1, hopeless.interval()) == math.inf
    assert between_failures(16_384, 50_700) / 3600 == pytest.approx(3.1, abs=0.05), "as Llama 3 was published"
