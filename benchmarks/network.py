"""One training step of a small U-Net on a CPU, against the same network of diffusers (C12).

Both start from the same weights and see the same numbers; their losses must agree at every step. A step is
forward, backward and AdamW, fp32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import harness
from benchmarks.harness import Measured
from ldm.backbones.unet import CrossAttentionUNet
from ldm.types import Conditioning

CHANNELS, WIDTH, HEAD, GROUPS = (64, 128), 64, 32, 16
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours() -> tuple[nn.Module, Forward]:
    net = CrossAttentionUNet(
        block_out_channels=CHANNELS,
        layers_per_block=1,
        transformer_depth=(0, 1),
        head_dim=HEAD,
        context_dim=WIDTH,
        linear_projection=True,
        norm_groups=GROUPS,
    )
    return net, lambda x, t, context: net(x, t, Conditioning(context=context))


def theirs() -> tuple[nn.Module, Forward]:
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=tuple(c // HEAD for c in CHANNELS),
        cross_attention_dim=WIDTH,
        use_linear_projection=True,
        norm_num_groups=GROUPS,
    )
    return net, lambda x, t, context: net(x, t, context).sample


class Contestant:
    """A network, its optimizer, and the losses of its steps."""

    def __init__(
        self, make: Callable[[], tuple[nn.Module, Forward]], weights: Any, last: bool, compiled: bool
    ):
        self.net, self.forward = make()
        self.net.load_state_dict(weights)
        self.net.train()
        if last:
            self.net.to(memory_format=torch.channels_last)
        if compiled:
            self.net.compile()
        self.last, self.losses = last, []
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4, fused=True)

    def step(self, x: Tensor, t: Tensor, context: Tensor) -> None:
        x = x.contiguous(memory_format=torch.channels_last) if self.last else x
        loss = F.mse_loss(self.forward(x, t, context), x)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())


def batches(batch: int, size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(batch, 4, size, size, generator=generator),
            torch.randint(0, 1000, (batch,), generator=generator).float(),
            torch.randn(batch, 16, WIDTH, generator=generator),
        )
        for _ in range(4)
    ]


def training_step(
    rounds: int, batch: int = 8, size: int = 32, steps: int = 6, compiled: bool = True
) -> list[Any]:
    if harness.missing("diffusers") is not None:
        return [harness.Table("C12", "diffusers is not installed: nothing to compare with.", [""], [], {})]
    torch.manual_seed(0)
    net, data = ours()[0], batches(batch, size)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))  # also where a fresh network has zeros
    make = partial(Contestant, weights=net.state_dict())
    entries = {"ours": (ours, True, False), "diffusers, eager": (theirs, False, False)}
    entries["diffusers, eager, channels_last"] = (theirs, True, False)
    if compiled:
        entries["ours, compiled"] = (ours, True, True)
        entries["diffusers, compiled, channels_last"] = (theirs, True, True)
    contestants = {name: make(kind, last=last, compiled=c) for name, (kind, last, c) in entries.items()}
    for each in contestants.values():
        for values in data[:2]:
            each.step(*values)

    def turn(each: Contestant) -> Measured:
        began, cpu = time.perf_counter(), time.process_time()
        for i in range(steps):
            each.step(*data[i % len(data)])
        return Measured(steps * batch, time.perf_counter() - began, time.process_time() - cpu)

    turns = {name: partial(turn, each) for name, each in contestants.items()}
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    what = f"Forward, backward, AdamW: {millions:.1f} M parameters, batch {batch} of 4 x {size} x {size}."
    eager = {name: work for name, work in turns.items() if "compiled" not in name}
    found = [harness.race("C12 eager", what, eager, rounds, "images", {"diffusers, eager": 1.15})]
    if compiled:
        both = {name: work for name, work in turns.items() if "compiled" in name}
        goals = {"diffusers, compiled, channels_last": 1.0}
        found.append(harness.race("C12 compiled", what, both, rounds, "images", goals))
    mine = torch.stack(contestants["ours"].losses)
    for name, each in contestants.items():
        torch.testing.assert_close(
            torch.stack(each.losses), mine, rtol=1e-3, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
    return found
