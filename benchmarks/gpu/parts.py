"""Pieces of a step and of sampling on their own: optimizer (G4), group norm (G5), attention (G5A),
start (G7), encoder (G9), sampling (G11), a steady run (G13)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu import device, step
from benchmarks.gpu.device import DEVICE, TOY
from ldm.nn import norm
from ldm.nn.attention_choice import KERNELS, Shape, seconds_of
from ldm.types import Conditioning, GridRow


def optimizer() -> Iterator[dict[str, Any]]:
    """G4: clipping, AdamW and EMA of SD 1's parameters; bytes moved over the time they took."""
    parameters = [p.detach().requires_grad_() for p in device.unet("sd1").parameters()]
    for p in parameters:
        p.grad = torch.randn_like(p)
    average = [p.detach().clone() for p in parameters]
    fused = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    count = sum(p.numel() for p in parameters)

    @torch.no_grad()
    def ours() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        fused.step()
        torch._foreach_lerp_(average, parameters, 1e-4)

    @torch.no_grad()
    def peers() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        fused.step()
        torch._foreach_sub_(average, torch._foreach_mul(torch._foreach_sub(average, parameters), 1e-4))

    moments = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    gradients = [p.grad for p in parameters if p.grad is not None]
    told = torch.tensor([1.0, 1.0, 0.1, 0.03], device=DEVICE)

    @torch.no_grad()
    def one_pass() -> None:
        from ldm.nn.kernels.adamw import Table

        norm = torch.nn.utils.get_total_norm(gradients)
        told[1] = (1.0 / (norm + 1e-6)).clamp(max=1.0)
        made = Table.of([parameters, gradients, *moments, average], tables[-1] if tables else None)
        tables[:] = [made]
        made.step(told, 1e-4, (0.9, 0.999), 1e-8, 0.01, 1e-4)

    tables: list[Any] = []
    rows: list[tuple[str, Callable[[], None], int]] = [
        ("one pass", one_pass, 1 + 9),
        ("clip, AdamW, EMA by lerp", ours, 3 + 7 + 3),
        ("clip, AdamW, EMA as diffusers' foreach", peers, 3 + 7 + 8),
    ]
    if TOY:
        rows = rows[1:] if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1" else rows
    for name, work, passes in rows:
        timing = device.clocked(work, 3, 5, 10)
        moved = 4 * count * passes
        yield {"setting": name, **timing.figures(), "bytes": moved, "tb_per_s": moved / timing.median / 1e12}


NORMS = (
    (320, 64),
    (640, 32),
    (640, 64),
    (960, 64),
    (1280, 16),
    (1280, 32),
    (1920, 32),
    (2560, 16),
    (2560, 8),
)


def group_norms() -> Iterator[dict[str, Any]]:
    """G5: group norm and SiLU of channels-last bf16 at SD's shapes, batch 32; forward and backward."""
    for channels, side in NORMS[:2] if TOY else NORMS:
        count, side = (1, 4) if TOY else (32, side)
        layer = nn.GroupNorm(32, channels, device=DEVICE)
        x = torch.randn(count, channels, side, side, device=DEVICE, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        dy = torch.randn_like(x)

        def plain(layer: nn.GroupNorm = layer, x: Tensor = x) -> Tensor:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                return F.silu(layer(x)).to(x.dtype)

        def fused(layer: nn.GroupNorm = layer, x: Tensor = x) -> Tensor:
            norm.use_fused(True)
            try:
                return norm.group_norm(x, layer, silu=True)
            finally:
                norm.use_fused(False)

        works: dict[str, Callable[[], Tensor]] = {"torch": plain, "ours": fused}
        if not TOY:
            works["inductor"] = torch.compile(plain, dynamic=False)

        def both(work: Callable[[], Tensor], dy: Tensor = dy, x: Tensor = x) -> None:
            torch.autograd.grad(work(), [x], dy.contiguous(memory_format=torch.channels_last))

        for name, work in works.items():
            forward = device.clocked(lambda work=work: work().detach(), 10, 5, 30).median
            whole = device.clocked(partial(both, work), 10, 5, 30).median
            moved = x.numel() * 2 * 3  # read twice, written once
            row = {"setting": name, "channels": channels, "side": side, "mb": x.numel() * 2 / 1e6}
            row |= {"forward_s": forward, "forward_tb_per_s": moved / forward / 1e12}
            yield row | {"forward_and_backward_s": whole}


ATTENTIONS = (  # heads, queries, keys, width of a head
    (5, 4096, 4096, 64),
    (10, 1024, 1024, 64),
    (20, 256, 256, 64),
    (20, 64, 64, 64),
    (8, 4096, 4096, 40),
    (5, 4096, 77, 64),
    (20, 256, 77, 64),
)


def attentions() -> Iterator[dict[str, Any]]:
    """G5A: each kernel of attention at shapes of SD 2 and (width 40) SD 1, batch 16, bf16, both passes."""
    for heads, queries, keys, width in ATTENTIONS[:1] if TOY else ATTENTIONS:
        count, queries, keys = (1, 8, 8) if TOY else (16, queries, keys)
        row = heads * width
        shape = Shape(count, heads, queries, keys, width, row, row, torch.bfloat16, masked=False, grad=True)
        found = {name: seconds_of(shape, name, DEVICE.type) for name in KERNELS if name != "math"}
        times = {f"{name}_ms": 1e3 * value for name, value in found.items() if value is not None}
        yield {"setting": str(shape), **times}


def start() -> Iterator[dict[str, Any]]:
    """G7: the first step of a process whose compiled code is cached or not; the caches are torch's own."""
    began = time.perf_counter()
    training = step.Training("sd2", step.BEST, device.batch_of("sd2", 2 if TOY else 16, 64))
    built = time.perf_counter()
    training.step()
    device.wait()
    done = time.perf_counter()
    yield {"setting": step.BEST.name, "build_s": built - began, "first_step_s": done - built}
    device.release()


def encoder() -> Iterator[dict[str, Any]]:
    """G9: moments of pictures, SD's autoencoder, bf16."""
    from ldm.autoencoder.kl import AutoencoderKL
    from ldm.nn.compiling import compile_blocks

    options = {"block_out_channels": (8, 8), "norm_groups": 4} if TOY else {}
    for side, count in ((16, 1),) if TOY else ((256, 64), (512, 16)):
        for fused, compiled in ((False, False), (True, False), (True, True)):
            with DEVICE:
                net = AutoencoderKL(**options).eval().to(memory_format=torch.channels_last)
            if compiled and not TOY:
                compile_blocks(net)
            images = torch.rand(count, 3, side, side, device=DEVICE) * 2 - 1
            images = images.contiguous(memory_format=torch.channels_last)

            @torch.no_grad()
            def encode(net: nn.Module = net, images: Tensor = images) -> None:
                with torch.autocast(DEVICE.type, torch.bfloat16):
                    net.moments(images)  # type: ignore[operator]

            norm.use_fused(fused)
            timing = device.clocked(encode, 3, 5, 5)
            norm.use_fused(False)
            name = "compiled blocks" if compiled else "fused group norm" if fused else "eager"
            yield {"setting": name, "side": side, "images_per_s": count / timing.median, **timing.figures()}
            device.release()


def sampling() -> Iterator[dict[str, Any]]:
    """G11: 50 steps of DDIM with guidance at 512 px, batch 8, without the decoder."""
    from ldm.diffusion.denoiser import Denoiser
    from ldm.diffusion.guidance import guided
    from ldm.diffusion.noise_scheduler import VariancePreserving
    from ldm.diffusion.samplers import ddim
    from ldm.nn.compiling import compile_blocks
    from ldm.nn.graph import Graphed

    steps, count, side = (2, 1, 8) if TOY else (50, 8, 64)
    process = VariancePreserving()
    grid: list[GridRow] = process.grid(steps, "trailing")  # type: ignore[assignment]
    for setting in (step.LAST, step.FUSED, step.BEST, step.GRAPHED):
        net = device.unet("sd1").eval().to(memory_format=torch.channels_last)
        if setting.compiled and not TOY:
            compile_blocks(net)
        batch = device.batch_of("sd1", count, side)
        told = Conditioning(context=batch["context"].bfloat16())
        network: Any = Graphed(net) if setting.graph and not TOY else net
        denoise = guided(Denoiser(network, process), told, Conditioning(context=0 * told.context), 7.5)  # type: ignore[operator]
        x = batch["x"].contiguous(memory_format=torch.channels_last)

        @torch.no_grad()
        def draw(denoise: Any = denoise, x: Tensor = x) -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                ddim(denoise, x, grid, noise=None)  # type: ignore[arg-type]

        norm.use_fused(setting.fused)
        timing = device.clocked(draw, 1, 3)
        norm.use_fused(False)
        yield {"setting": setting.name, "images_per_s": count / timing.median, **timing.figures()}
        device.release()


def steady(seconds: float = 180.0) -> Iterator[dict[str, Any]]:
    """G13: step times of a run of minutes."""
    training = step.Training("sd2", step.BEST, device.batch_of("sd2", 2 if TOY else 32, 64))
    for _ in range(1 if TOY else 10):
        training.step()
    device.wait()
    times, ends = [], time.perf_counter() + (0.2 if TOY else seconds)
    while time.perf_counter() < ends:
        began = time.perf_counter()
        training.step()
        device.wait()
        times.append(time.perf_counter() - began)
    times.sort()
    middle, late = times[len(times) // 2], times[int(0.99 * (len(times) - 1))]
    yield {
        "setting": step.BEST.name,
        "steps": len(times),
        "p50_s": middle,
        "p99_s": late,
        "ratio": late / middle,
    }
    norm.use_fused(False)
    device.release()
