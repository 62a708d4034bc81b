"""Floating-point operations that a picture costs to train, and what a device can do: together the MFU.

Counted once on the meta device, from the config and the shapes of a real batch: nothing is computed, and no
step is slowed. Counted are the multiplications and additions of matrix products, convolutions and attention,
forward and backward, once each: what gradient checkpointing computes again is no progress and not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.training.adversarial_module import AdversarialAutoencoderModule
from ldm.training.assembly import build_module
from ldm.training.module import TrainingModule
from ldm.training.summary import without_weights
from ldm.types import Batch

# Dense bf16 matrix products of a device, FLOP/s, by what its name begins with; the first that fits counts.
# NVIDIA's data sheets state the figure with 2:4 sparsity for most: half of it is the dense one.
# (H100: nvidia.com/h100, SXM 1,979 / 2, NVL 1,671 / 2, PCIe 1,513 / 2; H200: nvidia.com/h200, 1,979 / 2;
# B200, GB200: Blackwell data sheet, 4,500 / 2 and 5,000 / 2; A100: nvidia.com/a100, 312 dense; A40 149.7,
# A10 125, L40S 362.05 dense, L40 362.1 / 2, L4 242 / 2: data sheets of these names; RTX 4090 165.2, 3090 71:
# Ada (1.1) and Ampere GA102 white papers, with fp32 accumulation.)
PEAKS: tuple[tuple[str, float], ...] = (
    ("NVIDIA H100 PCIe", 756.5e12),
    ("NVIDIA H100 NVL", 835.5e12),
    ("NVIDIA H100", 989.5e12),
    ("NVIDIA GH200", 989.5e12),
    ("NVIDIA H200 NVL", 835.5e12),
    ("NVIDIA H200", 989.5e12),
    ("NVIDIA GB200", 2500e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA A40", 149.7e12),
    ("NVIDIA A10G", 0.0),  # a cut-down A10 without a data sheet: not known
    ("NVIDIA A10", 125e12),
    ("NVIDIA L40S", 362.05e12),
    ("NVIDIA L40", 181.05e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA GeForce RTX 4090", 165.2e12),
    ("NVIDIA GeForce RTX 3090", 71e12),
)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s that the maker gives for the device, or None where that is not known."""
    return None if device.type != "cuda" else peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """The same by the name that torch has for it."""
    words = name.split()
    for known, peak in PEAKS:
        if words[: len(known.split())] == known.split() or name.startswith(f"{known}-"):
            return peak or None
    return None


def flops_per_image(cfg: Mapping[str, Any], batch: Batch, step: int = 0) -> float:
    """Of a training step on pictures like those of `batch`, which gives the shapes alone.

    `step`: a discriminator counts if it is trained at that step. The generators of random numbers stay.
    """
    with torch.random.fork_rng(devices=[]):
        module = build_module(without_weights(cfg), device="meta").train()
    for part in _modules(module):
        if hasattr(part, "gradient_checkpointing"):
            part.gradient_checkpointing = False  # type: ignore[assignment]
    shapes = batch.to("meta")
    with FlopCounterMode(display=False) as counter:
        _loss(module, shapes, step).backward()
    return counter.get_total_flops() / len(batch)


def _loss(module: TrainingModule, batch: Batch, step: int) -> torch.Tensor:
    if not isinstance(module, AdversarialAutoencoderModule):
        return cast(torch.Tensor, module.training_step(batch, 0))
    module.trainer = SimpleNamespace(accumulate_grad_batches=1)  # type: ignore[assignment]
    images, reconstruction, loss = module.reconstruct_and_judge(batch)
    return loss + module._judge(images, reconstruction, batch.weight) if step >= module.start else loss


def _modules(module: TrainingModule) -> list[nn.Module]:
    return [part for network in (module, *module.frozen.values()) for part in network.modules()]
