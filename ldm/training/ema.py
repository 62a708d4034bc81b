"""Exponential moving average of the trainable parameters, in fp32, outside the module and outside DDP.

Updated once per optimizer step. Warm-up: decay_k = min(decay, (1 + k) / (10 + k)) after k updates, as in the
latent-diffusion line of work, so that the average forgets its random start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """`average` holds one fp32 tensor for each trainable parameter of `module`, on the parameter's device."""

    def __init__(self, module: nn.Module, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay={decay} must be in [0, 1)")
        self.decay = decay
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.names = list(named)
        self.parameters = list(named.values())
        self.average = [
            p.detach().clone().to(torch.promote_types(p.dtype, torch.float32)) for p in named.values()
        ]

    def decay_at(self, updates: int) -> float:
        """Decay of the update that follows `updates` earlier ones."""
        return min(self.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """average <- decay * average + (1 - decay) * parameter, all tensors in one foreach call."""
        current = [p.to(a.dtype) for p, a in zip(self.parameters, self.average, strict=True)]
        torch._foreach_lerp_(self.average, current, 1 - self.decay_at(updates))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the module computes with the averages; its own weights come back after, bit for bit."""
        own = [p.data for p in self.parameters]
        try:
            for p, a in zip(self.parameters, self.average, strict=True):
                p.data = a.to(p.dtype)
            yield
        finally:
            for p, data in zip(self.parameters, own, strict=True):
                p.data = data

    def state_dict(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.average, strict=True))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if set(state) != set(self.names):
            missing, extra = sorted(set(self.names) - set(state)), sorted(set(state) - set(self.names))
            raise ValueError(
                f"EMA state has other names than the module: missing {missing[:3]}, extra {extra[:3]}"
            )
        for name, a in zip(self.names, self.average, strict=True):
            a.copy_(state[name])
