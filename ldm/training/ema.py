"""Exponential moving average of the trainable parameters, in fp32, outside the module and outside DDP.

Updated once per optimizer step. Warm-up: decay_k = min(decay, (1 + k) / (10 + k)) after k updates, as in the
latent-diffusion line of work, so that the average forgets its random start. Beside it may go profiles whose
span grows with the run, see ldm/checkpoints/posthoc.py: at step t their decay is (1 - 1/t)^(g + 1).
Of parameters that are sharded over ranks, each rank averages its own rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.training.sharding import cut, local, sharded, sharded_parts, whole


class EMA:
    """`average` holds one fp32 tensor for each trainable parameter of `module`, on the parameter's device.

    `profiles` holds as many again for each of `lengths`.
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999, lengths: Sequence[float] = ()) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay={decay} must be in [0, 1)")
        self.decay = decay
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.names = list(named)
        self.parameters: list[Tensor] = list(named.values())
        self.sharded = sharded_parts(module)
        self.average = [
            p.detach().clone().to(torch.promote_types(p.dtype, torch.float32)) for p in self._rows()
        ]
        self.as_they_are = not self.sharded and all(p.dtype == a.dtype for p, a in self._pairs())
        self.exponents = _exponents(lengths)
        self.profiles = {length: [a.clone() for a in self.average] for length in lengths}

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.parameters, self.average, strict=True)

    def by_parameter(self) -> dict[Tensor, Tensor]:
        """The average of each parameter; of a sharded one its rows."""
        return dict(self._pairs())

    def decay_at(self, updates: int) -> float:
        """Decay of the update that follows `updates` earlier ones."""
        return min(self.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """average <- decay * average + (1 - decay) * parameter, all tensors of each in one foreach call."""
        torch._foreach_lerp_(self.average, self._current(), 1 - self.decay_at(updates))
        self.update_profiles(updates)

    @torch.no_grad()
    def update_profiles(self, updates: int) -> None:
        """The part of `update` that is left where an optimizer gives `average` itself."""
        current = self._current() if self.profiles else []
        for length, profile in self.profiles.items():
            decay = (1 - 1 / (updates + 1)) ** (self.exponents[length] + 1)
            torch._foreach_lerp_(profile, current, 1 - decay)

    def _current(self) -> list[Tensor]:
        if self.as_they_are:
            return self.parameters
        return [p.detach().to(a.dtype) for p, a in zip(self._rows(), self.average, strict=True)]

    def _rows(self) -> list[Tensor]:
        """What this rank has of the parameters."""
        return [local(p) for p in self.parameters]

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the module computes with the averages; its own weights come back after, bit for bit.

        Of a sharded module all ranks must come in, and are then free to compute or not.
        """
        if self.sharded:
            with self._swapped_rows():
                yield
            return
        own = [p.data for p in self.parameters]
        try:
            for p, a in zip(self.parameters, self.average, strict=True):
                p.data = a.to(p.dtype)
            yield
        finally:
            for p, data in zip(self.parameters, own, strict=True):
                p.data = data

    @contextmanager
    def _swapped_rows(self) -> Iterator[None]:
        rows = [row.detach() for row in self._rows()]
        own = [row.clone() for row in rows]
        torch._foreach_copy_(rows, self.average)
        try:
            with whole(self.sharded):
                yield
        finally:
            torch._foreach_copy_(rows, own)

    def state_dict(self, length: float | None = None) -> dict[str, Tensor]:
        """The average by parameter name, or the profile of `length`; sharded as the parameters are."""
        chosen = self.average if length is None else self.profiles[length]
        pairs = zip(chosen, self.parameters, strict=True)
        return dict(zip(self.names, (sharded(a, p) for a, p in pairs), strict=True))

    def load_state_dict(self, state: Mapping[str, Any], length: float | None = None) -> None:
        """`state` has whole tensors, maybe read lazily, whether or not the module is sharded."""
        if set(state) != set(self.names):
            missing, extra = sorted(set(self.names) - set(state)), sorted(set(state) - set(self.names))
            raise ValueError(
                f"EMA state has other names than the module: missing {missing[:3]}, extra {extra[:3]}"
            )
        chosen = self.average if length is None else self.profiles[length]
        for name, a, p in zip(self.names, chosen, self.parameters, strict=True):
            a.copy_(cut(state[name], p))


def _exponents(lengths: Sequence[float]) -> dict[float, float]:
    if not lengths:
        return {}
    from ldm.checkpoints.posthoc import exponent  # late: it reads files, and this file needs torch alone

    return {length: exponent(length) for length in lengths}
