"""Optimizer groups and learning-rate schedules; a schedule is a pure function of the optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

NORMS = (nn.GroupNorm, nn.LayerNorm, nn.Embedding)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and kernels with weight decay; biases, norms and embeddings without."""
    spared = {
        id(p)
        for m in module.modules()
        for p in m.parameters(recurse=False)
        if isinstance(m, NORMS) or p.ndim < 2
    }
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) not in spared], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True)
class Constant:
    """Linear warm-up over `warmup` optimizer steps, then 1."""

    warmup: int = 0

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine from 1 down to `final` at step `total`; `final` after it."""

    total: int
    warmup: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup >= self.total:
            raise ValueError(f"warmup={self.warmup} must be below total={self.total} steps")

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / (self.total - self.warmup))
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Linear:
    """Linear warm-up, then a straight line from 1 to `final` at step `total`; `final` after it."""

    total: int
    warmup: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup >= self.total:
            raise ValueError(f"warmup={self.warmup} must be below total={self.total} steps")

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 1 - (1 - self.final) * min(1.0, (step - self.warmup) / (self.total - self.warmup))
