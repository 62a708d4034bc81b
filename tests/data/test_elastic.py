"""Killed and resumed anywhere, on other numbers of ranks, micro-batches and workers: the order stays.

The arithmetic of slots and plans alone, quick; `test_datamodule.py` and `test_bucket_batches.py` have real
loaders.
"""

import pickle
from itertools import islice

import numpy as np
import pytest

from ldm.data.buckets import Regroup
from ldm.data.loader import Share
from ldm.data.mixture import Mixture
from ldm.data.plan import Stream, skipped
from ldm.data.shapes import Numbers
from ldm.data.stages import Places

BATCH = 24
WORLDS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 24)
WORKERS = (0, 1, 2, 3, 5, 8)
STEPS = 50  # of the uninterrupted run
WINDOWS = ((5 * BATCH, 9 * BATCH), (30 * BATCH, 31 * BATCH), (31 * BATCH, 64 * BATCH))


def plain():
    return Stream([100, 250, 0, 1650], 96, 4, 3)


def mixture():
    return Mixture([Stream([700, 300], 60, 4, 3, 0), Stream([90], 36, 4, 3, 1)])


def regrouped(base, *sizes):
    rng = np.random.default_rng(0)
    numbers = [Numbers(rng.choice(4, size, p=[0.5, 0.3, 0.15, 0.05]).astype(np.uint8)) for size in sizes]
    return Regroup(base, numbers, np.arange(256).astype(np.uint8), 4, BATCH, 40)


PLANS = {
    "plain": (plain, ()),
    "mixture": (mixture, ()),
    "buckets": (lambda: regrouped(plain(), 2000), ()),
    "mixture and buckets": (lambda: regrouped(mixture(), 1000, 90), ()),
    "windows": (plain, WINDOWS),
    "windows and buckets": (lambda: regrouped(mixture(), 1000, 90), WINDOWS),
}


def samples(plan, n):
    return np.stack([n, *plan.places(n)]).T


@pytest.mark.parametrize("name", PLANS)
def test_killed_and_resumed_at_random(name):
    """34 sequences for each of 6 plans, ten sizes of the world, six numbers of workers."""
    make, windows = PLANS[name]
    everything = samples(make(), skipped(np.arange(STEPS * BATCH), windows))
    rng = np.random.default_rng(len(name))
    stored, segments = pickle.dumps(make()), 0
    for _ in range(34):
        step = 0
        while step < STEPS:
            world, workers = int(rng.choice(WORLDS)), int(rng.choice(WORKERS))
            accumulate, count = int(rng.integers(1, 4)), int(min(rng.integers(1, 30), STEPS - step))
            shares = [Share(BATCH, rank, world, accumulate, workers) for rank in range(world)]
            parts = [
                islice(Places(share, step * BATCH, skip=windows).of(worker), count * accumulate)
                for share in shares
                for worker in range(max(1, workers))
            ]
            n = np.sort(np.concatenate([part for parts_of_one in parts for part in parts_of_one]))
            found = samples(pickle.loads(stored), n)
            assert (found == everything[step * BATCH : (step + count) * BATCH]).all()
            step += int(rng.integers(0, count + 1))  # killed: back to its last checkpoint
            segments += 1
    assert segments > 100


@pytest.mark.parametrize("name", ["plain", "mixture"])
def test_even_the_global_batch_may_change_without_buckets(name):
    plan, rng = PLANS[name][0](), np.random.default_rng(0)
    everything, consumed = samples(plan, np.arange(5000)), 0
    while consumed < 4000:
        batch = int(rng.choice([1, 16, 24, 48, 50, 96]))
        share = Share(batch, 0, 1, 1, 2)
        parts = [list(islice(Places(share, consumed).of(worker), 3)) for worker in range(2)]
        n = np.sort(np.concatenate([part for mine in parts for part in mine]))
        assert (samples(plan, n) == everything[consumed : consumed + 3 * batch]).all()
        consumed += 3 * batch
