"""Clipping, AdamW and the moving average of all parameters in one pass over memory, and one launch.

Loshchilov and Hutter 2019, in the order of torch's fused AdamW; then average += (1 - decay) (p - average).
Separate passes read and write a gradient and a parameter twice as often: 7.7 numbers in place of 9 for each
parameter. What depends on the gradient's norm stays on the device: a step with one that is not finite
changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
CHUNK = 16 * BLOCK  # numbers of a tensor that a program works on


@triton.jit
def _step(
    addresses, sizes, owner, start, told, count, lr, beta1, beta2, eps, weight_decay, average_rate,
    AVERAGE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`addresses` [5, count]: of parameters, gradients, both moments, averages; `told`: see `Table.step`."""
    if tl.load(told) > 0:
        factor, correction1, root2 = tl.load(told + 1), tl.load(told + 2), tl.load(told + 3)
        chunk = tl.program_id(0)
        which = tl.load(owner + chunk)
        size, first = tl.load(sizes + which), tl.load(start + chunk)
        kind = tl.pointer_type(tl.float32)
        p = tl.load(addresses + which).to(kind)
        g = tl.load(addresses + count + which).to(kind)
        m = tl.load(addresses + 2 * count + which).to(kind)
        v = tl.load(addresses + 3 * count + which).to(kind)
        a = tl.load(addresses + 4 * count + which).to(kind)
        for k in range(0, CHUNK, BLOCK):
            place = first + k + tl.arange(0, BLOCK)
            inside = place < size
            gradient = tl.load(g + place, mask=inside, other=0.0) * factor
            value = tl.load(p + place, mask=inside, other=0.0)
            first_moment = tl.load(m + place, mask=inside, other=0.0)
            second_moment = tl.load(v + place, mask=inside, other=0.0)
            value -= lr * weight_decay * value
            first_moment += (1 - beta1) * (gradient - first_moment)
            second_moment += (1 - beta2) * (gradient * gradient - second_moment)
            value -= lr / correction1 * first_moment / (tl.sqrt(second_moment) / root2 + eps)
            tl.store(p + place, value, mask=inside)
            tl.store(m + place, first_moment, mask=inside)
            tl.store(v + place, second_moment, mask=inside)
            if AVERAGE:
                mean = tl.load(a + place, mask=inside, other=0.0)
                tl.store(a + place, mean + average_rate * (value - mean), mask=inside)


@dataclass
class Table:
    """Where tensors lie: float32, those of one parameter of equal size and strides, without gaps."""

    addresses: tuple[int, ...]
    device: torch.device
    where: Tensor  # [5, count]
    sizes: Tensor
    owner: Tensor  # of each chunk, the place of its tensor in `sizes`
    start: Tensor  # and the first of its numbers

    @classmethod
    def of(cls, rows: Sequence[Sequence[Tensor]], before: Table | None = None) -> Table:
        """`rows`: parameters, gradients, first and second moments, and averages, which may be none.

        `before`: of the step before; of the same tensors it serves again.
        """
        parameters = rows[0]
        rows = [*rows[:4], rows[4] or parameters]
        addresses = tuple(t.data_ptr() for row in rows for t in row)
        if before is not None and before.addresses == addresses:
            return before
        device, sizes = parameters[0].device, [p.numel() for p in parameters]
        where = _sent(addresses, device).reshape(5, -1)
        if before is not None and before.sizes.numel() == len(sizes):  # gradients lie elsewhere each time
            return cls(addresses, device, where, before.sizes, before.owner, before.start)
        chunks = [(i, k) for i, size in enumerate(sizes) for k in range(0, size, CHUNK)]
        owner, start = zip(*chunks, strict=True)
        return cls(addresses, device, where, *(_sent(values, device) for values in (sizes, owner, start)))

    def step(
        self,
        told: Tensor,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        average_rate: float | None,
    ) -> None:
        """One step, in place. `told` float32 [4] on the device: whether to step (0 or 1), factor on the
        gradients, 1 - beta1^t, sqrt(1 - beta2^t). `average_rate`: 1 - decay; None: no averages.
        """
        with torch.cuda.device_of(told):
            _step[(self.owner.numel(),)](
                *(self.where, self.sizes, self.owner, self.start, told, self.sizes.numel()),
                *(lr, *betas, eps, weight_decay, average_rate or 0.0),
                AVERAGE=average_rate is not None, CHUNK=CHUNK, BLOCK=BLOCK,
            )  # fmt: skip


def _sent(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 on the device, without waiting for it."""
    made = torch.tensor(values, dtype=torch.int64)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made
