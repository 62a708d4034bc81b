"""Speeds that others published, and how well the forecast predicts them.

Of each table the smallest row gives the rate of a GPU; every other row is held out, predicted and compared.
Nothing is set for a row. What is said of the programs is from their public configs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from ldm.cluster.forecast import (
    CONSTANTS,
    Batch,
    Constants,
    Software,
    Work,
    calibrate,
    images_per_second,
    step,
)
from ldm.cluster.hardware import GPUS, Cluster

# The U-Net of Stable Diffusion 2 on latents of 64 x 64 and 32 x 32, three forward passes; the text tower of
# OpenCLIP ViT-H/14, one. Counted on our networks (tests/cluster/test_workload.py).
UNET, PARAMETERS, UNET_OPS = {512: 2.413e12, 256: 0.543e12}, 865_910_724, 633
TEXT, TEXT_OPS = 0.0451e12, 266


@dataclass(frozen=True)
class Row:
    """One measurement: pictures a second of all GPUs, each taking `pictures` at once, `accumulate` times."""

    gpu: str
    gpus: int
    pictures: int
    accumulate: int
    images_per_second: float


@dataclass(frozen=True)
class Table:
    """Measurements of one program, the one that calibrates first."""

    name: str
    source: str
    work: Work
    software: Software
    rows: Sequence[Row]


@dataclass(frozen=True)
class Prediction:
    """A row and what the model says of it."""

    table: Table
    row: Row
    predicted: float
    held_out: bool

    @property
    def error(self) -> float:
        return self.predicted / self.row.images_per_second - 1


def mosaic(side: int, speeds: Sequence[float]) -> Table:
    """2,048 pictures a step in micro-batches of 16; with each FSDP gathers float32 weights and scatters
    16-bit gradients, block by block; AdamW, no clipping, the average not yet begun.
    """
    software = Software(
        gradient_bytes=2,
        gather_bytes=4,
        shards="world",
        overlap_gather=True,
        every_micro_batch=True,
        optimizer_bytes=28,
    )
    rows = [
        Row("a100", gpus, 16, 2048 // 16 // gpus, speed)
        for gpus, speed in zip((8, 16, 32, 64, 128), speeds, strict=True)
    ]
    source = "github.com/mosaicml/diffusion, README.md and SD-2-base-*.yaml"
    return Table(f"MosaicML {side} px", source, Work(UNET[side], UNET_OPS, PARAMETERS), software, rows)


def mlperf(version: str, work: Work, software: Software, *rows: Row) -> Table:
    source = f"github.com/mlcommons/training_results_v{version}, stable_diffusion, result_*.txt"
    return Table(f"MLPerf {version} 512 px", source, work, software, rows)


def tables() -> list[Table]:
    """All tables with throughputs of more than one size.

    MLPerf 4.0 has times to a quality alone; of 5.0's H200 the batch of the throughput is not told.
    """
    unet = Work(UNET[512], UNET_OPS, PARAMETERS)
    with_text = Work(UNET[512] + TEXT, UNET_OPS, PARAMETERS)
    # 16-bit weights and gradients, float32 copies in the optimizer, clipping. 3.1: the text tower runs in the
    # loop, after a blocking copy of its tokens, outside any graph; gradients are summed after the backward
    # pass, every rank has the whole optimizer. From 4.0: one graph of the whole step, text computed before,
    # and an optimizer that is shared within a node and overlaps, in buckets of a sixth.
    half = Software(gradient_bytes=2, optimizer_bytes=38, graph=True)
    early = replace(half, overlap=False, host_ops=TEXT_OPS)
    late = replace(half, gather_bytes=2, shards="node", last_bucket=2 * PARAMETERS / 6)
    return [
        mosaic(256, (1100, 2180, 4080, 8530, 11600)),
        mosaic(512, (290, 585, 1195, 2340, 4590)),
        mlperf(
            "3.1",
            with_text,
            early,
            Row("h100", 8, 64, 1, 935),
            Row("h100", 64, 32, 1, 6776),
            Row("h100", 512, 4, 1, 24160),
            Row("h100", 1024, 2, 1, 27991),
        ),
        mlperf(
            "4.1",
            unet,
            late,
            Row("h100", 4, 64, 1, 579),
            Row("h100", 8, 32, 1, 1084),
            Row("h100", 64, 16, 1, 7921),
            Row("h100", 512, 4, 1, 39329),
        ),
        mlperf(
            "5.0",
            unet,
            late,
            Row("gb200", 8, 32, 1, 2321),
            Row("b200", 8, 32, 1, 2192),
            Row("gb200", 72, 8, 1, 14929),
            Row("gb200", 512, 3, 1, 59729),
        ),
    ]


def share_of_peak(table: Table, constants: Constants = CONSTANTS) -> float:
    """What part of its peak a GPU reaches, from the smallest row alone; infinite if no rate is enough."""
    first = table.rows[0]
    gpu = GPUS[first.gpu]
    batch = Batch(first.pictures, first.accumulate)
    cluster = Cluster(gpu, first.gpus)
    rate = calibrate(table.work, table.software, cluster, batch, first.images_per_second, constants)
    return math.inf if rate is None else rate / gpu.flops


def predictions(given: Sequence[Table] | None = None, constants: Constants = CONSTANTS) -> list[Prediction]:
    """Every row of every table."""
    found = []
    for table in tables() if given is None else given:
        share = share_of_peak(table, constants)
        for i, row in enumerate(table.rows):
            gpu, batch = GPUS[row.gpu], Batch(row.pictures, row.accumulate)
            cluster = Cluster(gpu, row.gpus)
            rate = share * gpu.flops
            seconds = step(table.work, table.software, cluster, batch, rate, constants=constants)
            speed = images_per_second(seconds, cluster, batch)
            found.append(Prediction(table, row, speed, held_out=i > 0))
    return found


def sensitivity(bar: float) -> dict[str, tuple[int, int]]:
    """Held-out rows within `bar` when a constant, by its name, is halved and when it is doubled."""
    found = {}
    for name, value in asdict(CONSTANTS).items():
        changed = [predictions(None, replace(CONSTANTS, **{name: scale * value})) for scale in (0.5, 2.0)]
        less, more = (sum(p.held_out and abs(p.error) <= bar for p in one) for one in changed)
        found[name] = less, more
    return found
