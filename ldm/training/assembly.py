"""From the sections of a composed config to the module and callbacks that Lightning fits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from ldm.checkpoints import native
from ldm.checkpoints.networks import load_network
from ldm.checkpoints.posthoc import FOLDER
from ldm.checkpoints.run import RunDirectory, Stage
from ldm.config import build, compose, plain
from ldm.errors import InputError
from ldm.training.callbacks.checkpoint import Checkpoints, load_strict, weights_of
from ldm.training.callbacks.latents import LatentStatistics
from ldm.training.callbacks.loggers import Loggers
from ldm.training.callbacks.metrics import MetricsLog
from ldm.training.callbacks.progress import ProgressBar
from ldm.training.module import TrainingModule
from ldm.training.optim import freeze, parameter_rules

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
    """The configs of the experiments that `stages` names, under the same overrides, or the config alone."""
    common = [text for text in overrides if not text.startswith("experiment=")] + [f"run_name={cfg.run_name}"]
    return [compose("train", [f"experiment={name}", *common]) for name in cfg.stages or []] or [cfg]


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


def load_frozen(module: TrainingModule, name: str, source: str | None) -> dict[str, Tensor]:
    """Load the frozen network `name` from a checkpoint that trained it or names it; returns its tensors.

    Without a `source` nothing is loaded or returned.
    """
    if not source:
        return {}
    where = f"{name}_from"
    path = native.resolve(Path(source), where=where)
    state = native.load_document(path, "state.json")
    if name == "autoencoder" and state.get("latents_measured") == 0:
        what = f"{path} is not the end of its stage: its latent shift and scale are not measured"
        raise InputError(where, what, "let stage 1 finish")
    networks = state.get("networks", {})
    if name in networks:
        tensors, _ = load_network(path, networks[name])
    else:
        prefix = f"{name}."
        tensors = {k.removeprefix(prefix): v for k, v in weights_of(path).items() if k.startswith(prefix)}
    if not tensors:
        raise InputError(
            where, f"{path} holds no {name}", f"give a checkpoint of a stage that trained the {name}"
        )
    load_strict(module.frozen[name], tensors, f"{where}={source}")
    return tensors


def build_callbacks(
    cfg: Mapping[str, Any], run: RunDirectory, stage: Stage, checkpoints: Checkpoints
) -> tuple[list[pl.Callback], MetricsLog]:
    """All callbacks in the order they act: what is measured at a step is in that step's checkpoint."""
    section = cfg["callbacks"]
    metrics = build(section["metrics"], path=stage.folder / "metrics.csv")
    pictures = {"folder": stage.samples, "metrics": metrics}
    if cfg.get("sampler") is not None:
        pictures["sampler"] = build(cfg["sampler"])
    loggers = [build(logger) for logger in (cfg.get("logger") or {}).values() if logger is not None]
    callbacks = [
        metrics,
        LatentStatistics(),
        build(section["validation"], metrics=metrics),
        build(section["pictures"], **pictures),
        Loggers(loggers, metrics, run, stage, plain(cfg)),
        build(section["snapshots"], folder=stage.folder / FOLDER),
        ProgressBar(stage.name or "training", metrics),
        checkpoints,
    ]
    return callbacks, metrics


@contextmanager
def flags_restored() -> Iterator[None]:
    """After the block torch is as deterministic as before: `deterministic` is a matter of one run."""
    mode, benchmark = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    workspace = os.environ.get(WORKSPACE)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.backends.cudnn.benchmark = benchmark
        os.environ.pop(WORKSPACE, None)
        os.environ |= {} if workspace is None else {WORKSPACE: workspace}


def build_trainer(cfg: Mapping[str, Any], callbacks: list[pl.Callback], datamodule: Any) -> pl.Trainer:
    """The trainer of the config, once its devices are there and the global batch can be dealt to them."""
    plugins = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else None
    bits = {"deterministic": True, "benchmark": False} if cfg.get("deterministic") else {}
    try:
        trainer: pl.Trainer = build(
            cfg["trainer"],
            callbacks=callbacks,
            plugins=plugins,
            default_root_dir=cfg["run_dir"],
            **bits,
            **FITTING,
        )
    except MisconfigurationException as error:
        raise InputError("trainer", " ".join(str(error).split()), "trainer=cpu runs without a GPU") from None
    if cfg.get("report") and not hasattr(datamodule, "emoji_set"):
        raise InputError(
            "report", "measures the quickstart's pictures, and this is other data", "add report=null"
        )
    datamodule.check_batch(trainer.num_devices * trainer.num_nodes, trainer.accumulate_grad_batches)
    return trainer
