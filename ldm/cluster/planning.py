"""What a run would take on so many GPUs: speed, hours, money, memory, checkpoints, failures.

`workload` counts what the config asks, `forecast` says how long that takes, `reliability` what of it is kept.
Validation, pictures and evaluation are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ldm.cluster import published
from ldm.cluster.forecast import Batch, Software, Step, calibrate, images_per_second, step
from ldm.cluster.hardware import GPU, GPUS, Cluster
from ldm.cluster.layout import Startup, start_up
from ldm.cluster.reliability import GPU_HOURS, Reliability, between_failures
from ldm.cluster.workload import Workload, autocast_of
from ldm.config import compose, plain
from ldm.errors import InputError
from ldm.training.assembly import build_stages

SCALES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
CALIBRATED = {  # the table whose rate a GPU is taken to reach
    "a100": "MosaicML",
    "h100": "MLPerf 4.1",
    "h200": "MLPerf 4.1",
    "b200": "MLPerf 5.0",
    "gb200": "MLPerf 5.0",
}
STAGE_1 = 200 / 330  # of the rate of stage 2: few channels at full resolution (docs/recipes.md)
FLOAT32 = 0.5  # of the bf16 peak: TF32, data sheets
NOT_GIVEN = "not-given"


@dataclass(frozen=True)
class Options:
    """What is not in the config. Seconds, bytes, bytes/s."""

    nodes: int = 1
    per_node: int = 8
    gpu: str = "h100"
    network: float | None = None  # bytes/s of a GPU's card; None: as in hardware.py
    dollars: float = 2.5  # an hour of one GPU
    gpu_hours: float = GPU_HOURS  # for each failure
    requeue: float = 180.0  # from a failure to the start of the processes: noticing it, the queue
    write: float = 1e9  # of a checkpoint, by rank 0, with its sha256 and fsync
    storage: float | None = None  # of all pictures; None: no limit
    loader: float | None = None  # pictures a second that a node can prepare; None: no limit
    graph: bool = False  # as if one CUDA graph launched the whole step, which this framework does not do yet
    measured: tuple[int, float] | None = None  # GPUs, and their pictures a second with this config

    @property
    def device(self) -> GPU:
        found = GPUS[self.gpu]
        card = found.network / found.domain if self.network is None else self.network
        domain = found.domain if found.domain > 8 else min(found.domain, self.per_node)
        return replace(found, domain=domain, network=domain * card)


@dataclass(frozen=True)
class Forecast:
    """One stage on one number of GPUs."""

    gpus: int
    global_batch_size: int
    batch: Batch
    rate: float
    step: Step
    images_per_second: float
    memory: float
    reliability: Reliability
    every: int  # steps between checkpoints, the best
    goodput: float
    hours: float
    dollars: float
    failures: float


@dataclass(frozen=True)
class Stage:
    """A stage of the recipe, resolved, and what it asks for."""

    name: str
    cfg: Mapping[str, Any]
    load: Workload

    @property
    def steps(self) -> int:
        return int(self.cfg["trainer"]["max_steps"])

    @property
    def global_batch_size(self) -> int:
        return int(self.cfg["data"]["global_batch_size"])

    @property
    def is_stage_1(self) -> bool:
        return self.cfg.get("backbone") is None


def configs(overrides: Sequence[str]) -> list[Mapping[str, Any]]:
    """The stages of a recipe as resolved configs; what it leaves to the user may be left out here."""
    given = list(overrides)
    if not any(text.startswith("experiment=") for text in given):
        raise InputError("experiment", "none given", "ldm plan experiment=NAME --nodes N")
    while True:
        try:
            cfg = compose("train", given)
            return [plain(stage) for stage in build_stages(cfg, given)]
        except InputError as error:
            where, what, *_ = error.given
            if what != "missing value" or f"{where}={NOT_GIVEN}" in given:
                raise
            given.append(f"{where}={NOT_GIVEN}")


def software_of(stage: Stage, graph: bool = False) -> Software:
    """How this framework trains: DDP with the optimizer on every rank, or FSDP with its rows on each."""
    size, parameters = stage.load.static, max(1, stage.load.work.parameters)
    clipping = 3 if stage.cfg["trainer"].get("gradient_clip_val") else 1  # read, and read and written
    moved = 2 * size["optimizer"] + 3 * size["weights"] + (1 + clipping) * size["gradients"]
    moved += 2 * size["average"]
    each = size["gradients"] / parameters
    found = Software(gradient_bytes=each, optimizer_bytes=moved / parameters, last_bucket=25e6, graph=graph)
    if stage.load.gathered is None:
        return found
    weights = min(4.0, stage.load.gathered / parameters)  # the rest is cast on each
    return replace(found, shards="world", gather_bytes=weights, overlap_gather=True)


def batch_of(stage: Stage, gpus: int, gpu: GPU, pictures_of_all: int) -> Batch:
    """As many pictures at once as fit and divide the share of a GPU; or as many as the config says."""
    share = pictures_of_all // gpus
    chosen = stage.cfg["data"].get("batch_size")
    if chosen and share % int(chosen) == 0:
        return Batch(int(chosen), share // int(chosen))
    most = stage.load.fits(gpu.memory, gpus)
    if most < 1:
        need, has = stage.load.memory(1, gpus) / 1e9, gpu.memory / 1e9
        fix = "set backbone.gradient_checkpointing=true, or --gpu with more"
        raise InputError("memory", f"one picture takes {need:,.1f} GB of the {has:,.1f} of a {gpu.name}", fix)
    pictures = max(d for d in range(1, min(most, share) + 1) if share % d == 0)
    return Batch(pictures, share // pictures)


def rate_of(stage: Stage, options: Options) -> tuple[float, str]:
    """FLOP/s that a GPU reaches at this stage, and where that is from."""
    gpu = options.device
    if options.measured is not None:
        gpus, speed = options.measured
        check_batch(stage.global_batch_size, gpus, "--measured")
        batch = batch_of(stage, gpus, gpu, stage.global_batch_size)
        found = calibrate(
            stage.load.work, software_of(stage, options.graph), Cluster(gpu, gpus), batch, speed
        )
        if found is None or found > gpu.flops:
            what = f"{speed:,.0f} pictures/s need more than the peak of {gpus} {gpu.name}"
            raise InputError("--measured", what, "give what `perf/images_per_sec` says, and its --gpu")
        return found, f"{speed:,.0f} pictures/s measured on {gpus} GPUs"
    name = CALIBRATED[options.gpu]
    side = 256 if (stage.cfg["data"].get("image_size") or 0) <= 256 else 512
    fitting = [table for table in published.tables() if table.name.startswith(name)]
    table = next((table for table in fitting if f" {side} px" in table.name), fitting[0])
    rate = published.share_of_peak(table) * gpu.flops
    source = f"{table.name}, its row of {table.rows[0].gpus} GPUs"
    if stage.is_stage_1:
        rate, source = rate * STAGE_1, f"{source}, times {STAGE_1:.2f} for stage 1"
    if autocast_of(stage.cfg["trainer"]) is None:
        rate, source = rate * FLOAT32, f"{source}, times {FLOAT32} for float32"
    return rate, source


def check_batch(pictures: int, gpus: int, where: str) -> None:
    if pictures % gpus:
        lower = pictures // gpus * gpus
        nearest = ", ".join(str(n) for n in (lower, lower + gpus) if n)
        raise InputError(
            f"data.global_batch_size={pictures}",
            f"not divisible by the {gpus} GPUs of {where}",
            f"nearest: {nearest}",
        )


def forecast(stage: Stage, options: Options, gpus: int, rate: float, grown: bool = False) -> Forecast:
    """The stage on so many GPUs; `grown` lets the global batch become the nearest multiple of them."""
    gpu, pictures = options.device, stage.global_batch_size
    if grown:
        pictures = gpus * max(1, round(pictures / gpus))
    check_batch(pictures, gpus, "--nodes and --gpus-per-node")
    cluster, batch = Cluster(gpu, gpus), batch_of(stage, gpus, gpu, pictures)
    nodes = -(-gpus // options.per_node)
    feed = math.inf if options.loader is None else options.loader * nodes
    if options.storage is not None:
        feed = min(feed, options.storage / stage.load.picture_bytes)
    seconds = step(stage.load.work, software_of(stage, options.graph), cluster, batch, rate, feed)
    started = start_up(nodes, options.per_node, stage.load.checkpoint, 0.0, Startup())
    save = stage.load.checkpoint / options.write
    fails = Reliability(between_failures(gpus, options.gpu_hours), save, options.requeue + started.first_step)
    every = max(1, min(stage.steps, round(fails.interval() / seconds.seconds)))
    interval = every * seconds.seconds
    trained = stage.steps * stage.global_batch_size / pictures * seconds.seconds
    goodput = fails.goodput(interval)
    hours = trained / goodput / 3600 if goodput else math.inf
    return Forecast(
        gpus,
        pictures,
        batch,
        rate,
        seconds,
        images_per_second(seconds, cluster, batch),
        stage.load.memory(batch.pictures, gpus),
        fails,
        every,
        goodput,
        hours,
        hours * gpus * options.dollars,
        fails.failures(trained, interval),
    )
