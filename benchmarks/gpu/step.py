"""A training step of Stable Diffusion's U-Nets: forward, backward, clipping, AdamW, EMA (G1, G2, G6, G8).

Every contestant is a `Setting`; the techniques come one at a time, so that the list is the ablation. Equal
work is asserted: all losses of one network must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu import device
from benchmarks.gpu.device import DEVICE, TOY
from ldm.nn.attention import use_fused_qkv
from ldm.nn.attention_choice import use_attention
from ldm.nn.compiling import compile_blocks
from ldm.nn.norm import use_fused
from ldm.training.one_pass import OnePassAdamW
from ldm.types import Conditioning

CLIP, DECAY, RATE = 1.0, 0.9999, 1e-4


@dataclass(frozen=True)
class Setting:
    """How a step is computed."""

    name: str
    peer: bool = False  # diffusers' network
    last: bool = False  # channels last
    fused: bool = False  # our kernel of group norm
    compiled: bool = False
    joint: bool = False  # queries, keys and values by one product
    attention: str = "default"  # see ldm.nn.attention_choice
    average: bool = True  # EMA
    graph: bool = False  # the whole step as one CUDA graph
    one_pass: bool = False  # our AdamW, which clips and averages as it goes


EAGER = Setting("ours, eager, channels first")
LAST = Setting("+ channels last", last=True)
FUSED = Setting("+ fused group norm", last=True, fused=True)
BEST = Setting("+ compiled blocks", last=True, fused=True, compiled=True)
COMPILED = Setting("compiled blocks, torch's group norm", last=True, compiled=True)
JOINT = replace(BEST, name="with one product for q, k and v", joint=True)
CHOSEN = replace(BEST, name="with attention chosen by shape", attention="auto")
ONE_PASS = replace(BEST, name="with clipping, AdamW and EMA in one pass", one_pass=True)
GRAPHED = replace(BEST, name="+ CUDA graph", graph=True)
PLAIN = replace(BEST, name="without EMA", average=False)
ABLATION = (EAGER, LAST, FUSED, BEST, COMPILED, JOINT, CHOSEN, ONE_PASS, PLAIN)
PEERS = (
    Setting("diffusers, eager", peer=True),
    Setting("diffusers, eager, channels last", peer=True, last=True),
    Setting("diffusers, compiled, channels last", peer=True, last=True, compiled=True),
)


class Training:
    """A network under a setting, and its steps on one batch."""

    def __init__(self, name: str, setting: Setting, batch: dict[str, Tensor]) -> None:
        self.setting, self.batch = setting, batch
        use_attention(setting.attention)
        use_fused_qkv(setting.joint)
        self.net = device.peer_unet(name) if setting.peer else device.unet(name)
        form = torch.channels_last if setting.last else torch.contiguous_format
        self.net.to(memory_format=form)  # type: ignore[call-overload]
        batch["x"], batch["noise"] = (batch[key].contiguous(memory_format=form) for key in ("x", "noise"))
        if setting.compiled and not TOY:
            self.net.compile() if setting.peer else compile_blocks(self.net)
        self.parameters = list(self.net.parameters())
        self.average = [p.detach().clone() for p in self.parameters] if setting.average else []
        if setting.one_pass:
            self.optimizer: torch.optim.Optimizer = OnePassAdamW(self.parameters, lr=RATE)
        else:
            more = {"capturable": True} if setting.graph else {}
            self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, fused=True, **more)
        self.loss = torch.zeros((), device=DEVICE)
        self.replay: Callable[[], None] | None = None

    def predict(self, noisy: Tensor) -> Tensor:
        if self.setting.peer:
            return self.net(noisy, self.batch["time"], self.batch["context"]).sample
        return self.net(noisy, self.batch["time"], Conditioning(context=self.batch["context"]))

    def compute(self) -> None:
        use_fused(self.setting.fused)
        noisy = 0.8 * self.batch["x"] + 0.6 * self.batch["noise"]
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = F.mse_loss(self.predict(noisy).float(), self.batch["noise"])
        loss.backward()
        if isinstance(self.optimizer, OnePassAdamW):
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            self.optimizer.clip_to(norm, CLIP)
            self.optimizer.average_with(dict(zip(self.parameters, self.average, strict=True)), DECAY)
            self.optimizer.step()
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
            self.optimizer.step()
            if self.average:
                with torch.no_grad():
                    torch._foreach_lerp_(self.average, self.parameters, 1 - DECAY)
        self.optimizer.zero_grad(set_to_none=not self.setting.graph)
        self.loss.copy_(loss.detach())

    def step(self) -> None:
        if self.setting.graph and not TOY:
            if self.replay is None:
                self.replay = self._captured()
            self.replay()
        else:
            self.compute()

    def _captured(self) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.compute()
        return graph.replay


def measured(name: str, setting: Setting, count: int, side: int, turns: int, each: int) -> dict[str, Any]:
    """Figures of one contestant; {"failed": why} where it cannot run."""
    count = 2 if TOY else count
    batch = device.batch_of(name, count, side)
    try:
        training = Training(name, setting, batch)
        training.step()
        first = training.loss.item()
        timing = device.clocked(training.step, 5 if setting.compiled else 3, turns, each)
        losses = [first, training.loss.item()]
        work = 3 * device.flops(device.unet(name), batch)
    except torch.OutOfMemoryError:
        return {"setting": setting.name, "batch": count, "failed": "out of memory"}
    finally:
        use_fused(False)
        use_fused_qkv(False)
        use_attention("default")
        training = None  # type: ignore[assignment]
        device.release()
    rate = count / timing.median
    found = {
        "setting": setting.name,
        "batch": count,
        "images_per_s": rate,
        **timing.figures(),
        "losses": losses,
    }
    return found | {"tflops": rate * work / 1e12, "mfu": rate * work / device.SHEET}


def contestants() -> tuple[Setting, ...]:
    try:
        import diffusers  # noqa: F401
    except ImportError:
        return ABLATION
    return (*ABLATION, *PEERS)


def same_start(rows: list[dict[str, Any]]) -> None:
    """All networks begin at the same loss: a fresh one says 0 everywhere, so it is that of the noise."""
    first = [row["losses"][0] for row in rows if "losses" in row]
    for row, loss in zip([row for row in rows if "losses" in row], first, strict=True):
        if "diffusers" not in row["setting"] and abs(loss / first[0] - 1) > 1e-2:
            raise SystemExit(
                f"{row['setting']} begins at a loss of {loss}, {rows[0]['setting']} at {first[0]}"
            )


def sweep(name: str, side: int, batches: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """The best setting at all batch sizes, then every setting at the middle one."""
    for count in batches[:1] if TOY else batches:
        yield {"model": name, **measured(name, BEST, count, side, 5, 6)}
    for setting in contestants():
        if setting != BEST:
            yield {"model": name, **measured(name, setting, batches[len(batches) // 2], side, 5, 6)}


def host_bound(name: str) -> Iterator[dict[str, Any]]:
    """Small batches at 256 px, where the host decides: with and without one CUDA graph of the step."""
    for count in (2, 4):
        for setting in (LAST, BEST, GRAPHED, *contestants()[-3:-2]):
            yield {"model": name, **measured(name, setting, count, 32, 5, 20)}


def largest(name: str) -> Iterator[dict[str, Any]]:
    """The largest batch at 512 px that the memory holds, by doubling, for ours and the peer."""
    for setting in (BEST, *contestants()[len(ABLATION) :][:1]):
        count, held = 16, None
        while True:
            row = measured(name, setting, count, 64, 1, 2)
            if "failed" in row or TOY:
                break
            held, count = row, count + 16
        yield {"model": name, **(held or row)}
