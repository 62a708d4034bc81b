"""One stream a bucket, each step the turn of one: by its own plan, and through what a worker reads."""

import pickle
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from ldm.data.blocks import Ticket, TurnReader
from ldm.data.plan import Stream
from ldm.data.turns import Turns, turns

SIZES, BATCH = [700, 90, 33, 3], 8
GOLDEN = [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]


@pytest.fixture
def plan():
    return Turns([Stream([size], 16, 4, seed=5, source=d) for d, size in enumerate(SIZES)], BATCH)


def test_every_step_is_of_one_bucket_and_each_sample_comes_once_a_pass(plan):
    at = plan.places(np.arange(40 * plan.steps * BATCH))
    steps = at.source.reshape(-1, BATCH)
    assert (steps == steps[:, :1]).all()
    assert steps[:, 0].tolist() == [plan.bucket(step) for step in range(len(steps))]
    for bucket, size in enumerate(SIZES):
        mine = at.source == bucket
        for epoch in range(3):
            seen = at.place[mine & (at.epoch == epoch)]
            block = plan.streams[bucket].block
            assert len(seen) == len(np.unique(seen)) == size // block * block
    expected = np.array(SIZES) / sum(SIZES)
    np.testing.assert_allclose(plan.shares, expected, atol=0.5 * BATCH * len(SIZES) / sum(SIZES))


def test_a_small_bucket_plays_its_samples_again_to_fill_a_batch(plan):
    steps = plan.places(np.arange(plan.steps * BATCH))
    expected = [float((steps.source == d).sum() / size) for d, size in enumerate(SIZES)]
    assert plan.repeats == pytest.approx(expected)
    assert plan.repeats[3] == pytest.approx(BATCH / 3)


def test_a_bucket_goes_on_where_its_last_turn_ended(plan):
    turns_of = {}
    for step in range(3 * plan.steps):
        bucket, turn = plan.turn(step)
        assert turn == turns_of.get(bucket, 0)
        turns_of[bucket] = turn + 1
        n = step * BATCH + np.arange(BATCH)
        own = plan.streams[bucket].places(turn * BATCH + np.arange(BATCH))
        assert [column.tolist() for column in plan.places(n)] == [column.tolist() for column in own]
    assert turns_of == {d: 3 * int(quota) for d, quota in enumerate(plan.quota)}


def test_passes_have_orders_of_their_own_that_a_copy_knows(plan):
    orders = [[plan.bucket(p * plan.steps + i) for i in range(plan.steps)] for p in range(3)]
    assert orders[0] != orders[1] != orders[2]
    copy = pickle.loads(pickle.dumps(plan))
    assert [copy.bucket(step) for step in range(plan.steps, 2 * plan.steps)] == orders[1]
    other = Turns([Stream([size], 16, 4, seed=6, source=d) for d, size in enumerate(SIZES)], BATCH)
    assert [other.bucket(step) for step in range(plan.steps)] != orders[0]


def test_golden():
    """Runs resume by these numbers: another order is another PLAN_VERSION."""
    plan = Turns([Stream([size], 16, 4, seed=5, source=d) for d, size in enumerate(SIZES)], BATCH)
    assert [plan.bucket(step) for step in range(24)] == GOLDEN


def test_lanes_are_shared_by_the_buckets_and_kept_by_a_checkpoint():
    sources = [Sized(4_000_000), Sized(1_000_000)]
    plan = turns(sources, 64, 0, None)
    assert [stream.lanes for stream in plan.streams] == [512, 512]
    assert [stream.block for stream in plan.streams] == [32, 32]
    again = turns(sources, 64, 0, ([64, 128], [8, 4]))
    assert again.constants == ([64, 128], [8, 4])


class Sized:
    """What a plan asks of a source."""

    def __init__(self, size):
        self.size = size
        self.selection, self.index = SimpleNamespace(counts=[size]), SimpleNamespace(mean_bytes=60_000.0)

    def __len__(self):
        return self.size


class Reads:
    """What `ldm.data.blocks.Reads` is to a worker; a sample's content is (bucket, place)."""

    def __init__(self, sources):
        self.sources, self.calls = sources, []

    def rows(self, at):
        return at.place

    def submit(self, at, rows):
        future = Future()
        future.set_result(list(zip(at.source.tolist(), at.place.tolist(), strict=True)))
        self.calls.append(len(rows))
        return [Ticket(future, i, 1) for i in range(len(rows))]


@pytest.mark.parametrize("start", [0, 37])
def test_workers_read_what_the_plan_plays_a_block_at_a_time(plan, start):
    reads = Reads([Sized(size) for size in SIZES])
    workers = [range(0, 5), range(5, BATCH)]
    readers = [TurnReader(reads, plan, list(slots), 1 << 40) for slots in workers]
    assert [stream.block for stream in plan.streams] == [2, 1, 1, 1]
    for step in range(start, start + 2 * plan.steps):
        for reader, slots in zip(readers, workers, strict=True):
            n = step * BATCH + np.array(slots)
            at = plan.places(n)
            found = [ticket.take() for ticket in reader(n)]
            assert found == list(zip(at.source.tolist(), at.place.tolist(), strict=True))
    first = [reader.readers[0] for reader in readers]  # the bucket that has blocks of two
    assert sum(own.bytes_read - own.bytes for own in first) == sum(own.bytes_used for own in first)
    assert reads.calls.count(2) > 0.4 * sum(own.samples for own in first)
