"""From the sections of a composed config to the module and callbacks that Lightning fits."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ldm.checkpoints.posthoc import FOLDER
from ldm.checkpoints.run import RunDirectory, Stage
from ldm.config import build, compose, plain, to_yaml
from ldm.errors import InputError
from ldm.nn.attention import use_fused_qkv
from ldm.nn.attention_choice import NAMES, use_attention
from ldm.nn.compiling import cache_folder, compile_blocks
from ldm.nn.norm import use_fused
from ldm.random import use_normal
from ldm.training import launch, loop, strategies
from ldm.training.callbacks.checkpoint import Checkpoints
from ldm.training.callbacks.data_health import DataHealth
from ldm.training.callbacks.latents import LatentStatistics
from ldm.training.callbacks.loggers import Loggers
from ldm.training.callbacks.metrics import MetricsLog
from ldm.training.callbacks.progress import ProgressBar
from ldm.training.callbacks.throughput import Throughput
from ldm.training.children import LAUNCHER, tie
from ldm.training.graphed import graphed
from ldm.training.module import TrainingModule
from ldm.training.optim import freeze, parameter_rules
from ldm.training.working_weights import working_weights

log = logging.getLogger(__name__)

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # set by Lightning before CUDA starts: cuBLAS sums in a fixed order
NETWORKS = ("autoencoder", "conditioner", "backbone", "noise_scheduler", "discriminator", "perceptual")

FITTING: dict[
    str, Any
] = {  # what is ours rather than Lightning's: checkpoints, bar, validation, sharding of data
    "max_epochs": -1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "use_distributed_sampler": False,
}


def build_stages(cfg: Any, overrides: list[str]) -> list[Any]:
    """The configs of the experiments that `stages` names, under the same overrides, or the config alone.

    `init_from` is not for stages that say themselves which stage they start from.
    """
    given = [text for text in overrides if not text.startswith("experiment=")] + [f"run_name={cfg.run_name}"]
    rest = [text for text in given if not text.startswith("init_from=")]
    stages = [compose("train", [f"experiment={name}", *rest]) for name in cfg.stages or []]
    if rest != given:
        names = [f"experiment={name}" for name in cfg.stages or []]
        pairs = zip(names, stages, strict=True)
        stages = [stage if stage.init_from else compose("train", [name, *given]) for name, stage in pairs]
    return stages or [cfg]


def build_module(cfg: Mapping[str, Any], device: str | None = None) -> TrainingModule:
    """The LightningModule of the config, with the networks that its config has, all channels last.

    `device="meta"` builds networks without memory, for `summary`.
    """
    torch.manual_seed(cfg["seed"])  # initial weights; all later random numbers are keyed
    parts: dict[str, Any] = {}
    for name in NETWORKS:
        with torch.device(device) if device else nullcontext():
            parts |= {name: build(cfg[name])} if cfg.get(name) is not None else {}
    parts |= {"optimizer": build(cfg["optimizer"]), "lr_schedule": build(cfg["lr_schedule"])}
    module: TrainingModule = build(cfg["module"], **parts)
    module.parameter_rules = parameter_rules(cfg.get("parameter_groups") or [])
    freeze(module, module.parameter_rules)
    return module.to(memory_format=torch.channels_last)


def checkpoint_bytes(module: TrainingModule) -> int:
    """About what a checkpoint takes on disk: the weights, their averages, and two moments, each float32."""
    judge: Any = getattr(module, "discriminator", None)
    beside = 3 * sum(p.numel() for p in judge.parameters()) if judge is not None else 0
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return 4 * ((4 + len(module.ema_lengths)) * trained + beside)


def build_callbacks(
    cfg: Mapping[str, Any], run: RunDirectory, stage: Stage, resume: Path | None
) -> tuple[list[pl.Callback], MetricsLog, Checkpoints]:
    """All callbacks in the order they act: what is measured at a step is in that step's checkpoint.

    `resume`: the checkpoint that the stage starts from.
    """
    section = cfg["callbacks"]
    guard, places = build(section["guard"]), {"folder": stage.checkpoints, "resume": resume}
    metrics = build(section["metrics"], path=stage.folder / "metrics.csv")
    own = {"guard": guard, "metrics": metrics, "run": run, "config": to_yaml(cfg)}
    checkpoints = build(section["checkpoint"], **own, **places)
    pictures = {"folder": stage.samples, "metrics": metrics}
    if cfg.get("sampler") is not None:
        pictures["sampler"] = build(cfg["sampler"])
    loggers = [build(logger) for logger in (cfg.get("logger") or {}).values() if logger is not None]
    callbacks = [
        *guards(section, run, stage, metrics),
        metrics,
        Throughput(metrics, plain(cfg), stage.name or run.name),
        DataHealth(metrics),
        LatentStatistics(),
        build(section["validation"], metrics=metrics),
        build(section["pictures"], **pictures),
        Loggers(loggers, metrics, run, stage, plain(cfg)),
        build(section["snapshots"], folder=stage.folder / FOLDER),
        ProgressBar(stage.name or "training", metrics),
        *benchmarks(section, stage, metrics, cfg),
        guard,
        checkpoints,
    ]
    return callbacks, metrics, checkpoints


def benchmarks(
    section: Mapping[str, Any], stage: Stage, metrics: MetricsLog, cfg: Mapping[str, Any]
) -> list[pl.Callback]:
    """What ends a run that is only measured."""
    if section.get("benchmark") is None:
        return []
    return [build(section["benchmark"], metrics=metrics, path=stage.folder / "bench.json", cfg=plain(cfg))]


def guards(
    section: Mapping[str, Any], run: RunDirectory, stage: Stage, metrics: MetricsLog
) -> list[pl.Callback]:
    """What watches over the run: each is off where the config has null."""
    given: dict[str, dict[str, Any]] = {
        "heartbeat": {"run": run, "stage": stage},
        "watchdog": {"run": run},
        "spikes": {"folder": stage.folder, "rows": metrics.every},
    }
    return [build(section[name], **more) for name, more in given.items() if section.get(name) is not None]


@contextmanager
def flags_restored() -> Iterator[None]:
    """After the block torch is as deterministic as before: `deterministic` is a matter of one run."""
    mode, benchmark = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    before = {name: os.environ.get(name) for name in (WORKSPACE, LAUNCHER)}
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.benchmark = benchmark
        use_fused(False)
        use_normal(None)
        use_fused_qkv(False)
        use_attention("default")
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}


def quicken(section: Mapping[str, Any], module: TrainingModule, deterministic: bool = False) -> None:
    """Do what the config's `speed` asks for: names, parameters and checkpoints stay."""
    attention = section.get("attention") or "default"
    if attention not in NAMES:
        raise InputError("speed.attention", f"{attention} is none of {', '.join(NAMES)}", "auto is fastest")
    if attention == "auto" and deterministic:
        what = "auto chooses by the clock, and deterministic=true asks for the same bits on every run"
        raise InputError("speed.attention", what, "name one: speed.attention=flash")
    use_fused(bool(section.get("fused_norm")))
    if section.get("fused_noise") and find_spec("triton") is not None:
        from ldm.nn.kernels.normal import keyed_normal

        use_normal(keyed_normal)
    use_fused_qkv(bool(section.get("fused_qkv")))
    use_attention(attention)
    if section.get("compile"):
        count = sum(map(compile_blocks, (module, *module.frozen.values())))
        folder = cache_folder()
        kept = f"kept in {folder} (TORCHINDUCTOR_CACHE_DIR)" if folder else "not kept"
        log.info("speed.compile: %d blocks, compiled when first used; their code is %s", count, kept)


def build_trainer(
    cfg: Mapping[str, Any], callbacks: list[pl.Callback], datamodule: Any, module: TrainingModule
) -> pl.Trainer:
    """The trainer of the config, if its devices are there, can train the module and share the batch."""
    tie()
    section = cfg["trainer"]
    environment = launch.cluster_environment(section)
    more: dict[str, Any] = {"deterministic": True, "benchmark": False} if cfg.get("deterministic") else {}
    processes = (launch.devices_of(section) or 1) * int(section.get("num_nodes") or 1)
    if (strategy := strategies.named(section, processes)) is not None:
        more |= {"strategy": strategy}
    try:
        trainer: pl.Trainer = build(
            section,
            callbacks=callbacks,
            plugins=environment,
            default_root_dir=cfg["run_dir"],
            **more,
            **FITTING,
        )
    except MisconfigurationException as error:
        raise InputError("trainer", " ".join(str(error).split()), "trainer=cpu runs without a GPU") from None
    if cfg.get("report") and not hasattr(datamodule, "emoji_set"):
        raise InputError(
            "report", "measures the quickstart's pictures, and this is other data", "add report=null"
        )
    loop.install(trainer, module)
    strategies.check(trainer, module)
    speed, steps = cfg.get("speed") or {}, cast(Any, trainer.fit_loop.epoch_loop)
    ours = isinstance(steps, loop.StepLoop)
    quicken(speed, module, bool(cfg.get("deterministic")))
    if speed.get("bf16_weights"):
        steps.working = working_weights(trainer, module, ours, bool(speed.get("cuda_graph")))
    if speed.get("cuda_graph"):
        steps.graphed = graphed(trainer, module, datamodule, ours)
    datamodule.check_batch(trainer.num_devices * trainer.num_nodes, trainer.accumulate_grad_batches)
    launch.note_run(cfg["run_dir"])
    return trainer
