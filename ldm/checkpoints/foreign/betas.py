"""A noise schedule by the table that a file keeps of it: `betas` or `alphas_cumprod`, [T]."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping

from ldm.checkpoints.foreign.families import SCHEDULES, Schedule
from ldm.checkpoints.lazy import LazyTensor
from ldm.errors import InputError

DIGITS = 4  # that a beta was written down with
TOLERANCE = {"F16": 2e-3, "BF16": 1e-2}  # of alpha^2, as the table was stored
EXACT = 2e-6  # float32 and float64


def table_of(tensors: Mapping[str, LazyTensor], where: str) -> tuple[Schedule, int, bool] | None:
    """(schedule, length, does it end in pure noise) of the file's table; None: it keeps none.

    Raises InputError for a table that is none of this house's.
    """
    name = next((name for name in ("alphas_cumprod", "betas") if name in tensors), None)
    if name is None:
        return None
    if len(tensors[name].shape) != 1:
        what = f"its {name} has the shape {list(tensors[name].shape)}, and is no row of numbers"
        raise InputError(where, what, "is the file whole?")
    values = tensors[name].numbers()
    alpha_bar = values if name == "alphas_cumprod" else _product(values)
    steps = len(values)
    if steps < 3:
        raise InputError(where, f"its noise schedule has {steps} steps", "is the file whole?")
    ends = alpha_bar[-1] < 1e-6
    betas = 1 - alpha_bar[0], 1 - alpha_bar[-1] / (alpha_bar[-2] or math.nan)
    start, end = (float(f"{beta:.{DIGITS}g}") for beta in betas)
    own = [(schedule, start, end) for schedule in ("scaled_linear", "linear")] if 0 < start <= end < 1 else []
    for schedule in (*SCHEDULES, *own, ("cosine", 0.0001, 0.02)):
        ours = _alpha_bar(schedule, steps, ends)
        tolerance = TOLERANCE.get(tensors[name].format, EXACT)
        if all(abs(a - b) <= tolerance for a, b in zip(ours, alpha_bar, strict=True)):
            return schedule, steps, ends
    what = f"its noise schedule of {steps} steps, betas {start} to {end}, is none that this house has"
    raise InputError(
        where, what, "have: linear, scaled_linear, cosine, and zero terminal SNR of the published"
    )


def _product(betas: list[float]) -> list[float]:
    return list(itertools.accumulate((1 - beta for beta in betas), operator.mul))


def _alpha_bar(schedule: Schedule, steps: int, ends: bool) -> list[float]:
    """alpha^2 of VariancePreserving of these options: here in plain floats, so that torch is not imported."""
    name, start, end = schedule
    grid = [i / (steps - 1) for i in range(steps)]
    if name == "linear":
        betas = [start + (end - start) * x for x in grid]
    elif name == "scaled_linear":
        betas = [(start**0.5 + (end**0.5 - start**0.5) * x) ** 2 for x in grid]
    else:
        left = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = [min(1 - b / a, 0.999) for a, b in itertools.pairwise(left)]
    alpha_bar = _product(betas)
    if ends:
        first, last = alpha_bar[0] ** 0.5, alpha_bar[-1] ** 0.5
        alpha_bar = [((a**0.5 - last) * first / (first - last)) ** 2 for a in alpha_bar]
    return alpha_bar
