"""Gradient checkpointing of a block (Chen et al., "Training deep nets with sublinear memory cost", 2016)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def run(block: nn.Module, *args: Any, recompute: bool, random: bool = False) -> Any:
    """`block(*args)`, whose activations the backward pass computes again if `recompute`.

    `random` says that the block draws random numbers (dropout), so that the same are drawn again; without
    it the generators are left alone, which a CUDA graph needs.
    """
    if not (recompute and torch.is_grad_enabled()):
        return block(*args)
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=random)
