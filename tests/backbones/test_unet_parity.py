"""The U-Net against diffusers' UNet2DConditionModel: same names, same numbers, same gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.backbones.unet import CrossAttentionUNet
from ldm.nn.embeddings import sinusoid
from ldm.types import Conditioning

diffusers = pytest.importorskip("diffusers")

CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def peer_options(levels: str, **options) -> dict:
    """`levels`: one letter a level, x with attention, o without."""
    names = [CROSS if level == "x" else PLAIN for level in levels]
    return {
        "down_block_types": tuple(name.format("Down") for name in names),
        "up_block_types": tuple(name.format("Up") for name in reversed(names)),
        **options,
    }


SMALL = {"block_out_channels": (32, 64, 64, 64), "norm_groups": 8}
SMALL_PEER = {"block_out_channels": (32, 64, 64, 64), "norm_num_groups": 8}
SHAPES = {
    "sd1": (
        {**SMALL, "num_heads": 8, "context_dim": 24},
        peer_options("xxxo", **SMALL_PEER, attention_head_dim=8, cross_attention_dim=24),
        (16, 16),
    ),
    "sd1, odd sizes and 9 channels": (
        {**SMALL, "in_channels": 9, "num_heads": 8, "context_dim": 24},
        peer_options("xxxo", **SMALL_PEER, in_channels=9, attention_head_dim=8, cross_attention_dim=24),
        (9, 14),
    ),
    "sd2": (
        {**SMALL, "head_dim": 16, "context_dim": 40, "linear_projection": True},
        peer_options(
            "xxxo",
            **SMALL_PEER,
            attention_head_dim=(2, 4, 4, 4),
            cross_attention_dim=40,
            use_linear_projection=True,
        ),
        (16, 16),
    ),
    "sdxl": (
        {
            "block_out_channels": (32, 64, 96),
            "norm_groups": 8,
            "transformer_depth": (0, 2, 3),
            "head_dim": 16,
            "context_dim": 48,
            "linear_projection": True,
            "pooled_dim": 20 + 6 * 8,
        },
        peer_options(
            "oxx",
            block_out_channels=(32, 64, 96),
            norm_num_groups=8,
            transformer_layers_per_block=(1, 2, 3),
            attention_head_dim=(2, 4, 6),
            cross_attention_dim=48,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=20 + 6 * 8,
        ),
        (16, 16),
    ),
    "class labels, layers per level": (
        {
            "block_out_channels": (16, 32),
            "norm_groups": 8,
            "layers_per_block": (1, 3),
            "transformer_depth": (1, 2),
            "num_heads": (2, 4),
            "context_dim": 24,
            "num_classes": 5,
        },
        peer_options(
            "xx",
            block_out_channels=(16, 32),
            norm_num_groups=8,
            layers_per_block=(1, 3),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(2, 4),
            cross_attention_dim=24,
            num_class_embeds=5,
        ),
        (8, 8),
    ),
    "upscaler": (
        {
            "in_channels": 7,
            "block_out_channels": (16, 32, 32, 64),
            "norm_groups": 8,
            "transformer_depth": (0, 1, 1, 1),
            "self_attention": (False, False, False, True),
            "num_heads": 8,
            "context_dim": 24,
            "linear_projection": True,
            "num_classes": 5,
        },
        peer_options(
            "oxxx",
            in_channels=7,
            block_out_channels=(16, 32, 32, 64),
            norm_num_groups=8,
            only_cross_attention=(True, True, True, False),
            attention_head_dim=8,
            cross_attention_dim=24,
            use_linear_projection=True,
            num_class_embeds=5,
        ),
        (16, 16),
    ),
    "no attention": (
        {"block_out_channels": (16, 32), "norm_groups": 8, "transformer_depth": 0, "num_heads": 1},
        peer_options("oo", block_out_channels=(16, 32), norm_num_groups=8, mid_block_type="UNetMidBlock2D"),
        (8, 8),
    ),
}


def build(name: str) -> tuple[CrossAttentionUNet, nn.Module]:
    ours_options, theirs_options, _ = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**theirs_options).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    ours = CrossAttentionUNet(**ours_options).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.train(), theirs.train()


def arguments(name: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x, time, and by name what both networks are conditioned on."""
    options, _, size = SHAPES[name]
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x = normal(2, options.get("in_channels", 4), *size)
    told = {}
    if "context_dim" in options:
        told["context"] = normal(2, 7, options["context_dim"])
    if "pooled_dim" in options:
        told["text"] = normal(2, 20)
        told["time_ids"] = torch.tensor([[512.0, 512, 0, 0, 512, 512], [300.0, 400, 7, 9, 512, 512]])
    if "num_classes" in options:
        told["label"] = torch.tensor([3, 0])
    return x, torch.tensor([3.25, 981.0], dtype=torch.float64), told


def run_ours(
    net: nn.Module, x: Tensor, time: Tensor, told: dict[str, Tensor], mask: Tensor | None = None
) -> Tensor:
    pooled = None
    if "text" in told:
        facts = sinusoid(told["time_ids"].flatten(), 8).double()  # float32, as the peer has it
        pooled = torch.cat([told["text"], facts.reshape(2, -1)], dim=-1)
    return net(x, time, Conditioning(told.get("context"), mask, pooled=pooled, label=told.get("label")))


def run_theirs(
    net: nn.Module, x: Tensor, time: Tensor, told: dict[str, Tensor], mask: Tensor | None = None
) -> Tensor:
    added = {"text_embeds": told["text"], "time_ids": told["time_ids"]} if "text" in told else None
    return net(
        x,
        time,
        told.get("context"),
        class_labels=told.get("label"),
        added_cond_kwargs=added,
        encoder_attention_mask=mask,
    ).sample


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


class ExactTime(nn.Module):
    """Stands in for the peer's timestep sinusoid, which computes in float32 whatever it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, time: Tensor) -> Tensor:
        return sinusoid(time, self.width, torch.float64)


@pytest.mark.parametrize("name", SHAPES)
def test_forward_with_the_peers_float32_time(name: str) -> None:
    ours, theirs = build(name)
    x, time, told = arguments(name)
    with torch.no_grad():
        expected = run_theirs(theirs, x, time, told)
        out = run_ours(ours, x, time, told)
    assert expected.std() > 0.01
    assert relative(out, expected) <= 1e-5  # all of it from the peer's float32 sinusoid: see the next test


@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_gradients(name: str) -> None:
    ours, theirs = build(name)
    theirs.time_proj = ExactTime(theirs.config.block_out_channels[0])
    results = []
    for net, run in ((ours, run_ours), (theirs, run_theirs)):
        x, time, told = arguments(name)
        out = run(net, x, time, told)
        assert out.std() > 0.01
        out.square().sum().backward()
        given = {"x": x, **{key: value for key, value in told.items() if value.requires_grad}}
        gradients = {key: value.grad for key, value in (*given.items(), *net.named_parameters())}
        results.append((out, gradients))
    (out, gradients), (expected, expected_gradients) = results
    assert relative(out, expected) <= 1e-6
    assert gradients.keys() == expected_gradients.keys()
    worst = max(relative(gradients[key], expected_gradients[key]) for key in gradients)
    assert worst <= 1e-6


def test_context_mask() -> None:
    ours, theirs = build("sd2")
    x, time, told = arguments("sd2")
    mask = torch.tensor([[True] * 3 + [False] * 4, [True] * 6 + [False]])
    with torch.no_grad():
        out, expected = (
            run(net, x, time, told, mask) for net, run in ((ours, run_ours), (theirs, run_theirs))
        )
        unmasked = run_ours(ours, x, time, told)
    assert relative(out, expected) <= 1e-5
    assert relative(unmasked, expected) > 1e-3


def test_full_size_sd1_names_and_shapes() -> None:
    path = Path(__file__).parents[2] / "configs" / "backbone" / "sd1.yaml"
    groups = {
        "b": OmegaConf.load(path),
        "autoencoder": {"latent_channels": 4},
        "conditioner": {"context_dim": 768},
    }
    options = OmegaConf.to_container(OmegaConf.create(groups), resolve=True)["b"]
    del options["_target_"]
    with torch.device("meta"):
        ours = CrossAttentionUNet(**options).state_dict()
        theirs = diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert len(ours) == 686
