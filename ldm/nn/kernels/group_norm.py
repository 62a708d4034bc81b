"""Group norm with SiLU behind it and an embedding added before it, channels last, forward and backward.

y = silu(norm(x + e)), x [b c h w] in memory [b h w c], e [b c] or None. torch's own group norm makes a
channels-last tensor contiguous first, and norm, sum and SiLU are three passes. Here a first pass takes each
channel's moments, as means and sums of squared distances from them (Chan et al. 1983: no cancellation), a
small kernel makes those of the groups, a second pass writes y. Backward is likewise two passes, whose sums
over pixels also give the gradients of weight, bias and e. Sums are fp32 and always in the same order.

    dz = dy silu'(z), s1_c = sum dz, s2_c = sum dz xhat    over pixels
    m1 = sum_c w_c s1_c / n, m2 = sum_c w_c s2_c / n       over a group of n values
    dx = rstd (w dz - m1 - xhat m2)
    de = sum dx = rstd (w s1 - pixels m1 - m2 sum xhat)    of a channel
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # values that a program holds at once
CHUNKS = 64  # parts, at most, that the pixels of a picture are dealt into for sums
SUMMED = 8192  # values of a group, at most, of which a program makes one


@triton.jit
def _silu(z):
    return z * tl.sigmoid(z)


@triton.jit
def _moments(x, means, squares, pixels, channels, chunk, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Of each channel over a chunk of pixels: mean, and sum of squared distances from it."""
    picture, part = tl.program_id(0), tl.program_id(1)
    columns = tl.program_id(2) * COLS + tl.arange(0, COLS)
    inside = columns < channels
    first, last = part * chunk, tl.minimum((part + 1) * chunk, pixels)
    count, mean, square = 0.0, tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        live = (rows < last)[:, None] & inside[None, :]
        places = (picture.to(tl.int64) * pixels + rows[:, None]) * channels + columns[None, :]
        values = tl.load(x + places, mask=live, other=0.0).to(tl.float32)
        more = tl.minimum(last - start, ROWS).to(tl.float32)
        here = tl.sum(values, 0) / more
        distance = tl.where(live, values - here[None, :], 0.0)
        apart = here - mean
        mean += apart * (more / (count + more))
        square += tl.sum(distance * distance, 0) + apart * apart * (count * more / (count + more))
        count += more
    place = (picture * tl.num_programs(1) + part) * channels + columns
    tl.store(means + place, mean, mask=inside)
    tl.store(squares + place, square, mask=inside)


@triton.jit
def _group_moments(
    means, squares, e, mean, rstd, channel_mean, pixels, channels, chunk, chunks, groups, eps,
    HAS_E: tl.constexpr, PARTS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """From the moments of channels and chunks to those of a group of a picture."""
    picture, group = tl.program_id(0), tl.program_id(1)
    width = channels // groups
    column, part = tl.arange(0, COLS), tl.arange(0, PARTS)
    columns = group * width + column
    live = (part < chunks)[:, None] & (column < width)[None, :]
    places = (picture * chunks + part[:, None]) * channels + columns[None, :]
    counts = tl.where(live, tl.minimum(pixels - part * chunk, chunk).to(tl.float32)[:, None], 0.0)
    values = tl.load(means + places, mask=live, other=0.0)
    own = tl.sum(values * counts, 0) / pixels  # of each channel, without e
    if HAS_E:
        added = tl.load(e + picture * channels + columns, mask=column < width, other=0.0).to(tl.float32)
        values += added[None, :]
        own += added
        tl.store(channel_mean + picture * channels + columns, own, mask=column < width)
    size = pixels * width
    whole = tl.sum(tl.sum(values * counts, 0), 0) / size
    distance = tl.where(live, values - whole, 0.0)
    total = tl.load(squares + places, mask=live, other=0.0) + counts * distance * distance
    variance = tl.sum(tl.sum(total, 0), 0) / size
    tl.store(mean + picture * groups + group, whole)
    tl.store(rstd + picture * groups + group, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _forward(
    x, e, weight, bias, mean, rstd, y, pixels, channels, groups,
    HAS_E: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    picture = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(2) * COLS + tl.arange(0, COLS)
    inside = columns < channels
    group = picture * groups + columns // (channels // groups)
    scale = tl.load(rstd + group, mask=inside, other=0.0)
    scale *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    shift = -tl.load(mean + group, mask=inside, other=0.0)
    if HAS_E:
        shift += tl.load(e + picture * channels + columns, mask=inside, other=0.0).to(tl.float32)
    shift = shift * scale + tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    live = (rows < pixels)[:, None] & inside[None, :]
    places = (picture.to(tl.int64) * pixels + rows[:, None]) * channels + columns[None, :]
    z = tl.load(x + places, mask=live, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    z = _silu(z) if SILU else z
    tl.store(y + places, z.to(y.dtype.element_ty), mask=live)


@triton.jit
def _dz(dy, z, SILU: tl.constexpr):
    if SILU:
        sigmoid = tl.sigmoid(z)
        dy = dy * sigmoid * (1.0 + z * (1.0 - sigmoid))
    return dy


@triton.jit
def _sums(
    x, e, weight, bias, mean, rstd, dy, s1, s2, pixels, channels, groups, chunk,
    HAS_E: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Of each channel over a chunk of pixels: sums of dz and of dz xhat."""
    picture, part = tl.program_id(0), tl.program_id(1)
    columns = tl.program_id(2) * COLS + tl.arange(0, COLS)
    inside = columns < channels
    group = picture * groups + columns // (channels // groups)
    scale = tl.load(rstd + group, mask=inside, other=0.0)
    shift = -tl.load(mean + group, mask=inside, other=0.0)
    if HAS_E:
        shift += tl.load(e + picture * channels + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    one, two = tl.zeros((COLS,), tl.float32), tl.zeros((COLS,), tl.float32)
    last = tl.minimum((part + 1) * chunk, pixels)
    for start in range(part * chunk, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        live = (rows < last)[:, None] & inside[None, :]
        places = (picture.to(tl.int64) * pixels + rows[:, None]) * channels + columns[None, :]
        xhat = (tl.load(x + places, mask=live, other=0.0).to(tl.float32) + shift[None, :]) * scale[None, :]
        given = tl.load(dy + places, mask=live, other=0.0).to(tl.float32)
        dz = _dz(given, xhat * w[None, :] + b[None, :], SILU)
        one += tl.sum(dz, 0)
        two += tl.sum(dz * xhat, 0)
    place = (picture * tl.num_programs(1) + part) * channels + columns
    tl.store(s1 + place, one, mask=inside)
    tl.store(s2 + place, two, mask=inside)


@triton.jit
def _group_sums(
    s1, s2, weight, mean, rstd, channel_mean, m1, m2, one, two, de, pixels, channels, chunks, groups,
    HAS_E: tl.constexpr, PARTS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """From the sums of channels and chunks to those of channels and to the two means of a group."""
    picture, group = tl.program_id(0), tl.program_id(1)
    width = channels // groups
    column, part = tl.arange(0, COLS), tl.arange(0, PARTS)
    inside, columns = column < width, group * width + column
    live = (part < chunks)[:, None] & inside[None, :]
    places = (picture * chunks + part[:, None]) * channels + columns[None, :]
    first = tl.sum(tl.load(s1 + places, mask=live, other=0.0), 0)
    second = tl.sum(tl.load(s2 + places, mask=live, other=0.0), 0)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    size = pixels * width
    a, b = tl.sum(w * first, 0) / size, tl.sum(w * second, 0) / size
    tl.store(m1 + picture * groups + group, a)
    tl.store(m2 + picture * groups + group, b)
    tl.store(one + picture * channels + columns, first, mask=inside)
    tl.store(two + picture * channels + columns, second, mask=inside)
    if HAS_E:
        scale = tl.load(rstd + picture * groups + group)
        apart = tl.load(channel_mean + picture * channels + columns, mask=inside, other=0.0)
        xhats = (apart - tl.load(mean + picture * groups + group)) * scale * pixels
        found = scale * (w * first - pixels * a - b * xhats)
        tl.store(de + picture * channels + columns, found.to(de.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, e, weight, bias, mean, rstd, m1, m2, dy, dx, pixels, channels, groups,
    HAS_E: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    picture = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(2) * COLS + tl.arange(0, COLS)
    inside = columns < channels
    group = picture * groups + columns // (channels // groups)
    scale = tl.load(rstd + group, mask=inside, other=0.0)
    shift = -tl.load(mean + group, mask=inside, other=0.0)
    if HAS_E:
        shift += tl.load(e + picture * channels + columns, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    one = tl.load(m1 + group, mask=inside, other=0.0)
    two = tl.load(m2 + group, mask=inside, other=0.0)
    live = (rows < pixels)[:, None] & inside[None, :]
    places = (picture.to(tl.int64) * pixels + rows[:, None]) * channels + columns[None, :]
    xhat = (tl.load(x + places, mask=live, other=0.0).to(tl.float32) + shift[None, :]) * scale[None, :]
    given = tl.load(dy + places, mask=live, other=0.0).to(tl.float32)
    dz = _dz(given, xhat * w[None, :] + b[None, :], SILU)
    found = scale[None, :] * (w[None, :] * dz - one[None, :] - xhat * two[None, :])
    tl.store(dx + places, found.to(dx.dtype.element_ty), mask=live)


# ---- as operators of torch -----------------------------------------------------------------------------


class _Sizes:
    """How the work on a tensor is dealt."""

    def __init__(self, x: Tensor, groups: int) -> None:
        self.pictures, self.channels = x.shape[:2]
        self.pixels = x.shape[2] * x.shape[3]
        self.cols = min(triton.next_power_of_2(self.channels), 128)
        self.rows = TILE // self.cols
        tiles = triton.cdiv(self.pixels, self.rows)
        width = triton.next_power_of_2(self.channels // groups)
        chunks = min(tiles, CHUNKS, max(1, SUMMED // width))
        self.chunk = triton.cdiv(tiles, chunks) * self.rows
        self.chunks = triton.cdiv(self.pixels, self.chunk)
        self.wide = triton.cdiv(self.channels, self.cols)
        self.tile = {"ROWS": self.rows, "COLS": self.cols}
        self.group = {"PARTS": triton.next_power_of_2(self.chunks), "COLS": width}
        self.partly = (self.pictures, self.chunks, self.wide)  # grids: CUDA's first axis alone is long
        self.all = (tiles, self.pictures, self.wide)
        self.grouped = (self.pictures, groups)

    def partials(self, x: Tensor) -> Tensor:
        return x.new_empty((2, self.pictures, self.chunks, self.channels), dtype=torch.float32)


@torch.library.custom_op("ldm::group_norm", mutates_args=())
def forward(
    x: Tensor, e: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, means and rstds of the groups [2 b g], means of the channels [b c], empty without e)."""
    size = _Sizes(x, groups)
    x = x.contiguous(memory_format=torch.channels_last)
    means, squares = size.partials(x)
    moments = x.new_empty((2, size.pictures, groups), dtype=torch.float32)
    channel = x.new_empty((size.pictures, size.channels) if e is not None else (0,), dtype=torch.float32)
    y, added = torch.empty_like(x), x if e is None else e.contiguous()
    with torch.cuda.device_of(x):
        _moments[size.partly](x, means, squares, size.pixels, size.channels, size.chunk, **size.tile)
        _group_moments[size.grouped](
            *(means, squares, added, moments[0], moments[1], channel),
            *(size.pixels, size.channels, size.chunk, size.chunks, groups, eps, e is not None),
            **size.group,
        )
        _forward[size.all](
            *(x, added, weight, bias, moments[0], moments[1], y),
            *(size.pixels, size.channels, groups, e is not None, silu),
            **size.tile,
        )
    return y, moments, channel


@torch.library.custom_op("ldm::group_norm_backward", mutates_args=())
def backward(
    dy: Tensor, x: Tensor, e: Tensor | None, weight: Tensor, bias: Tensor, moments: Tensor, channel: Tensor,
    groups: int, silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, de [b c] or empty, dweight, dbias)."""
    size = _Sizes(x, groups)
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    added = x if e is None else e.contiguous()
    s1, s2 = size.partials(x)
    m1, m2 = torch.empty_like(moments)
    one, two = x.new_empty((2, size.pictures, size.channels), dtype=torch.float32)
    de = torch.empty_like(added) if e is not None else x.new_empty((0,))
    dx = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _sums[size.partly](
            *(x, added, weight, bias, moments[0], moments[1], dy, s1, s2),
            *(size.pixels, size.channels, groups, size.chunk, e is not None, silu),
            **size.tile,
        )
        _group_sums[size.grouped](
            *(s1, s2, weight, moments[0], moments[1], channel, m1, m2, one, two, de),
            *(size.pixels, size.channels, size.chunks, groups, e is not None),
            **size.group,
        )
        _backward[size.all](
            *(x, added, weight, bias, moments[0], moments[1], m1, m2, dy, dx),
            *(size.pixels, size.channels, groups, e is not None, silu),
            **size.tile,
        )
    return dx, de, two.sum(0).to(weight.dtype), one.sum(0).to(bias.dtype)


@forward.register_fake
def _(x, e, weight, bias, groups, eps, silu):  # type: ignore[no-untyped-def]
    y = torch.empty_like(x, memory_format=torch.channels_last)
    channel = x.new_empty(x.shape[:2] if e is not None else (0,), dtype=torch.float32)
    return y, x.new_empty((2, len(x), groups), dtype=torch.float32), channel


@backward.register_fake
def _(dy, x, e, weight, bias, moments, channel, groups, silu):  # type: ignore[no-untyped-def]
    de = torch.empty_like(e) if e is not None else x.new_empty((0,))
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    return dx, de, torch.empty_like(weight), torch.empty_like(bias)


def _keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, e, weight, bias, groups, _, silu = inputs
    _, moments, channel = output
    ctx.save_for_backward(x, e, weight, bias, moments, channel)
    ctx.groups, ctx.silu = groups, silu
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, _moments, _channel):  # type: ignore[no-untyped-def]
    dx, de, dweight, dbias = backward(dy, *ctx.saved_tensors, ctx.groups, ctx.silu)
    return dx, de if ctx.saved_tensors[1] is not None else None, dweight, dbias, None, None, None


_registered: None = forward.register_autograd(  # type: ignore[func-returns-value]
    _differentiate, setup_context=_keep
)


def group_norm(
    x: Tensor, e: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = True
) -> Tensor:
    """silu(group_norm(x + e)) [b c h w], channels last, in the type of x; `silu` False: without it."""
    return forward(x, e, weight, bias, groups, eps, silu)[0]
