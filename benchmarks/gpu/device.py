"""The device: its clock, its memory, its peak; and the sizes of the networks, real ones or toys."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOY = DEVICE.type == "cpu"
SHEET = 989.5e12  # dense bf16 FLOP/s of an H100 SXM, by its data sheet


def wait() -> None:
    if not TOY:
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Timing:
    """Seconds of a turn: the median and the quartiles of several, and the most memory, GB."""

    median: float
    low: float
    high: float
    memory: float

    def figures(self) -> dict[str, float]:
        return {"seconds": self.median, "low": self.low, "high": self.high, "memory_gb": self.memory}


def clocked(work: Callable[[], Any], warm_up: int, turns: int, each: int = 1) -> Timing:
    """`turns` times `each` calls, after `warm_up` calls; seconds are of one call."""
    if TOY:
        warm_up, turns, each = 1, 1, 1
    for _ in range(warm_up):
        work()
    wait()
    if not TOY:
        torch.cuda.reset_peak_memory_stats()
    found = []
    for _ in range(turns):
        began = time.perf_counter()
        for _ in range(each):
            work()
        wait()
        found.append((time.perf_counter() - began) / each)
    found.sort()
    memory = 0.0 if TOY else torch.cuda.max_memory_allocated() / 1e9
    return Timing(statistics.median(found), found[len(found) // 4], found[-1 - len(found) // 4], memory)


def matmul_rate() -> float:
    """FLOP/s of large bf16 products on this card, as it runs now."""
    size = 64 if TOY else 8192
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / clocked(lambda: a @ b, 10, 5, 20).median


def bandwidth() -> float:
    """Bytes a second, read and written, of large copies."""
    values = torch.empty(1 << (10 if TOY else 30), device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(values)
    return 2 * values.numel() / clocked(lambda: target.copy_(values), 3, 5, 10).median


def release() -> None:
    """Give memory back between contestants."""
    import gc

    gc.collect()
    if not TOY:
        torch.cuda.empty_cache()


def facts() -> dict[str, Any]:
    name = "cpu, toy sizes: figures mean nothing" if TOY else torch.cuda.get_device_name(DEVICE)
    return {"device": name, "matmul_tflops": matmul_rate() / 1e12, "bandwidth_tb": bandwidth() / 1e12}


# ---- networks ------------------------------------------------------------------------------------------

UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"num_heads": 8, "context_dim": 768},
    "sd2": {"head_dim": 64, "context_dim": 1024, "linear_projection": True},
}
SMALL = {"block_out_channels": (16, 32), "layers_per_block": 1, "transformer_depth": (1, 0), "norm_groups": 4}


def unet(name: str) -> nn.Module:
    """On the device, channels first; weights are as at the start of a training."""
    from ldm.backbones.unet import CrossAttentionUNet

    torch.manual_seed(0)
    options = dict(UNETS[name])
    if TOY:
        options |= SMALL | {"context_dim": 16} | ({"head_dim": 8} if "head_dim" in options else {})
    with DEVICE:
        return CrossAttentionUNet(**options)


def peer_unet(name: str) -> nn.Module:
    """The same network as diffusers has it."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    heads: Any = 8 if name == "sd1" else (5, 10, 20, 20)
    options: dict[str, Any] = {"cross_attention_dim": UNETS[name]["context_dim"]}
    options["use_linear_projection"] = name == "sd2"
    if TOY:
        heads = 8 if name == "sd1" else (2, 4)
        options |= {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
        options |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 16}
        options |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    with DEVICE:
        return UNet2DConditionModel(attention_head_dim=heads, **options)


def flops(net: nn.Module, batch: dict[str, Tensor]) -> float:
    """Of a forward pass over one picture; training counts as three."""
    from ldm.types import Conditioning

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(batch["x"][:1], batch["time"][:1], Conditioning(context=batch["context"][:1]))
    return float(counter.get_total_flops())


def batch_of(name: str, count: int, side: int) -> dict[str, Tensor]:
    """What a training step on cached latents is given, on the device; `side`: of the latents."""
    generator = torch.Generator().manual_seed(1)
    side = 4 if TOY else side
    width, tokens = (16, 5) if TOY else (UNETS[name]["context_dim"], 77)
    return {
        "x": torch.randn(count, 4, side, side, generator=generator).to(DEVICE),
        "noise": torch.randn(count, 4, side, side, generator=generator).to(DEVICE),
        "time": torch.randint(0, 1000, (count,), generator=generator).float().to(DEVICE),
        "context": torch.randn(count, tokens, width, generator=generator).to(DEVICE),
    }
