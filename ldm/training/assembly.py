"""From the sections of a composed config to the module and callbacks that Lightning fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
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
    """The LightningModule of the config, with the networks that its config has."""
    parts = {name: build(cfg[name]) for name in NETWORKS if cfg.get(name) is not None}
    return build(
        cfg["module"], optimizer=build(cfg["optimizer"]), lr_schedule=build(cfg["lr_schedule"]), **parts
    )


def load_frozen(module: TrainingModule, name: str, source: Path) -> dict[str, Tensor]:
    """Load the frozen network `name` from a checkpoint that trained it or refers to it; returns its tensors."""
    where = f"{name}_from"
    path = native.resolve(source, where=where)
    networks = native.load_document(path, "state.json").get("networks", {})
    if name in networks:
        tensors, _ = load_network(path, networks[name])
    else:
        prefix = f"{name}."
        tensors = {k.removeprefix(prefix): v for k, v in weights_of(path).items() if k.startswith(prefix)}
    if not tensors:
        raise InputError(
            where, f"{path} holds no {name}", f"give a checkpoint of a stage that trained the {name}"
        )
    load_strict(module.frozen[name], tensors, path)
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
