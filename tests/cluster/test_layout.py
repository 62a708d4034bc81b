"""Thousands of ranks on one core: every place once, and a clock that agrees with sums by hand."""

import time

import numpy as np
import pytest

from ldm.cluster import layout
from ldm.cluster.layout import Startup, deal, queue, shared_reads, start_up
from ldm.data.plan import Stream
from ldm.data.stages import Places
from ldm.errors import InputError


def test_4096_ranks_in_seconds():
    began = time.process_time()
    found = deal(4096, 8, 8192)
    start = start_up(512, 8, 13.8e9, 0.0, Startup())
    assert time.process_time() - began < 20
    assert (found.samples, found.nodes, found.per_rank) == (4 * 8192, 512, (2, 2))
    assert found.shards_of_a_rank[1] <= 8
    assert found.shards_of_a_node[1] <= 64
    assert start.launched <= 20 < start.imported < start.met < start.read < start.first_step


@pytest.mark.parametrize(
    ("ranks", "per_node", "accumulate", "workers"), [(12, 8, 2, 3), (7, 4, 1, 0), (1, 8, 4, 5)]
)
def test_any_world_plays_the_same_samples(ranks, per_node, accumulate, workers):
    counts = np.array([300, 500, 200])
    found = deal(ranks, per_node, 168, accumulate, workers, steps=3, start=168, counts=counts)
    assert (found.samples, found.nodes) == (504, -(-ranks // per_node))
    assert found.per_rank == (168 // ranks, 168 // ranks)
    if ranks == 1:
        played = Stream(counts, 1176, 1)(np.arange(168, 672))
        assert found.shards_of_a_node == (len(np.unique(played[2])),) * 2


def test_a_wrong_deal_is_found(monkeypatch):
    """A stage that plays its places twice, and one that leaves the last rank's out."""

    class Twice(Places):
        def of(self, worker):
            for n in super().of(worker):
                yield np.concatenate([n, n])

    class Short(Places):
        def of(self, worker):
            for n in super().of(worker):
                yield n[: 0 if self.share.rank == 3 else None]

    for wrong in (Twice, Short):
        monkeypatch.setattr(layout, "Places", wrong)
        with pytest.raises(RuntimeError, match="do not play each place"):
            deal(4, 2, 16, workers=0, counts=np.array([1000]))


def test_a_batch_that_cannot_be_dealt():
    with pytest.raises(InputError, match=r"global_batch_size=100: not divisible .* = 64; nearest: 64, 128"):
        deal(64, 8, 100)


def test_a_queue_by_hand():
    """Two at once wait for each other, one that comes later does not."""
    assert queue(np.array([0.0, 0.0, 10.0]), 2.0) == pytest.approx([2, 4, 12])
    assert queue(np.zeros(4096), 0.5e-3)[-1] == pytest.approx(2.048)


def test_reading_by_hand():
    """10 bytes each at 1 byte/s a node and 2 in all: alone 10 s, four together 20 s."""
    assert shared_reads(np.zeros(1), 10, 1, 2) == pytest.approx([10])
    assert shared_reads(np.zeros(2), 10, 1, 2) == pytest.approx([10, 10])
    assert shared_reads(np.zeros(4), 10, 1, 2) == pytest.approx([20] * 4)
    # alone at rate 2 until 1 s, then both at 1: the first is done at 9 s, the second has 2 left at rate 2
    assert shared_reads(np.array([1.0, 0.0]), 10, 2, 2) == pytest.approx([10, 9])
    late = shared_reads(np.sort(np.random.default_rng(0).uniform(0, 5, 100)), 10, 3, 20)
    assert late.max() > 100 * 10 / 20, "no more comes out of the file system than it gives"
    assert (np.diff(late) >= 0).all(), "first come, first done"


def test_more_nodes_wait_for_the_file_system():
    few, many = (start_up(nodes, 8, 13.8e9, 0.0, Startup()) for nodes in (4, 512))
    assert few.read - few.met == pytest.approx(13.8 / 5, rel=1e-3)
    assert many.read - many.met == pytest.approx(512 * 13.8 / 50, rel=1e-3)
