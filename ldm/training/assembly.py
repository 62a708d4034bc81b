"""From the sections of a composed config to the module and callbacks that Lightning fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from ldm.checkpoints import native
from ldm.checkpoints.networks import load_network
from ldm.checkpoints.run import Stage
from ldm.config import build
from ldm.errors import InputError
from ldm.training.callbacks.checkpoint import Checkpoints, load_strict, weights_of
from ldm.training.callbacks.latents import LatentStatistics
from ldm.training.callbacks.metrics import MetricsLog
from ldm.training.callbacks.progress import ProgressBar
from ldm.training.module import TrainingModule

NETWORKS = ("autoencoder", "conditioner", "backbone", "noise_scheduler")

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


def build_module(cfg: Mapping[str, Any]) -> TrainingModule:
    """The LightningModule of the config, with the networks that its config has, all channels last."""
    torch.manual_seed(cfg["seed"])  # initial weights; all later random numbers are keyed
    parts = {name: build(cfg[name]) for name in NETWORKS if cfg.get(name) is not None}
    parts |= {"optimizer": build(cfg["optimizer"]), "lr_schedule": build(cfg["lr_schedule"])}
    module: TrainingModule = build(cfg["module"], **parts)
    return module.to(memory_format=torch.channels_last)


def checkpoint_bytes(module: TrainingModule) -> int:
    """About what a checkpoint takes on disk: the weights, their average, and two moments, each float32."""
    return 4 * 4 * sum(p.numel() for p in module.parameters() if p.requires_grad)


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
    cfg: Mapping[str, Any], stage: Stage, checkpoints: Checkpoints
) -> tuple[list[pl.Callback], MetricsLog]:
    """All callbacks in the order they act: what is measured at a step is in that step's checkpoint."""
    section = cfg["callbacks"]
    metrics = build(section["metrics"], path=stage.folder / "metrics.csv")
    pictures = {"folder": stage.samples}
    if cfg.get("sampler") is not None:
        pictures["sampler"] = build(cfg["sampler"])
    callbacks = [
        metrics,
        LatentStatistics(),
        build(section["validation"], metrics=metrics),
        build(section["pictures"], **pictures),
        ProgressBar(stage.name or "training", metrics),
        checkpoints,
    ]
    return callbacks, metrics


def build_trainer(cfg: Mapping[str, Any], callbacks: list[pl.Callback], datamodule: Any) -> pl.Trainer:
    """The trainer of the config, once its devices are there and the global batch can be dealt to them."""
    plugins = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else None
    try:
        trainer: pl.Trainer = build(
            cfg["trainer"],
            callbacks=callbacks,
            plugins=plugins,
            default_root_dir=cfg["run_dir"],
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
