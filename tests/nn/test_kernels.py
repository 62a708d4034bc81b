"""Fused kernels against the plain modules, forward and backward; on a CPU in Triton's interpreter."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("triton")

from ldm import random  # noqa: E402
from ldm.backbones.unet import CrossAttentionUNet  # noqa: E402
from ldm.nn import norm  # noqa: E402
from ldm.nn.kernels import normal  # noqa: E402
from ldm.nn.kernels.group_norm import SUMMED, _Sizes, backward, forward, group_norm  # noqa: E402
from ldm.types import Conditioning  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {  # b, c, h, w, groups
    "as in SD": (2, 320, 6, 6, 32),
    "ten channels a group, odd sides": (2, 320, 5, 7, 32),
    "thirty channels a group": (1, 960, 3, 4, 32),
    "one pixel": (3, 64, 1, 1, 32),
    "one group": (2, 40, 3, 3, 1),
    "several chunks of pixels": (1, 8, 70, 70, 2),
}


def tensors(shape, dtype, with_e, offset=3.0):
    """x, e or None, weight, bias, the gradient of y."""
    b, c, h, w, _ = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator).to(DEVICE)

    x = (2 * normal(b, c, h, w) + offset).to(dtype).contiguous(memory_format=torch.channels_last)
    e = normal(b, c).to(dtype) if with_e else None
    dy = normal(b, c, h, w).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, e, normal(c), normal(c), dy


def plain(x, e, weight, bias, groups, silu):
    x = x if e is None else x + e[:, :, None, None]
    y = F.group_norm(x, groups, weight, bias, 1e-5)
    return F.silu(y) if silu else y


def with_gradients(function, inputs, dy):
    inputs = [t if t is None else t.detach().requires_grad_() for t in inputs]
    y = function(*inputs)
    return [y, *torch.autograd.grad(y, [t for t in inputs if t is not None], dy.to(y.dtype))]


def worst(actual, expected):
    """The largest error, relative to the largest value."""
    return max(
        ((a.double() - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True)
    )


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("with_e", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_group_norm_forward_and_backward(shape, with_e, silu):
    *inputs, dy = tensors(shape, torch.float32, with_e)
    found = with_gradients(lambda *t: group_norm(*t, shape[-1], 1e-5, silu), inputs, dy)
    exact = [t if t is None else t.double() for t in inputs]
    expected = with_gradients(lambda *t: plain(*t, shape[-1], silu), exact, dy.double())
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert found[1].is_contiguous(memory_format=torch.channels_last)
    if shape[2] * shape[3] == 1:  # two values a group: gradients are differences of nearly equal numbers
        assert worst(found[:1], expected[:1]) < 1e-5
    else:
        assert worst(found, expected) < 1e-5


def test_group_norm_in_bf16_is_that_of_fp32_rounded_once():
    *inputs, dy = tensors(SHAPES["as in SD"], torch.bfloat16, True)
    found = with_gradients(lambda *t: group_norm(*t, 32, 1e-5, True), inputs, dy)
    exact = [t.double() for t in inputs]
    expected = with_gradients(lambda *t: plain(*t, 32, True), exact, dy.double())
    assert [t.dtype for t in found] == [torch.bfloat16] * 3 + [torch.float32] * 2
    assert worst(found, expected) < 2**-7, "a unit in the last place of a bf16"


def test_group_norm_of_values_far_from_zero_does_not_cancel():
    *inputs, dy = tensors(SHAPES["several chunks of pixels"], torch.float32, False, offset=1e4)
    found = group_norm(*inputs, 2, 1e-5, False)
    expected = plain(*[t if t is None else t.double() for t in inputs], 2, False)
    assert worst([found], [expected]) < 1e-3  # x itself has seven digits
    squares = inputs[0].square().mean() - inputs[0].mean() ** 2
    assert abs(squares.item() / 4 - 1) > 0.05, "the naive formula would be far off"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_large_pictures_and_wide_groups_are_dealt_as_cuda_can_take_them():
    large = _Sizes(torch.empty(1, 128, 1536, 1536, device="meta"), 32)
    assert large.all[0] * large.rows >= 1536**2
    for grid in (large.all, large.partly, large.grouped):
        assert max(grid[1:]) < 65_536, "of CUDA's axes the first alone is longer"
    wide = _Sizes(torch.empty(2, 1024, 128, 128, device="meta"), 1)
    assert wide.group["PARTS"] * wide.group["COLS"] <= SUMMED


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the tensors that opcheck makes
def test_the_operators_are_what_torch_expects_of_operators():
    x, e, weight, bias, dy = tensors((2, 16, 3, 3, 4), torch.float32, True)
    leaves = [t.requires_grad_() for t in (x, e, weight, bias)]
    torch.library.opcheck(forward, (*leaves, 4, 1e-5, True))
    _, moments, channel = forward(*leaves, 4, 1e-5, True)
    values = [t.detach() for t in (dy, *leaves, moments, channel)]
    torch.library.opcheck(backward, (*values, 4, True))


def test_a_network_with_it_is_the_network(monkeypatch):
    torch.manual_seed(0)
    net = CrossAttentionUNet(
        block_out_channels=(16, 32),
        layers_per_block=1,
        transformer_depth=(0, 1),
        head_dim=8,
        context_dim=8,
        norm_groups=4,
    )
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    net = net.to(DEVICE, memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 10, device=DEVICE).contiguous(memory_format=torch.channels_last)
    told = Conditioning(context=torch.randn(2, 5, 8, device=DEVICE))

    def gradients():
        net.zero_grad()
        out = net(x, torch.tensor([3.0, 700.0], device=DEVICE), told)
        out.square().mean().backward()
        return [out.detach().double(), *(p.grad.double() for p in net.parameters())]

    expected, used = gradients(), []
    monkeypatch.setattr(norm, "_fused", True)
    monkeypatch.setattr("ldm.nn.kernels.group_norm.group_norm", lambda *a: used.append(a) or group_norm(*a))
    assert worst(gradients(), expected) < 1e-4
    assert len(used) == sum(isinstance(m, nn.GroupNorm) for m in net.modules())


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 8, 3, 3), torch.zeros(2, 3, 3, 8, dtype=torch.float64).movedim(3, 1)]
)
def test_what_does_not_fit_is_left_to_torch(x, monkeypatch):
    monkeypatch.setattr(norm, "_fused", True)
    layer = nn.GroupNorm(2, 8).to(x.dtype)
    assert torch.equal(norm.group_norm(x, layer, silu=True), F.silu(layer(x)))


@pytest.mark.parametrize("seed", [0, 2**40 + 3, -1])
@pytest.mark.parametrize("shape", [(), (3,), (4, 8, 8), (1027,)])
def test_keyed_noise_has_the_bits_of_torchs_operations(seed, shape):
    n = torch.tensor([0, 5, 123_456_789_012, 2**62], device=DEVICE)
    expected = random.plain_normal(seed, n, "noise", shape)
    assert torch.equal(normal.launch(seed, n, "noise", shape), expected)
    assert torch.equal(normal.keyed_normal(seed, n, "noise", shape), expected)


@pytest.mark.parametrize("broken", ["other bits", "no compiler"])
def test_a_device_whose_kernel_gives_other_bits_keeps_torchs_operations(broken, monkeypatch, caplog):
    def launch(seed, n, purpose, shape):
        if broken == "no compiler":
            raise RuntimeError("no ptxas")
        return torch.zeros(len(n), *shape, device=n.device)

    monkeypatch.setattr(normal, "launch", launch)
    normal.agrees.cache_clear()
    n = torch.arange(2, device=DEVICE)
    try:
        for _ in range(2):
            found = normal.keyed_normal(1, n, "noise", (8,))
            assert torch.equal(found, random.plain_normal(1, n, "noise", (8,)))
    finally:
        normal.agrees.cache_clear()
    assert len(caplog.records) == 1
    assert ("no ptxas" if broken == "no compiler" else "other bits") in caplog.text
