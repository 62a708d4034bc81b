"""How long an optimizer step takes: a model with one number that is measured, the rate of a GPU.

Everything else is counted from the networks, taken from data sheets (hardware.py) or one of `Constants`, the
same for all GPUs, programs and sizes. docs/planning.md says how well it predicts runs that were published.

    step = accumulate * max(pictures * FLOP / rate + ops * op_floor, ops * host_op)      compute
         + what of the exchange of gradients and weights the compute does not hide
         + bytes of the optimizer / memory bandwidth + jitter * sqrt(2 ln N) * compute   the slowest of N

and not less than the pictures take to arrive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ldm.cluster.hardware import LINE_SHARE, Cluster

# The backward pass has twice the operations of the forward pass (1,225 against 633 in Stable Diffusion 2) and
# its work; autograd launches them in C++, all in the time of the forward pass.
BACKWARD = 2


@dataclass(frozen=True)
class Constants:
    """What is assumed of every GPU and program alike; `published.sensitivity` says how much hangs on each."""

    # Seconds that an operation keeps a GPU however little there is to do: about two kernels (a convolution's
    # backward pass is two, a norm's two or three), 3.4 us each in a CUDA graph (NVIDIA, "Getting started with
    # CUDA graphs").
    op_floor: float = 2 * 3.4e-6
    # Seconds in which Python and torch launch one: the U-Net of Stable Diffusion 1, 633 operations, on one
    # picture comes 32 times a second to an A100 that could do more (stable-fast, issue 2).
    host_op: float = 1 / 32 / 633
    # Of the time of a pass, how much can hide an exchange: both want the GPU's multiprocessors and memory.
    hides: float = 0.5
    # Standard deviation of a rank's compute, as a share of it: of a normal distribution whose 99th
    # percentile is 5 % above its median, our bar for a sound machine. The slowest of N ranks is sqrt(2 ln N)
    # of these late.
    jitter: float = 0.02


CONSTANTS = Constants()


@dataclass(frozen=True)
class Work:
    """What the networks ask for."""

    flops: float  # of matrix products and convolutions a picture, in all passes
    ops: int  # operations of a forward pass of what is trained, views not counted
    parameters: int  # trained
    frozen_ops: int = 0  # operations that have no backward pass


@dataclass(frozen=True)
class Software:
    """How a trainer does it: what is known of a program without timing it. Bytes are a parameter's."""

    gradient_bytes: float = 4.0
    gather_bytes: float = 0.0  # of weights that are gathered once an exchange
    shards: str = "none"  # who shares the optimizer's state: none | node | world
    overlap: bool = True  # gradients leave while the backward pass goes on
    overlap_gather: bool = False  # weights come while the forward pass goes on
    every_micro_batch: bool = False  # gradients leave after each micro-batch
    last_bucket: float = 25e6  # bytes of gradients that leave last, when nothing is left to hide them
    graph: bool = False  # a CUDA graph launches the operations
    host_ops: int = 0  # operations that the GPU waits for one by one
    optimizer_bytes: float = 52.0  # read and written: AdamW 28, clipping 12, average 12


@dataclass(frozen=True)
class Batch:
    """How many pictures a GPU takes at once, and how often before the optimizer steps."""

    pictures: float
    accumulate: int = 1


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step, by what they are spent on."""

    compute: float
    host: float  # waiting for the host to launch
    gradients: float  # exchange that nothing hides
    gather: float
    optimizer: float
    stragglers: float
    data: float  # waiting for pictures

    @property
    def seconds(self) -> float:
        return sum(vars(self).values())


def step(
    work: Work,
    software: Software,
    cluster: Cluster,
    batch: Batch,
    rate: float,
    feed: float = math.inf,
    constants: Constants = CONSTANTS,
) -> Step:
    """The step of all GPUs at `rate` FLOP/s each; `feed`: pictures a second that arrive for all."""
    floor = ((1 + BACKWARD) * work.ops + work.frozen_ops) * constants.op_floor
    busy = batch.pictures * work.flops / rate + floor
    launches = 0.0 if software.graph else (2 * work.ops + work.frozen_ops) * constants.host_op
    pass_seconds = max(busy, launches)
    host = pass_seconds - busy + software.host_ops * constants.host_op
    backward = pass_seconds * BACKWARD / (1 + BACKWARD)
    gradients, gather, owners = exchange(work, software, cluster)
    if software.overlap:
        last = min(software.last_bucket, work.parameters * software.gradient_bytes)
        share = last / max(1.0, work.parameters * software.gradient_bytes)
        gradients = max(share * gradients, gradients - constants.hides * backward)
    if software.overlap_gather:
        gather = max(0.0, gather - constants.hides * (pass_seconds - backward))
    times = batch.accumulate if software.every_micro_batch else 1
    moved = work.parameters * software.optimizer_bytes / owners
    compute = batch.accumulate * busy
    late = constants.jitter * math.sqrt(2 * math.log(cluster.gpus)) * compute
    optimizer = moved / (LINE_SHARE * cluster.gpu.bandwidth)
    host, gradients, gather = batch.accumulate * host, times * gradients, times * gather
    spent = compute + host + gradients + gather + optimizer + late
    arriving = batch.pictures * batch.accumulate * cluster.gpus / feed
    return Step(compute, host, gradients, gather, optimizer, late, max(0.0, arriving - spent))


def exchange(work: Work, software: Software, cluster: Cluster) -> tuple[float, float, int]:
    """Seconds to exchange gradients, seconds to gather weights, and how many share the optimizer's state."""
    size, weights = work.parameters * software.gradient_bytes, work.parameters * software.gather_bytes
    if software.shards == "world":
        return cluster.reduce_scatter(size), cluster.reduce_scatter(weights), cluster.gpus
    if software.shards == "node":
        node = cluster.inside()
        summed = node.reduce_scatter(size) if cluster.nodes == 1 else cluster.all_reduce(size)
        return summed, node.reduce_scatter(weights), node.gpus
    return cluster.all_reduce(size), 0.0, 1


def images_per_second(seconds: Step, cluster: Cluster, batch: Batch) -> float:
    return cluster.gpus * batch.pictures * batch.accumulate / seconds.seconds


def calibrate(
    work: Work,
    software: Software,
    cluster: Cluster,
    batch: Batch,
    measured: float,
    constants: Constants = CONSTANTS,
) -> float | None:
    """The rate at which the model gives `measured` pictures a second; None if no rate does.

    By bisection: the step only gets shorter as the rate grows.
    """

    def speed(rate: float) -> float:
        found = step(work, software, cluster, batch, rate, constants=constants)
        return images_per_second(found, cluster, batch)

    low, high = 1e9, 1e18
    if speed(high) < measured:
        return None
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if speed(middle) < measured else (low, middle)
    return high
