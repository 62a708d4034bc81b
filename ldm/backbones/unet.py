"""The U-Net with cross-attention of latent diffusion, general enough for Stable Diffusion 1, 2 and XL.

Rombach et al., "High-resolution image synthesis with latent diffusion models", CVPR 2022; Podell et al.,
"SDXL", 2023. State-dict names are those of diffusers' UNet2DConditionModel: weights, adapters and tools fit.

b batch, c channels, h w latent size, l tokens, d context width, p pooled width, e embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.attention import Transformer2D
from ldm.nn.checkpointing import run
from ldm.nn.embeddings import EmbeddingMLP, sinusoid
from ldm.nn.norm import group_norm
from ldm.nn.resnet import Downsample, Level, ResnetBlock, Upsample, zeroed
from ldm.types import Conditioning

EPS = 1e-5  # of the U-Net's group norms; those of its transformers have 1e-6


class Told(NamedTuple):
    """What every block is told beside the features."""

    emb: Tensor  # SiLU of the sum of the embeddings [b e]
    context: Tensor | None  # [b l d]
    mask: Tensor | None  # bool [b l]
    recompute: bool  # gradient checkpointing
    random: bool  # resnets draw dropout masks


class UNetLevel(Level):
    """Runs one resnet or transformer, with gradient checkpointing where asked for."""

    def resnet(self, i: int, x: Tensor, told: Told) -> Tensor:
        return run(self.resnets[i], x, told.emb, recompute=told.recompute, random=told.random)

    def attention(self, i: int, x: Tensor, told: Told) -> Tensor:
        if i >= len(self.attentions):
            return x
        return self.attentions[i](x, told.context, told.mask, told.recompute)


class DownLevel(UNetLevel):
    def forward(self, x: Tensor, told: Told) -> list[Tensor]:
        """Every block's output, in order: the way up takes them all, and the last one goes on down."""
        outputs = []
        for i in range(len(self.resnets)):
            x = self.attention(i, self.resnet(i, x, told), told)
            outputs.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            outputs.append(x)
        return outputs


class MidLevel(UNetLevel):
    def forward(self, x: Tensor, told: Told) -> Tensor:
        x = self.attention(0, self.resnet(0, x, told), told)
        for i in range(1, len(self.resnets)):
            x = self.resnet(i, x, told)
        return x


class UpLevel(UNetLevel):
    def forward(self, x: Tensor, skips: Sequence[Tensor], told: Told, size: Sequence[int]) -> Tensor:
        """Takes its `skips`, one a resnet, the last first; enlarges to `size`, if at all."""
        for i, skip in enumerate(reversed(skips)):
            x = torch.cat([x, skip], dim=1)
            x = self.attention(i, self.resnet(i, x, told), told)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x


def per_level(name: str, value: int | Sequence[int], levels: int) -> tuple[int, ...]:
    """One number for each level, from one number or as many as there are levels."""
    values = (value,) * levels if isinstance(value, int) else tuple(value)
    if len(values) != levels:
        raise ValueError(f"{name} has {len(values)} entries, block_out_channels has {levels}")
    return values


class CrossAttentionUNet(nn.Module):
    """F(x, time, conditioning), [b c h w] -> [b c_out h w]; a fresh network returns 0.

    in_channels         channels of x and of conditioning.concat together
    block_out_channels  one entry a level, the first at latent resolution; each a multiple of norm_groups
    layers_per_block    resnets a level on the way down (one more on the way up)
    transformer_depth   transformer blocks after each resnet of the level, 0: no attention there
    mid_depth           the same at the bottom; None: that of the deepest level with attention
    self_attention      False: pixels of the level attend to the context twice, not to each other (SD 2's
                        upscaler); one value or one a level; the bottom is always True
    num_heads, head_dim exactly one of them: how attention is split; one number or one a level
    context_dim         width of conditioning.context; None: there is none, pixels attend to each other alone
    linear_projection   see `Transformer2D`; False in SD 1, True in SD 2 and XL
    pooled_dim          width of conditioning.pooled (SDXL: 2816); None: there is none
    num_classes         rows of the embedding of conditioning.label, the null class included; None: no labels
    """

    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int | Sequence[int] = 2,
        transformer_depth: int | Sequence[int] = (1, 1, 1, 0),
        mid_depth: int | None = None,
        self_attention: bool | Sequence[bool] = True,
        num_heads: int | Sequence[int] | None = None,
        head_dim: int | Sequence[int] | None = None,
        context_dim: int | None = 768,
        linear_projection: bool = False,
        pooled_dim: int | None = None,
        num_classes: int | None = None,
        norm_groups: int = 32,
        dropout: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        channels = tuple(block_out_channels)
        layers = per_level("layers_per_block", layers_per_block, len(channels))
        depths = per_level("transformer_depth", transformer_depth, len(channels))
        if mid_depth is None:
            mid_depth = next((depth for depth in reversed(depths) if depth), 0)
        looks = per_level("self_attention", self_attention, len(channels))
        if not all(looks) and not context_dim:
            raise ValueError(
                f"self_attention={self_attention} leaves nothing to attend to: context_dim is None"
            )
        heads = _heads(channels, [*depths[:-1], max(depths[-1], mid_depth)], num_heads, head_dim)
        for width in channels:
            if width % norm_groups:
                raise ValueError(f"block_out_channels {width} is not a multiple of norm_groups {norm_groups}")

        self.in_channels = in_channels
        self.out_channels = out_channels
        self.context_dim = context_dim if mid_depth or any(depths) else None
        self.pooled_dim = pooled_dim
        self.num_classes = num_classes
        self.dropout = dropout
        self.gradient_checkpointing = gradient_checkpointing

        emb_width = 4 * channels[0]
        self.time_embedding = EmbeddingMLP(channels[0], emb_width)
        self.add_embedding = EmbeddingMLP(pooled_dim, emb_width) if pooled_dim else None
        self.class_embedding = nn.Embedding(num_classes, emb_width) if num_classes else None

        resnet = partial(
            ResnetBlock,
            emb_width=emb_width,
            norm_groups=norm_groups,
            eps=EPS,
            dropout=dropout,
            zero_init=True,
        )
        transformer = partial(
            Transformer2D,
            context_dim=context_dim,
            linear_projection=linear_projection,
            norm_groups=norm_groups,
        )
        transformers = [
            partial(transformer, *sizes, self_attention=bool(look))
            for *sizes, look in zip(channels, depths, heads, looks, strict=True)
        ]
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks, skips = _down_blocks(channels, layers, depths, resnet, transformers)
        self.mid_block = MidLevel(
            [resnet(channels[-1], channels[-1]) for _ in range(2 if mid_depth else 1)],  # as diffusers has it
            [transformer(channels[-1], mid_depth, heads[-1])] if mid_depth else [],
        )
        self.up_blocks = _up_blocks(channels, layers, depths, resnet, transformers, skips)
        self.conv_norm_out = nn.GroupNorm(norm_groups, channels[0], EPS)
        self.conv_out = zeroed(nn.Conv2d(channels[0], out_channels, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """x [b c h w] of any size, time float [b]; ValueError if conditioning does not fit the network."""
        self._check(x, time, conditioning)
        emb = self.time_embedding(sinusoid(time, self.time_embedding.linear_1.in_features, x.dtype))
        if self.add_embedding is not None:
            emb = emb + self.add_embedding(conditioning.pooled)
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(conditioning.label)
        told = Told(
            F.silu(emb),
            conditioning.context,
            conditioning.context_mask,
            recompute=self.gradient_checkpointing,
            random=self.training and self.dropout > 0,
        )

        x = x if conditioning.concat is None else torch.cat([x, conditioning.concat], dim=1)
        skips = [self.conv_in(x)]
        for down in self.down_blocks:
            skips += down(skips[-1], told)
        x = self.mid_block(skips[-1], told)
        for up in self.up_blocks:  # nothing that a level is given is changed: FSDP's hooks hand on copies
            rest = len(skips) - len(up.resnets)  # type: ignore[arg-type]
            x = up(x, skips[rest:], told, skips[max(rest - 1, 0)].shape[2:])
            skips = skips[:rest]
        return self.conv_out(group_norm(x, self.conv_norm_out, silu=True))

    def _check(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> None:
        """Shapes alone are looked at, so the device is never waited for."""
        given = x.shape[1] + (0 if conditioning.concat is None else conditioning.concat.shape[1])
        if given != self.in_channels:
            concat = given - x.shape[1]
            raise ValueError(
                f"in_channels is {self.in_channels}, but x has {x.shape[1]} and conditioning.concat {concat}"
            )
        if time.shape != x.shape[:1]:
            raise ValueError(f"time has shape {list(time.shape)}, but a batch of {len(x)} needs [{len(x)}]")
        for name, option, width in (
            ("context", "context_dim", self.context_dim),
            ("pooled", "pooled_dim", self.pooled_dim),
            ("label", "num_classes", self.num_classes),
        ):
            value = getattr(conditioning, name)
            if (value is None) != (width is None):
                is_given = "missing" if value is None else "given"
                raise ValueError(f"conditioning.{name} is {is_given}, but the network's {option} is {width}")
            if value is not None and name != "label" and value.shape[-1] != width:
                raise ValueError(f"conditioning.{name} has width {value.shape[-1]}, but {option} is {width}")
        mask, context = conditioning.context_mask, conditioning.context
        if mask is not None and context is not None and mask.shape != context.shape[:2]:
            raise ValueError(f"context_mask has shape {list(mask.shape)}, context {list(context.shape)}")


def _heads(
    channels: tuple[int, ...],
    depths: Sequence[int],
    num_heads: int | Sequence[int] | None,
    head_dim: int | Sequence[int] | None,
) -> tuple[int, ...]:
    """Heads of each level; levels without attention are not checked."""
    if (num_heads is None) == (head_dim is None):
        raise ValueError(f"exactly one of num_heads = {num_heads} and head_dim = {head_dim} must be given")
    name, split = ("num_heads", num_heads) if head_dim is None else ("head_dim", head_dim)
    parts = per_level(name, split, len(channels))  # type: ignore[arg-type]
    for width, part, depth in zip(channels, parts, depths, strict=True):
        if depth and width % part:
            raise ValueError(f"block_out_channels {width} is not a multiple of {name} {part}")
    return parts if head_dim is None else tuple(w // part for w, part in zip(channels, parts, strict=True))


def _down_blocks(
    channels: tuple[int, ...],
    layers: tuple[int, ...],
    depths: tuple[int, ...],
    resnet: Callable[..., nn.Module],
    transformers: Sequence[Callable[[], nn.Module]],
) -> tuple[nn.ModuleList, list[int]]:
    """The levels on the way down, and the channels of every output that the way up takes, conv_in's first."""
    levels = nn.ModuleList()
    skips = [channels[0]]
    for i, width in enumerate(channels):
        incoming = [skips[-1]] + [width] * (layers[i] - 1)
        down = i < len(channels) - 1
        levels.append(
            DownLevel(
                [resnet(c, width) for c in incoming],
                [transformers[i]() for _ in incoming if depths[i]],
                downsamplers=[Downsample(width)] if down else [],
            )
        )
        skips += [width] * (layers[i] + down)
    return levels, skips


def _up_blocks(
    channels: tuple[int, ...],
    layers: tuple[int, ...],
    depths: tuple[int, ...],
    resnet: Callable[..., nn.Module],
    transformers: Sequence[Callable[[], nn.Module]],
    skips: Sequence[int],
) -> nn.ModuleList:
    """The levels on the way up, lowest resolution first; each resnet takes one of `skips`, the last first."""
    levels = nn.ModuleList()
    remaining = list(skips)
    below = channels[-1]
    for i in reversed(range(len(channels))):
        width = channels[i]
        arriving = [below] + [width] * layers[i]
        levels.append(
            UpLevel(
                [resnet(c + remaining.pop(), width) for c in arriving],
                [transformers[i]() for _ in arriving if depths[i]],
                upsamplers=[Upsample(width)] if i > 0 else [],
            )
        )
        below = width
    return levels
