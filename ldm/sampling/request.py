"""What one call of a pipeline asks for, checked before any work: every refusal is one line.

b batch, H W picture size.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.config import CONFIG_DIR, build, from_yaml, plain
from ldm.diffusion.samplers import truncate
from ldm.errors import InputError
from ldm.pictures import open_mask, open_picture, to_tensor
from ldm.types import Grid, NoiseScheduler, Sampler

MAX_STEPS = 1000
ALWAYS = (0.0, math.inf)  # the guidance interval that is none
Source = str | os.PathLike[str] | Image.Image  # a picture


@dataclass(frozen=True)
class Request:
    """One call's settings, with the checkpoint's defaults filled in."""

    negative_prompt: str
    num_steps: int
    sampler: Sampler
    sampler_name: str
    sampler_options: Mapping[str, Any]  # those that differ from what the name stands for
    spacing: str
    guidance_scale: float
    guidance_rescale: float
    guidance_interval: tuple[float, float]  # of sigma / alpha
    height: int
    width: int
    grid: Grid  # shortened for image to image
    start: Tensor | None  # uint8 [1 3 H W], the picture to start from
    source: Tensor | None  # uint8 [1 3 H/k W/k], the same for a conditioner of source_scale k
    mask: Tensor | None  # bool [1 1 H W], True is drawn anew
    strength: float
    prompt_weights: bool
    clip_skip: int
    tile: int | None  # pixels


def request_of(
    noise_scheduler: NoiseScheduler,
    multiple: int,
    *,
    negative_prompt: str,
    num_steps: int,
    sampler: str | Mapping[str, Any] | Sampler,
    spacing: str,
    guidance_scale: float,
    guidance_rescale: float,
    guidance_interval: Sequence[float] | None,
    height: int,
    width: int,
    init_image: Source | None,
    mask_image: Source | None,
    strength: float,
    prompt_weights: bool,
    clip_skip: int,
    tile: int | None,
    source_scale: int | None = None,
) -> Request:
    """Check every setting; height, width and tile are to be multiples of `multiple`."""
    whole("num_steps", num_steps, 1, MAX_STEPS)
    height, width = multiple_of("height", height, multiple), multiple_of("width", width, multiple)
    scale = number("guidance_scale", guidance_scale)
    rescale = number("guidance_rescale", guidance_rescale, 0, 1)
    interval = ALWAYS if guidance_interval is None else interval_of(guidance_interval)
    tile = None if tile is None else multiple_of("tile", tile, multiple)
    function, name, options = sampler_of(sampler)
    try:
        grid = noise_scheduler.grid(num_steps, spacing)
    except ValueError as error:
        raise InputError("sampling", str(error)) from None
    start = source = mask = None
    if init_image is not None:
        if number("strength", strength, 0, 1) == 0:
            raise InputError(f"strength={strength}", "need more than 0 and at most 1")
        grid = truncate(grid, strength)
        start = to_tensor([open_picture(init_image, height, width)])
        if source_scale is not None:
            source = to_tensor([open_picture(init_image, height // source_scale, width // source_scale)])
    if mask_image is not None:
        if start is None:
            raise InputError("mask_image", "there is no picture to mask", "give it: init_image=FILE")
        mask = open_mask(mask_image, height, width)
    _rehearse(function, name, grid)
    return Request(
        negative_prompt,
        num_steps,
        function,
        name,
        options,
        spacing,
        scale,
        rescale,
        interval,
        height,
        width,
        grid,
        start,
        source,
        mask,
        float(strength),
        prompt_weights,
        whole("clip_skip", clip_skip, 1),
        tile,
    )


def known_samplers() -> dict[str, dict[str, Any]]:
    """The sections of configs/sampler, by name."""
    files = sorted((CONFIG_DIR / "sampler").glob("*.yaml"))
    return {file.stem: plain(from_yaml(file.read_text(encoding="utf-8"))) for file in files}


def sampler_of(sampler: str | Mapping[str, Any] | Sampler) -> tuple[Sampler, str, dict[str, Any]]:
    """A sampling function, its name, and its options where they are not those that the name stands for.

    From a name, a config section, or the function itself.
    """
    sections = known_samplers()
    if isinstance(sampler, str):
        if sampler not in sections:
            raise InputError(f"sampler={sampler}", "no such option", f"have: {', '.join(sections)}")
        return build(sections[sampler]), sampler, {}
    found: Sampler = build(sampler) if isinstance(sampler, Mapping) else sampler
    function, options = _described(found)
    last = str(getattr(function, "__name__", type(function).__name__))
    known = {name: _described(build(section)) for name, section in sections.items()}
    same = {name: its for name, (other, its) in known.items() if other is function}
    if not same:
        return found, last, {}
    names = [name for name, its in same.items() if its == options] or list(same)
    name = last if last in names else names[0]
    return found, name, {key: value for key, value in options.items() if same[name].get(key) != value}


def _rehearse(sampler: Sampler, name: str, grid: Grid) -> None:
    """Solve for one number with an estimate of 0, so that what a sampler refuses it refuses now."""
    nothing = torch.zeros(1, 1, 1, 1)
    try:
        sampler(lambda x, row: nothing, nothing, grid, noise=lambda i: nothing)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"sampler={name}", str(error)) from None


def _described(sampler: Any) -> tuple[Any, dict[str, Any]]:
    """The function under a partial, and all its options with their values."""
    function, given = (sampler.func, sampler.keywords) if isinstance(sampler, partial) else (sampler, {})
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty and p.name != "callback"}
    return function, {**defaults, **given}


def interval_of(value: Sequence[float]) -> tuple[float, float]:
    """(low, high) with 0 <= low < high, which may be infinite; raises InputError."""
    numbers = list(value) if isinstance(value, (list, tuple)) else []
    good = len(numbers) == 2 and all(type(bound) in (int, float) for bound in numbers)
    if not good or not 0 <= numbers[0] < numbers[1]:
        fix = "write guidance_interval=[LOW,HIGH]"
        raise InputError(f"guidance_interval={value}", "need two numbers, 0 <= LOW < HIGH", fix)
    return float(numbers[0]), float(numbers[1])


def multiple_of(name: str, value: Any, multiple: int) -> int:
    """`value` if it is a multiple; raises InputError that names the nearest ones."""
    size = whole(name, value, 1)
    if size % multiple:
        below = size // multiple * multiple
        near = ", ".join(str(s) for s in (below, below + multiple) if s)
        raise InputError(f"{name}={size}", f"must be a multiple of {multiple}", f"nearest: {near}")
    return size


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` if it is a whole number in the range; raises InputError."""
    good = isinstance(value, int) and not isinstance(value, bool)
    if not good or value < low or (high is not None and value > high):
        raise InputError(f"{name}={value}", f"need {low} or more" if high is None else f"need {low}..{high}")
    return int(value)


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` if it is a finite number in the range; raises InputError."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high:
        raise InputError(
            f"{name}={value}", "need a number" + (f" in {low}..{high}" if high < math.inf else "")
        )
    return float(value)


def soft_edge(mask: Tensor, width: int) -> Tensor:
    """float [1 1 H W]: 1 on the mask, falling to 0 over about `width` pixels around it, exactly 0 beyond."""
    radius = max(width // 2, 1)
    side = 2 * radius + 1
    grown = torch.nn.functional.max_pool2d(mask.float(), side, 1, radius)
    return torch.nn.functional.avg_pool2d(grown, side, 1, radius, count_include_pad=False)
