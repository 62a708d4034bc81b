"""Group norm as the networks use it: after adding an embedding, before a SiLU, and all in one kernel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_fused = False


def use_fused(on: bool) -> None:
    """Let GPUs use the kernel of `kernels/group_norm.py` from now on, or not: results agree to rounding."""
    global _fused
    _fused = on


@contextmanager
def fused(on: bool) -> Iterator[None]:
    """`use_fused` for the block alone."""
    global _fused
    before, _fused = _fused, on
    try:
        yield
    finally:
        _fused = before


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _fits(x: Tensor) -> bool:
    """Channels-last tensors of up to 32 bits; on a CPU only under Triton's interpreter, for tests."""
    if not _fused or x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not _has_triton():
        return False
    there = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return there and x.is_contiguous(memory_format=torch.channels_last)


class GroupNorm(nn.GroupNorm):
    """A group norm among other layers, by the kernel where it is used."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self) if _fits(x) else super().forward(x)


def group_norm(x: Tensor, norm: nn.GroupNorm, added: Tensor | None = None, silu: bool = False) -> Tensor:
    """silu(norm(x + added)) of [b c h w]; `added` [b c], None: nothing; `silu` False: without it."""
    if _fits(x):
        from ldm.nn.kernels.group_norm import group_norm as fused

        return fused(x, added, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)
    h = norm(x if added is None else x + added[:, :, None, None])
    return F.silu(h) if silu else h
