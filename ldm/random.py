"""Random numbers that are a function of (seed, n, purpose): no generator, no state, no rank.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in integer operations,
so it gives the same bits on every device and can be captured in a CUDA graph. `keyed_normal` uses only
operations that IEEE 754 rounds correctly (+, -, *, /, sqrt), in float64, for the same reason. Arrays are
torch's on a device and NumPy's on a CPU, where each of its some hundred calls takes a third of torch's time.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
LOG = [1 / (2 * k + 1) for k in range(8, -1, -1)]  # coefficients of series, the highest power's first
COS = [(-1) ** k / math.factorial(2 * k) for k in range(8, -1, -1)]
SIN = [(-1) ** k / math.factorial(2 * k + 1) for k in range(7, -1, -1)]
Normal = Callable[[int, Tensor, str, Sequence[int]], Tensor]

_fused: Normal | None = None


def use_normal(fused: Normal | None) -> None:
    """Let `fused`, which must give the same bits, make the normal numbers from now on; None: no more."""
    global _fused
    _fused = fused


def philox(counter: Sequence[Any], key: tuple[int, int], rounds: int = 10) -> list[Any]:
    """Four words of random bits (int64 holding uint32) for each element of the four counter words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # products wrap modulo 2^64: all their bits are right
        c0, c1, c2, c3 = (
            ((p1 >> 32) & MASK) ^ c1 ^ k0,
            p1 & MASK,
            ((p0 >> 32) & MASK) ^ c3 ^ k1,
            p0 & MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def _arrays(n: Tensor) -> tuple[Any, Any]:
    """The module whose functions compute, and n [b, 1] as an array of it."""
    n = n.to(torch.int64).reshape(-1, 1)
    if n.device.type != "cpu" or type(n) is not Tensor:  # a tensor without data has no form but torch's
        return torch, n
    import numpy

    return numpy, n.numpy()


def _tensor(xp: Any, array: Any) -> Tensor:
    return array if xp is torch else torch.from_numpy(array)


def _words(xp: Any, n: Any, seed: int, purpose: str, count: int) -> Any:
    """What `keyed_bits` gives, as an array of the module `xp`."""
    blocks = -(-count // 4)
    on = {"device": n.device} if xp is torch else {}
    zero = xp.zeros_like(n + xp.arange(blocks, **on))
    low, high = (n & MASK) + zero, ((n >> 32) & MASK) + zero
    counter = low, high, xp.arange(blocks, **on) + zero, zero + zlib.crc32(purpose.encode())
    words = philox(counter, (seed & MASK, (seed >> 32) & MASK))
    return xp.stack(words, -1).reshape(len(n), 4 * blocks)[:, :count]


def keyed_bits(seed: int, n: Tensor, purpose: str, count: int) -> Tensor:
    """Random words, int64 in [0, 2^32), [b, count]; row i depends on (seed, n[i], purpose) alone."""
    xp, n = _arrays(n)
    return _tensor(xp, _words(xp, n, seed, purpose, count))


def keyed_word(seed: int, n: int, purpose: str) -> int:
    """The first word of `keyed_bits` for one n, in Python's integers: the twentieth part of the time."""
    c0, c1, c2, c3 = n & MASK, (n >> 32) & MASK, 0, zlib.crc32(purpose.encode())
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0


def keyed_uniform(seed: int, n: Tensor, purpose: str, shape: Sequence[int] = ()) -> Tensor:
    """Uniform numbers in (0, 1), both ends excluded, float32 [b, *shape], 2^-23 apart."""
    bits = keyed_bits(seed, n, purpose, math.prod(shape))
    return (((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23).reshape(len(n), *shape)


def keyed_normal(seed: int, n: Tensor, purpose: str, shape: Sequence[int] = ()) -> Tensor:
    """Standard normal numbers, float32 [b, *shape], by Box and Muller (1958)."""
    return (_fused or plain_normal)(seed, n, purpose, shape)


def plain_normal(seed: int, n: Tensor, purpose: str, shape: Sequence[int] = ()) -> Tensor:
    """`keyed_normal` without a kernel."""
    count = math.prod(shape)
    half = -(-count // 2)
    xp, n = _arrays(n)
    bits = xp.asarray(_words(xp, n, seed, purpose, 2 * half), dtype=xp.float64)
    radius = xp.sqrt(-2.0 * _log(xp, (bits[:, :half] + 0.5) * 2.0**-32))
    cos, sin = _cos_sin_turn(xp, bits[:, half:] * 2.0**-32)
    normal = xp.concatenate([radius * cos, radius * sin], 1)[:, :count]
    return _tensor(xp, xp.asarray(normal, dtype=xp.float32)).reshape(len(n), *shape)


def _polynomial(xp: Any, x: Any, coefficients: Sequence[float]) -> Any:
    """Horner's rule, highest coefficient first."""
    total = xp.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        total *= x
        total += c
    return total


def _log(xp: Any, x: Any) -> Any:
    """Natural logarithm of positive float64, error below 1e-13: log m + e log 2, log m by atanh's series."""
    mantissa, exponent = xp.frexp(x)
    small = mantissa < math.sqrt(0.5)
    mantissa = xp.where(small, mantissa * 2, mantissa)
    exponent = xp.asarray(xp.where(small, exponent - 1, exponent), dtype=xp.float64)
    z = (mantissa - 1) / (mantissa + 1)  # |z| < 0.172
    return 2 * z * _polynomial(xp, z * z, LOG) + exponent * math.log(2)


def _cos_sin_turn(xp: Any, u: Any) -> tuple[Any, Any]:
    """Cosine and sine of 2 pi u for u in [0, 1), error below 1e-13: quadrants, then Taylor on +-pi / 4."""
    quadrant = xp.floor(u * 4 + 0.5)
    angle = (u - quadrant / 4) * (2 * math.pi)
    a2 = angle * angle
    cos, sin = _polynomial(xp, a2, COS), angle * _polynomial(xp, a2, SIN)
    odd, back = quadrant % 2 == 1, (quadrant == 1) | (quadrant == 2)
    below = (quadrant == 2) | (quadrant == 3)
    out_cos, out_sin = xp.where(odd, sin, cos), xp.where(odd, cos, sin)
    return xp.where(back, -out_cos, out_cos), xp.where(below, -out_sin, out_sin)
