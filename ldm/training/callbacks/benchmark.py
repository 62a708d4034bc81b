"""How fast a run is, and what would make it faster: what `debug=bench` and `experiment=bench` end with.

The loop is that of every training, with all its callbacks. Clocks are read where the device has done what it
was told, at the ends of windows of some steps; what a step does before `warm_up` is start-up.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, cast

import lightning.pytorch as pl
import torch

from ldm.checkpoints.files import replace
from ldm.training.callbacks.base import StepCallback, spared
from ldm.training.callbacks.metrics import MetricsLog
from ldm.training.callbacks.throughput import memory
from ldm.training.module import TrainingModule
from ldm.types import Batch

LEAST = 3  # windows
log = logging.getLogger(__name__)


@dataclass
class Facts:
    """What was measured, in seconds, bytes, FLOP and shares of 1; None: not known here."""

    device: str
    devices: int
    precision: str
    batch: int  # pictures a device and micro-batch
    steps: int  # that were timed
    images_per_s: float  # of all devices: median of windows
    quartiles: tuple[float, float]
    data_wait: float  # share of the time
    encoders: float | None  # share of a step, of frozen encoders that `ldm data cache` would run once
    flop_per_image: float | None
    peak: float  # FLOP/s of a device
    peak_is: str
    memory: float  # the most on the device, of tensors; without one, of the process
    memory_total: float
    host_memory: float
    start: float  # of the process, until training began
    first_step: float
    workers: int
    cores: int
    threads: int
    options: dict[str, bool]

    @property
    def mfu(self) -> float | None:
        rate = self.images_per_s / self.devices
        return rate * self.flop_per_image / self.peak if self.flop_per_image else None

    def lines(self) -> list[str]:
        low, high = self.quartiles
        each = f", {self.images_per_s / self.devices:,.4g} a device" if self.devices > 1 else ""
        rows = [("images/s", f"{self.images_per_s:,.4g} (quartiles {low:,.4g} .. {high:,.4g}){each}")]
        if self.flop_per_image and self.mfu is not None:
            rate = self.flop_per_image * self.images_per_s / self.devices
            what = f"{flop(self.flop_per_image)} a picture, {flop(rate)}/s a device"
            rows.append(("work", f"{what}: MFU {self.mfu:.1%} of {flop(self.peak)}/s, {self.peak_is}"))
        waits = [f"data {self.data_wait:.1%} of the time"]
        if self.encoders is not None:
            waits.append(f"frozen encoders {self.encoders:.1%} of a step")
        rows.append(("waits", ", ".join(waits)))
        held = f"{self.memory / 1e9:.1f} GB of {self.memory_total / 1e9:.0f} GB"
        host = f", {self.host_memory / 1e9:.1f} GB of the process on the host" if self.device != "cpu" else ""
        rows.append(("memory", f"{held} {'on the device' if host else 'of this machine'}{host}"))
        rows.append(("start", f"{self.start:.1f} s until training began, first step {self.first_step:.1f} s"))
        found = advice(self)
        rows += [("faster" if k == 0 else "", text) for k, text in enumerate(found)]
        if not found:
            rows.append(("faster", "nothing to say: what the table of docs/performance.md names is on"))
        return [f"{name:<11}  {text}" for name, text in rows]


def advice(facts: Facts) -> list[str]:
    """What to change, the most promising first: by the share of time measured, else by what others found."""
    found: list[tuple[float, str]] = []
    gpu, on = facts.device != "cpu", facts.options
    wait, spare = facts.data_wait, max(facts.cores - facts.devices, 1) // facts.devices
    shares = []  # of the time, that a cache of latents would save
    if wait > 0.03:
        gain, told = wait / (1 - wait), f"{wait:.0%} of the time went into waiting for data"
        if facts.workers < spare:
            found.append((gain, f"data.num_workers={spare} (now {facts.workers}): {told}"))
        elif not on["cached"]:
            shares.append((wait, f"{told}, and all cores read"))
        else:
            found.append((gain, f"faster storage, or data.cache_dir on the node's own disk: {told}"))
    if (facts.encoders or 0) > 0.05:
        share = cast(float, facts.encoders)
        shares.append((share, f"encoders that are not trained take {share:.0%} of a step"))
    if shares:
        saved = min(sum(share for share, _ in shares), 0.99)
        told = "; ".join(text for _, text in shares)
        found.append((saved / (1 - saved), f"`ldm data cache` makes latents once (docs/cache.md): {told}"))
    if gpu and facts.precision.startswith("32"):
        found.append((1.0, "trainer.precision=bf16-mixed: float32 leaves most of the device unused"))
    if on["gradient_checkpointing"] and facts.memory < 0.5 * facts.memory_total:
        found.append(
            (0.33, "backbone.gradient_checkpointing=false: there is room, and it computes a third again")
        )
    if gpu and not on["compile"]:
        found.append(
            (0.15, "speed.compile=true: a minute or two at the start, then fewer and larger kernels")
        )
    if gpu and not on["fused_norm"]:
        found.append(
            (0.12, "speed.fused_norm=true: group norm and SiLU in one kernel, in the layout of convolutions")
        )
    if gpu and facts.memory < 0.6 * facts.memory_total:
        share = facts.memory / facts.memory_total
        found.append((0.1, f"a larger batch (now {facts.batch} a device): {share:.0%} of the memory is used"))
    if gpu and on["deterministic"]:
        found.append((0.1, "deterministic=false: its kernels are slower"))
    if not gpu and facts.threads < facts.cores - facts.workers:
        what = f"OMP_NUM_THREADS={facts.cores - facts.workers} (now {facts.threads}): cores are idle"
        found.append(((facts.cores - facts.workers) / facts.threads - 1, what))
    return [text for _, text in sorted(found, key=lambda one: -one[0])]


class Benchmark(StepCallback):
    """Ends the run after `seconds` of training; its table becomes the run's result, its numbers bench.json.

    Goes behind `metrics`. `every`: optimizer steps of a window; `warm_up`: steps before the first.
    """

    def __init__(
        self,
        metrics: MetricsLog,
        path: Path,
        cfg: Mapping[str, Any],
        seconds: float = 90.0,
        every: int = 5,
        warm_up: int = 5,
    ) -> None:
        super().__init__()
        if seconds <= 0 or every < 1 or warm_up < 1:
            raise ValueError(f"seconds={seconds}, every={every} and warm_up={warm_up} must be above 0")
        self.metrics, self.path, self.cfg = metrics, path, cfg
        self.seconds, self.window, self.warm_up = seconds, every, warm_up
        self.windows: list[tuple[float, float]] = []  # (seconds, of them waited for data)
        self._began = self._mark = self._waited = self._start = self._first = 0.0
        self._steps, self._batch = 0, cast(Batch, None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._start, self._began = process_seconds(), time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += time.perf_counter() - cast(TrainingModule, pl_module).batch_ended
        self._batch = batch

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, step: int) -> None:
        self._steps += 1
        timed = self._steps - self.warm_up
        if self._steps > 1 and (timed < 0 or timed % self.window):
            return
        now = settled(module.device)
        if self._steps == 1:
            self._first = now - self._began
        if timed > 0:
            self.windows.append((now - self._mark, self._waited))
        self._mark, self._waited = now, 0.0
        enough = len(self.windows) >= LEAST and now - self._began >= self.seconds
        if trainer.world_size > 1:  # the ranks' clocks differ
            enough = trainer.strategy.broadcast(enough)
        trainer.should_stop = trainer.should_stop or enough

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or not self.windows:
            return
        module = cast(TrainingModule, pl_module)
        module.alive("the benchmark's end", long=True)
        facts = self._facts(trainer, module)
        with spared(f"{self.path}"):
            replace(
                self.path,
                json.dumps({**asdict(facts), "mfu": facts.mfu, "advice": advice(facts)}, indent=1) + "\n",
            )
        self.metrics.closing = "\n".join(["", *facts.lines()])

    def _facts(self, trainer: pl.Trainer, module: TrainingModule) -> Facts:
        device, data = module.device, cast(Any, trainer).datamodule
        each = self.window * data.global_batch_size
        rates = [each / seconds for seconds, _ in self.windows]
        low, _, high = quantiles(rates, n=4) if len(rates) > 1 else rates * 3
        spent, waited = (sum(column) for column in zip(*self.windows, strict=True))
        step = median(seconds for seconds, _ in self.windows) / self.window
        peak, peak_is = peak_of(device, str(trainer.precision))
        speed, backbone = self.cfg.get("speed") or {}, self.cfg.get("backbone") or {}
        affine = hasattr(os, "sched_getaffinity")  # not on every system
        cores = len(os.sched_getaffinity(0)) if affine else os.cpu_count()
        return Facts(
            device=device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
            devices=trainer.world_size,
            precision=str(trainer.precision),
            batch=len(self._batch),
            steps=self.window * len(self.windows),
            images_per_s=median(rates),
            quartiles=(low, high),
            data_wait=waited / spent,
            encoders=self._encoders(trainer, module, step),
            flop_per_image=self._flop(trainer.global_step),
            peak=peak,
            peak_is=peak_is,
            memory=1e9 * memory(device),
            memory_total=memory_of(device),
            host_memory=1e9 * memory(torch.device("cpu")),
            start=self._start,
            first_step=self._first,
            workers=int(self.cfg["data"].get("num_workers") or 0),
            cores=cores or 1,
            threads=torch.get_num_threads(),
            options={
                "compile": bool(speed.get("compile")),
                "fused_norm": bool(speed.get("fused_norm")),
                "gradient_checkpointing": bool(backbone.get("gradient_checkpointing")),
                "deterministic": bool(self.cfg.get("deterministic")),
                "cached": self._batch.moments is not None,
            },
        )

    def _flop(self, step: int) -> float | None:
        from ldm.training.flops import flops_per_image  # late: its importer is `assembly`, which it uses

        try:
            return flops_per_image(self.cfg, self._batch, step) or None
        except Exception as error:  # a network that cannot be counted has no MFU
            log.warning("no MFU: its operations cannot be counted (%s: %s)", type(error).__name__, error)
            return None

    def _encoders(self, trainer: pl.Trainer, module: Any, step: float) -> float | None:
        """Share of a step that pictures and captions take to become what is trained on, as a cache has it."""
        works: list[Callable[[], Any]] = []
        if hasattr(module, "latents") and self._batch.moments is None:
            works.append(lambda: module.latents(self._batch, "benchmark"))
        if hasattr(module, "condition") and "conditioner" in module.frozen:
            works.append(lambda: module.condition(self._batch))
        if not works:
            return None
        micro = trainer.accumulate_grad_batches
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            took = []
            for _ in range(LEAST + 1):
                began = settled(module.device)
                for work in works:
                    work()
                took.append(settled(module.device) - began)
        return min(1.0, micro * median(took[1:]) / step)


def flop(count: float) -> str:
    """With a prefix that leaves one to three digits before the point."""
    return f"{count / 1e12:,.3g} TFLOP" if count >= 1e12 else f"{count / 1e9:,.3g} GFLOP"


def settled(device: torch.device) -> float:
    """time.perf_counter() when the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_of(device: torch.device, precision: str) -> tuple[float, str]:
    """(FLOP/s, what that is): the maker's figure, else what a large matrix product reaches here."""
    from ldm.training.flops import peak_flops

    if (known := peak_flops(device)) is not None:
        return known, "the maker's figure for bf16"
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    side = 4096 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    took = []
    for _ in range(6):
        began = settled(device)
        a @ a
        took.append(settled(device) - began)
    name = str(dtype).removeprefix("torch.")
    return 2 * side**3 / min(took[1:]), f"a matrix product of {side} in {name} here"


def memory_of(device: torch.device) -> float:
    """Bytes of the device's memory, or of this machine's."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def process_seconds() -> float:
    """Since this process began; where the system does not say, since it last asked the clock for its time."""
    try:
        born = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - born / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return time.process_time()
