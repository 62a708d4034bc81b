"""The model of a step, against sums done by hand and its limits."""

import math
from dataclasses import replace

import pytest

from ldm.cluster.forecast import (
    CONSTANTS,
    Batch,
    Constants,
    Software,
    Work,
    calibrate,
    exchange,
    images_per_second,
    step,
)
from ldm.cluster.hardware import GPUS, LATENCY, Cluster

H100 = GPUS["h100"]
WORK = Work(flops=2.4e12, ops=600, parameters=860_000_000)
FREE = Constants(op_floor=0.0, host_op=0.0, jitter=0.0)


def test_a_ring_by_hand():
    """1 GB over 8 GPUs: 2 * 7/8 GB at 0.8 of 450 GB/s; over two nodes the cards carry 400 GB/s."""
    assert Cluster(H100, 8).all_reduce(1e9) == pytest.approx(2 * 7 / 8 / 360 + 6 * LATENCY)
    assert Cluster(H100, 16).all_reduce(1e9) == pytest.approx(2 * 15 / 16 / 320 + 8 * LATENCY)
    assert Cluster(H100, 16).reduce_scatter(1e9) == Cluster(H100, 16).all_reduce(1e9) / 2
    assert Cluster(H100, 1).all_reduce(1e9) == 0
    slow = replace(H100, network=100e9)
    assert Cluster(slow, 16).all_reduce(1e12) == pytest.approx(
        4 * Cluster(H100, 16).all_reduce(1e12), rel=1e-3
    )
    assert Cluster(slow, 8).all_reduce(1e9) == Cluster(H100, 8).all_reduce(1e9)
    assert (Cluster(GPUS["gb200"], 72).nodes, Cluster(GPUS["gb200"], 73).nodes) == (1, 2)


def test_a_step_by_hand():
    """One GPU, nothing but work and optimizer: 32 * 2.4 TFLOP at 300 TFLOP/s, and 52 bytes a parameter."""
    found = step(WORK, Software(), Cluster(H100, 1), Batch(32), 300e12, constants=FREE)
    assert found.compute == pytest.approx(0.256)
    assert found.optimizer == pytest.approx(860e6 * 52 / (0.8 * 3.35e12))
    assert (found.host, found.gradients, found.gather, found.stragglers, found.data) == (0, 0, 0, 0, 0)
    assert found.seconds == found.compute + found.optimizer
    assert images_per_second(found, Cluster(H100, 1), Batch(32)) == pytest.approx(32 / found.seconds)
    twice = step(WORK, Software(), Cluster(H100, 1), Batch(32, 2), 300e12, constants=FREE)
    assert (twice.compute, twice.optimizer) == (2 * found.compute, found.optimizer)


def test_small_batches_wait_for_launches_and_kernels():
    work, one = replace(WORK, frozen_ops=100), Cluster(H100, 1)
    eager = step(work, Software(), one, Batch(1), math.inf)
    assert eager.compute == pytest.approx(1900 * CONSTANTS.op_floor)
    assert eager.compute + eager.host == pytest.approx(1300 * CONSTANTS.host_op)
    graph = step(work, Software(graph=True), one, Batch(1), math.inf)
    assert (graph.compute, graph.host) == (eager.compute, 0)
    assert step(work, Software(graph=True, host_ops=10), one, Batch(1), 1e15).host == pytest.approx(
        10 * CONSTANTS.host_op
    )
    assert step(work, Software(), one, Batch(64), 300e12).host == 0, "the work hides the launches"


def test_what_of_an_exchange_is_seen():
    cluster = Cluster(H100, 64)
    whole = cluster.all_reduce(860e6 * 4)
    late = step(WORK, Software(overlap=False), cluster, Batch(4), 300e12, constants=FREE)
    assert late.gradients == pytest.approx(whole)
    early = step(WORK, Software(), cluster, Batch(4), 300e12, constants=FREE)
    backward = 2 / 3 * early.compute
    assert early.gradients == pytest.approx(max(whole * 25e6 / 860e6 / 4, whole - backward / 2))
    tiny = step(WORK, Software(), cluster, Batch(0.01), 300e12, constants=FREE)
    assert tiny.gradients == pytest.approx(whole, rel=0.01), "nothing to hide it behind"
    hidden = step(WORK, Software(), cluster, Batch(64), 300e12, constants=FREE)
    assert hidden.gradients == pytest.approx(whole * 25e6 / (860e6 * 4)), "all but the last bucket"


def test_sharding():
    weights = Software(gradient_bytes=2, gather_bytes=2, shards="world")
    cluster, size = Cluster(H100, 64), 860e6 * 2
    gradients, gather, owners = exchange(WORK, weights, cluster)
    assert (gradients, gather, owners) == (cluster.reduce_scatter(size), cluster.reduce_scatter(size), 64)
    gradients, gather, owners = exchange(WORK, replace(weights, shards="node"), cluster)
    assert (gradients, owners) == (cluster.all_reduce(size), 8)
    assert gather == Cluster(H100, 8).reduce_scatter(size)
    every = replace(weights, every_micro_batch=True, overlap=False)
    once = step(WORK, replace(every, every_micro_batch=False), cluster, Batch(1, 4), 300e12)
    assert step(WORK, every, cluster, Batch(1, 4), 300e12).gradients == pytest.approx(4 * once.gradients)
    some = step(WORK, replace(every, overlap_gather=True), cluster, Batch(1, 4), 300e12)
    assert some.gather < step(WORK, every, cluster, Batch(1, 4), 300e12).gather
    whole = step(WORK, Software(), cluster, Batch(4), 300e12).optimizer
    assert once.optimizer == pytest.approx(whole / 64)


def test_the_slowest_of_many_is_late():
    """sqrt(2 ln N) standard deviations; exact values of the normal maximum lie 10 to 25 % below it."""
    for gpus, exact in ((64, 2.34), (4096, 3.58)):
        found = step(WORK, Software(), Cluster(H100, gpus), Batch(8), 300e12)
        assert found.stragglers / found.compute == pytest.approx(0.02 * math.sqrt(2 * math.log(gpus)))
        assert 1.0 < found.stragglers / found.compute / (0.02 * exact) < 1.3


def test_pictures_may_come_too_slowly():
    cluster, batch = Cluster(H100, 8), Batch(32, 2)
    free = step(WORK, Software(), cluster, batch, 300e12)
    enough = images_per_second(free, cluster, batch)
    assert step(WORK, Software(), cluster, batch, 300e12, feed=2 * enough).data == 0
    starved = step(WORK, Software(), cluster, batch, 300e12, feed=enough / 2)
    assert images_per_second(starved, cluster, batch) == pytest.approx(enough / 2)


@pytest.mark.parametrize("gpus", [1, 8, 512])
def test_calibration_inverts_the_model(gpus):
    cluster, batch, software = Cluster(H100, gpus), Batch(16), Software()
    speed = images_per_second(step(WORK, software, cluster, batch, 345e12), cluster, batch)
    assert calibrate(WORK, software, cluster, batch, speed) == pytest.approx(345e12)
    assert calibrate(WORK, software, cluster, batch, 1e9) is None
