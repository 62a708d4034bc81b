"""The U-Net by itself: its laws, its sizes, what it refuses. Numbers against a peer: test_unet_parity.py."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.backbones.unet import CrossAttentionUNet
from ldm.types import Conditioning

CONFIGS = Path(__file__).parents[2] / "configs" / "backbone"
TINY = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "transformer_depth": (0, 1),
    "head_dim": 8,
    "context_dim": 12,
    "norm_groups": 8,
}


def redrawn(net: torch.nn.Module, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    net.to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return net


def inputs(batch: int = 2, size: int = 8, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    time = torch.linspace(1.0, 900.0, batch, dtype=dtype)
    return normal(batch, 4, size, size), time, Conditioning(context=normal(batch, 5, 12))


@pytest.mark.parametrize(
    ("name", "latent_channels", "context_dim", "parameters"),
    [
        ("sd1", 4, 768, 859_520_964),
        ("sd2", 4, 1024, 865_910_724),
        ("sdxl", 4, 2048, 2_567_463_684),
        ("upscaler", 4, 1024, 473_398_020),
        ("ldm_class", 3, 512, 400_920_579),
        ("tiny", 4, 64, 1_001_828),
    ],
)
def test_published_sizes(name: str, latent_channels: int, context_dim: int, parameters: int) -> None:
    groups = {
        "backbone": OmegaConf.load(CONFIGS / f"{name}.yaml"),
        "autoencoder": {"latent_channels": latent_channels},
        "conditioner": {"context_dim": context_dim},
    }
    options = OmegaConf.to_container(OmegaConf.create(groups), resolve=True)["backbone"]
    module, _, network = options.pop("_target_").rpartition(".")
    with torch.device("meta"):
        net = getattr(importlib.import_module(module), network)(**options)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert f"{parameters:,} parameters" in (CONFIGS / f"{name}.yaml").read_text() or name == "tiny"


def test_every_config_is_counted() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {
        "sd1",
        "sd2",
        "sdxl",
        "upscaler",
        "ldm_class",
        "tiny",
    }


def test_fresh_network_returns_zero_and_learns() -> None:
    net = CrossAttentionUNet(**TINY).double()
    x, time, conditioning = inputs()
    out = net(x, time, conditioning)
    assert torch.equal(out, torch.zeros_like(x))
    (out - x).square().sum().backward()
    assert net.conv_out.weight.grad.abs().max() > 0


def test_branches_start_as_identity() -> None:
    net = CrossAttentionUNet(**TINY)
    starts = {name for name, value in net.named_parameters() if name.endswith("weight") and not value.any()}
    expected = {
        name for name, _ in net.named_parameters() if name.endswith(("conv2.weight", "proj_out.weight"))
    }
    assert starts == expected | {"conv_out.weight"}


@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"linear_projection": True, "mid_depth": 2}])
def test_gradient_checkpointing_changes_nothing(options: dict) -> None:
    net = redrawn(CrossAttentionUNet(**TINY, **options))
    results = []
    for switch in (False, True):
        net.gradient_checkpointing = switch
        net.zero_grad()
        torch.manual_seed(0)
        x, time, conditioning = inputs()
        x.requires_grad_()
        out = net(x, time, conditioning)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad.clone() for p in net.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_gradient_checkpointing_keeps_fewer_activations() -> None:
    saved = []
    for switch in (False, True):
        net = redrawn(CrossAttentionUNet(**TINY, gradient_checkpointing=switch))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t
        ):
            net(*inputs())
        saved.append(sum(sizes))
    assert saved[1] < 0.6 * saved[0]


def test_dropout_only_in_training() -> None:
    net = redrawn(CrossAttentionUNet(**TINY, dropout=0.5))
    assert not torch.equal(net(*inputs()), net(*inputs()))
    net.eval()
    assert torch.equal(net(*inputs()), net(*inputs()))


def test_rows_of_a_batch_are_independent() -> None:
    net = redrawn(CrossAttentionUNet(**TINY))
    x, time, conditioning = inputs(batch=3)
    out = net(x, time, conditioning)
    for i in range(3):
        row = slice(i, i + 1)
        alone = net(x[row], time[row], Conditioning(context=conditioning.context[row]))
        torch.testing.assert_close(alone, out[row], rtol=1e-10, atol=1e-12)


def test_time_and_context_and_pixels_matter() -> None:
    net = redrawn(CrossAttentionUNet(**TINY))
    x, time, conditioning = inputs()
    out = net(x, time, conditioning)
    for other in (
        (x + 0.1, time, conditioning),
        (x, time + 1, conditioning),
        (x, time, Conditioning(context=conditioning.context + 1)),
    ):
        assert (net(*other) - out).abs().max() > 1e-6


def test_masked_tokens_do_not_matter() -> None:
    net = redrawn(CrossAttentionUNet(**TINY))
    x, time, conditioning = inputs()
    context = conditioning.context
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    changed = torch.where(mask[..., None], context, 7.0)
    out = net(x, time, Conditioning(context=context, context_mask=mask))
    assert torch.equal(out, net(x, time, Conditioning(context=changed, context_mask=mask)))
    cut = net(x[:1], time[:1], Conditioning(context=context[:1, :3]))
    torch.testing.assert_close(out[:1], cut, rtol=1e-10, atol=1e-12)
    whole = net(x, time, conditioning)
    torch.testing.assert_close(out[1], whole[1], rtol=1e-10, atol=1e-12)
    assert (out[0] - whole[0]).abs().max() > 1e-6


def test_row_whose_tokens_are_all_masked_is_finite() -> None:
    net = redrawn(CrossAttentionUNet(**TINY))
    x, time, conditioning = inputs()
    mask = torch.tensor([[False] * 5, [True] * 5])
    out = net(x, time, Conditioning(context=conditioning.context, context_mask=mask))
    out.sum().backward()
    assert out.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_concat_joins_latents() -> None:
    net = redrawn(CrossAttentionUNet(in_channels=6, **TINY))
    x, time, conditioning = inputs()
    extra = torch.ones(2, 2, 8, 8, dtype=torch.float64)
    joined = net(torch.cat([x, extra], dim=1), time, conditioning)
    assert torch.equal(net(x, time, Conditioning(context=conditioning.context, concat=extra)), joined)
    assert joined.shape == x.shape


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 3)])
def test_any_size(size: tuple[int, int]) -> None:
    net = redrawn(CrossAttentionUNet(**TINY))
    x = torch.ones(2, 4, *size, dtype=torch.float64)
    _, time, conditioning = inputs()
    assert net(x, time, conditioning).shape == x.shape


class LayoutRecorder(TorchDispatchMode):
    """Names of operations that copy activations, and of those whose 4-d output is not channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []
        self.other_layout: list[str] = []
        self.convolutions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("clone", "copy_", "contiguous", "_to_copy", "_reshape_copy") and args[0].ndim >= 3:
            self.copies.append(f"{name} {list(args[0].shape)}")
        self.convolutions += name == "convolution"
        first = out[0] if isinstance(out, tuple) else out
        if name in ("convolution", "native_group_norm", "silu", "add", "cat", "upsample_nearest2d") and (
            first.ndim == 4 and not first.is_contiguous(memory_format=torch.channels_last)
        ):
            self.other_layout.append(f"{name} {list(first.shape)}")
        return out


@pytest.mark.parametrize("linear_projection", [False, True])
def test_channels_last_from_end_to_end(linear_projection: bool) -> None:
    net = redrawn(CrossAttentionUNet(**TINY, linear_projection=linear_projection), torch.float32)
    net.to(memory_format=torch.channels_last)
    x, time, conditioning = inputs(dtype=torch.float32)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    with LayoutRecorder() as seen:
        out = net(x, time, conditioning)
    assert seen.convolutions > 10
    assert seen.copies == []
    assert seen.other_layout == []
    assert out.is_contiguous(memory_format=torch.channels_last)
    out.square().sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_layouts_agree() -> None:
    net = redrawn(CrossAttentionUNet(**TINY))
    x, time, conditioning = inputs()
    plain = net(x, time, conditioning)
    net.to(memory_format=torch.channels_last)
    last = net(x.to(memory_format=torch.channels_last), time, conditioning)
    torch.testing.assert_close(last, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_bfloat16_autocast(gradient_checkpointing: bool) -> None:
    net = redrawn(CrossAttentionUNet(**TINY, gradient_checkpointing=gradient_checkpointing), torch.float32)
    x, time, conditioning = inputs(dtype=torch.float32)
    exact = net(x, time, conditioning)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, time, conditioning)
    assert out.dtype == torch.bfloat16
    assert (out - exact).std() < 0.03 * exact.std()
    out.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def test_forward_never_asks_for_a_value() -> None:
    with torch.device("meta"):
        net = CrossAttentionUNet(**TINY, pooled_dim=6, num_classes=3)
        told = Conditioning(
            context=torch.empty(2, 5, 12),
            context_mask=torch.ones(2, 5, dtype=torch.bool),
            pooled=torch.empty(2, 6),
            label=torch.zeros(2, dtype=torch.int64),
        )
        assert net(torch.empty(2, 4, 8, 8), torch.empty(2), told).shape == (2, 4, 8, 8)


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({"head_dim": None}, ("num_heads", "head_dim")),
        ({"num_heads": 4}, ("4", "8")),
        ({"head_dim": 7}, ("32", "7")),
        ({"head_dim": None, "num_heads": 5}, ("32", "5")),
        ({"head_dim": (8, 8, 8)}, ("3", "2")),
        ({"transformer_depth": (0, 1, 1)}, ("3", "2")),
        ({"layers_per_block": (1,)}, ("1", "2")),
        ({"norm_groups": 5}, ("16", "5")),
        ({"self_attention": (True,)}, ("1", "2")),
        ({"self_attention": False, "context_dim": None}, ("self_attention=False", "context_dim")),
    ],
)
def test_impossible_networks_are_refused(options: dict, numbers: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=".*".join(numbers)):
        CrossAttentionUNet(**{**TINY, **options})


def test_heads_are_only_checked_where_there_is_attention() -> None:
    CrossAttentionUNet(**{**TINY, "head_dim": 32})
    with pytest.raises(ValueError, match="16.*32"):
        CrossAttentionUNet(**{**TINY, "head_dim": 32, "transformer_depth": (1, 1)})


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({}, {"context": None}, "context is missing.*12"),
        ({}, {"context": torch.ones(2, 5, 10)}, "width 10.*12"),
        ({}, {"context_mask": torch.ones(2, 6, dtype=torch.bool)}, r"\[2, 6\].*\[2, 5, 12\]"),
        ({}, {"concat": torch.ones(2, 3, 8, 8)}, "in_channels is 4.*4.*3"),
        ({"in_channels": 9}, {}, "in_channels is 9.*4.*0"),
        ({}, {"pooled": torch.ones(2, 6)}, "pooled is given.*None"),
        ({}, {"label": torch.zeros(2, dtype=torch.int64)}, "label is given.*None"),
        ({"pooled_dim": 6}, {}, "pooled is missing.*6"),
        ({"pooled_dim": 6}, {"pooled": torch.ones(2, 7)}, "width 7.*6"),
        ({"num_classes": 3}, {}, "label is missing.*3"),
    ],
)
def test_conditioning_that_does_not_fit_is_refused(options: dict, changes: dict, message: str) -> None:
    net = CrossAttentionUNet(**TINY, **options)
    x, time, conditioning = inputs(dtype=torch.float32)
    fields = {"context": conditioning.context, **changes}
    with pytest.raises(ValueError, match=message):
        net(x, time, Conditioning(**fields))


def test_time_of_another_batch_is_refused() -> None:
    x, time, conditioning = inputs()
    with pytest.raises(ValueError, match=r"\[3\].*\[2\]"):
        CrossAttentionUNet(**TINY)(x, torch.cat([time, time[:1]]), conditioning)
