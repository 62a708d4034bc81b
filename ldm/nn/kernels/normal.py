"""`ldm.random.keyed_normal` on a GPU in one launch, bit for bit, where torch's operations are some 250.

All arithmetic is integer, or float64 that IEEE 754 rounds correctly; products and sums must not be fused
(enable_fp_fusion=False). Whether a device and its compiler keep to that, `keyed_normal` asks at the first
use, by comparing: where one bit differs, torch's operations go on.
"""

from __future__ import annotations

import logging
import math
import os
import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm import random

BLOCK = 512
log = logging.getLogger(__name__)


@triton.jit
def _word(low, high, purpose, k0, k1, index):
    """Word `index` of the row: int64 holding uint32; Philox 4x32-10 at block index // 4."""
    lane = index % 4
    zero = index * 0
    c0, c1, c2, c3 = low + zero, high + zero, index // 4, purpose + zero
    for _ in tl.static_range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = ((p1 >> 32) & 0xFFFFFFFF) ^ c1 ^ k0
        c2 = ((p0 >> 32) & 0xFFFFFFFF) ^ c3 ^ k1
        c1, c3 = p1 & 0xFFFFFFFF, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return tl.where(lane == 0, c0, tl.where(lane == 1, c1, tl.where(lane == 2, c2, c3)))


@triton.jit
def _horner(x, constants, first, COUNT: tl.constexpr):
    total = x * 0.0 + tl.load(constants + first)
    for k in tl.static_range(1, COUNT):
        total = total * x + tl.load(constants + first + k)
    return total


@triton.jit
def _normal(n, constants, out, purpose, count, half, BLOCK: tl.constexpr):
    """`constants`: those of `_constants`; of a row, each program makes BLOCK radii and their two numbers."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k0, k1 = tl.load(n), tl.load(n + 1)  # the seed's words stand before the numbers
    number = tl.load(n + 2 + row)
    low, high = number & 0xFFFFFFFF, (number >> 32) & 0xFFFFFFFF
    first = _word(low, high, purpose, k0, k1, place)
    second = _word(low, high, purpose, k0, k1, place + half)
    scale, one_half = tl.load(constants), tl.load(constants + 1)  # 2^-32, 1/2
    root, log2, turn = tl.load(constants + 2), tl.load(constants + 3), tl.load(constants + 4)

    x = (first.to(tl.float64) + one_half) * scale
    bits = x.to(tl.int64, bitcast=True)
    exponent = ((bits >> 52) & 0x7FF) - 1022
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    small = mantissa < root
    mantissa = tl.where(small, mantissa + mantissa, mantissa)
    exponent = tl.where(small, exponent - 1, exponent).to(tl.float64)
    z = (mantissa - 1.0) / (mantissa + 1.0)
    logarithm = (z + z) * _horner(z * z, constants, 5, 9) + exponent * log2
    radius = tl.sqrt(-(logarithm + logarithm))

    u = second.to(tl.float64) * scale
    quadrant = tl.floor(u * 4.0 + one_half)
    angle = (u - quadrant * 0.25) * turn
    square = angle * angle
    cos, sin = _horner(square, constants, 14, 9), angle * _horner(square, constants, 23, 8)
    which = quadrant.to(tl.int64)
    odd = (which & 1) == 1
    out_cos, out_sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    out_cos = tl.where((which == 1) | (which == 2), -out_cos, out_cos)
    out_sin = tl.where((which == 2) | (which == 3), -out_sin, out_sin)
    mine = out + row * count
    tl.store(mine + place, (radius * out_cos).to(tl.float32), mask=place < half)
    there = place + half
    tl.store(mine + there, (radius * out_sin).to(tl.float32), mask=(place < half) & (there < count))


@cache
def _constants(device: torch.device) -> Tensor:
    """float64, exactly those of `ldm.random`."""
    values = [2.0**-32, 0.5, math.sqrt(0.5), math.log(2), 2 * math.pi, *random.LOG, *random.COS, *random.SIN]
    return torch.tensor(values, dtype=torch.float64, device=device)


def launch(seed: int, n: Tensor, purpose: str, shape: Sequence[int]) -> Tensor:
    """What `ldm.random.keyed_normal` gives."""
    count = math.prod(shape)
    half = -(-count // 2)
    key = torch.empty(len(n) + 2, dtype=torch.int64, device=n.device)
    key[0], key[1] = seed & random.MASK, (seed >> 32) & random.MASK
    key[2:] = n
    out = torch.empty((len(n), count), dtype=torch.float32, device=n.device)
    grid = (len(n), triton.cdiv(half, BLOCK))
    more = {"BLOCK": BLOCK, "enable_fp_fusion": False}
    with torch.cuda.device_of(n):
        _normal[grid](key, _constants(n.device), out, zlib.crc32(purpose.encode()), count, half, **more)
    return out.reshape(len(n), *shape)


@cache
def agrees(device: torch.device) -> bool:
    """Whether `launch` gives on `device` the bits of torch's operations; waits for it, once."""
    asked: Any = (2**40 + 3, torch.tensor([0, 7, 2**40 + 3], device=device), "noise", (16_383,))
    try:
        same = torch.equal(launch(*asked), random.plain_normal(*asked))
    except Exception as error:  # a compiler that fails is no reason to stop a run
        log.warning("speed.fused_noise: no kernel on %s (%s: %s)", device, type(error).__name__, error)
        return False
    if not same:
        log.warning(
            "speed.fused_noise: the kernel gives other bits on %s: torch's operations are used", device
        )
    return same


def keyed_normal(seed: int, n: Tensor, purpose: str, shape: Sequence[int] = ()) -> Tensor:
    """For `ldm.random.use_normal`."""
    there = n.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    make = launch if there and agrees(n.device) else random.plain_normal
    return make(seed, n, purpose, shape)
