"""Does a batch fit in a GPU's memory? Takes two real steps and asks the allocator."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch

from ldm.cluster.workload import autocast_of, loss, sample, side_of
from ldm.training.assembly import build_module
from ldm.training.summary import without_weights

STEPS = 2  # the second has the optimizer's state from the beginning


def peak(cfg: Mapping[str, Any], pictures: int, device: str) -> int | None:
    """Most bytes reserved by steps of so many empty pictures, random weights; None if they did not fit.

    On a CPU, where nothing counts bytes, 0.
    """
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        _steps(cfg, pictures, device)
    except torch.OutOfMemoryError:
        return None
    return int(torch.cuda.max_memory_reserved(device)) if on_gpu else 0


def largest(cfg: Mapping[str, Any], forecast: int, device: str) -> tuple[int, int]:
    """Pictures that fit, from `forecast` downwards by tenths, and the bytes they took; (0, 0): none."""
    pictures = forecast
    while pictures > 0:
        taken = peak(cfg, pictures, device)
        if taken is not None:
            return pictures, taken
        pictures -= max(1, pictures // 10)
    return 0, 0


def _steps(cfg: Mapping[str, Any], pictures: int, device: str) -> None:
    module = build_module(without_weights(cfg)).to(device)
    optimizer = module.configure_optimizers()
    module.train()
    batch = sample(pictures, side_of(cfg), device)
    dtype, kind = autocast_of(cfg["trainer"]), torch.device(device).type
    trained = [p for p in module.parameters() if p.requires_grad]
    for i in range(STEPS):
        with torch.autocast(kind, dtype=dtype) if dtype is not None else nullcontext():
            found = loss(module, batch)
        found.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert module.ema is not None
        module.ema.update(i)
