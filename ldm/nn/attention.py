"""Attention over the pixels of a latent and over a context: b batch, c channels, h w size, l tokens, d width.

State-dict names are those of diffusers; `to_q`, `to_k`, `to_v` are the only parameters of the projections.
Pixels become tokens as [b h*w c], which of a channels_last tensor is a view.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.nn.attention_choice import attention
from ldm.nn.checkpointing import run
from ldm.nn.norm import group_norm
from ldm.nn.resnet import zeroed


def to_tokens(x: Tensor) -> Tensor:
    """[b c h w] -> [b h*w c]; a view if x is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """[b h*w c] -> [b c h w], a channels_last view."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


_fused_qkv = False


def use_fused_qkv(on: bool) -> None:
    """Project queries, keys and values by one product from now on, or by one each: equal but for rounding."""
    global _fused_qkv
    _fused_qkv = on


def _plain(layer: nn.Module) -> bool:
    """Whether a linear layer is all that calling it would be: no adapter around it, no hook on it."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is nn.Linear and not any(hooks) and "forward" not in layer.__dict__


def _project(x: Tensor, layers: list[nn.Linear]) -> list[Tensor]:
    """[b l d] -> [b l c] of each layer, views of one product.

    Its price is a copy of the weights; under autocast it is the copy that is made anyway, if compiled.
    """
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    joint = F.linear(x, torch.cat([layer.weight for layer in layers]), bias)
    return list(joint.split([layer.out_features for layer in layers], dim=-1))


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves or to a context, head width c / heads."""

    def __init__(self, width: int, heads: int, context_width: int | None = None, bias: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"attention of width {width} cannot be split into {heads} heads")
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width or width, width, bias=bias)
        self.to_v = nn.Linear(context_width or width, width, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def attend(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """[b l c] -> [b l c]; `context` [b l' d], None: x itself; `mask` bool [b l'], False: ignored."""
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [b heads l c/heads]
            for projected in self.projected(x, context)
        )
        out = attention(q, k, v, None if mask is None else mask[:, None, None, :])
        return self.to_out(out.transpose(1, 2).flatten(2))

    def projected(self, x: Tensor, context: Tensor | None) -> list[Tensor]:
        """Queries [b l c], keys and values [b l' c]."""
        layers = [self.to_q, self.to_k, self.to_v]
        if not _fused_qkv or not all(map(_plain, layers)):
            source = x if context is None else context
            return [self.to_q(x), self.to_k(source), self.to_v(source)]
        if context is None:
            return _project(x, layers)
        return [self.to_q(x), *_project(context, layers[1:])]

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.attend(x, context, mask)


class PixelAttention(Attention):
    """The autoencoder's attention: one head over all pixels of [b c h w], with its own norm and skip."""

    def __init__(self, channels: int, norm_groups: int, eps: float) -> None:
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(norm_groups, channels, eps)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x + to_map(self.attend(to_tokens(group_norm(x, self.group_norm))), *x.shape[2:])


class GEGLU(nn.Module):
    """Linear to twice the width, one half gated by the exact (erf) GELU of the other (Shazeer 2020)."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward; each after a LayerNorm and around a skip.

    Without a `context_dim` there is no attention to a context. `self_attention` False: the first attention is
    to the context, too.
    """

    def __init__(self, width: int, heads: int, context_dim: int | None, self_attention: bool = True) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, None if self_attention else context_dim)
        self.norm2 = nn.LayerNorm(width) if context_dim else None
        self.attn2 = Attention(width, heads, context_dim) if context_dim else None
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None = None) -> Tensor:
        told = (None, None) if self.self_attention else (context, mask)
        x = x + self.attn1(self.norm1(x), *told)
        if self.attn2 is not None and self.norm2 is not None:
            x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    """Transformer blocks over the pixels of a latent, inside a skip that starts as the identity.

    `linear_projection`: the projections around the blocks are linear layers (SD 2, SDXL) and not 1x1
    convolutions (SD 1): the same computation, other shapes of weights.
    """

    def __init__(
        self,
        channels: int,
        depth: int,
        heads: int,
        *,
        context_dim: int | None,
        linear_projection: bool = False,
        norm_groups: int = 32,
        self_attention: bool = True,
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.proj_in = (
            nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        )
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_dim, self_attention) for _ in range(depth)
        )
        self.proj_out = zeroed(
            nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        )

    def forward(
        self, x: Tensor, context: Tensor | None, mask: Tensor | None = None, recompute: bool = False
    ) -> Tensor:
        """[b c h w], context [b l d], mask bool [b l] -> [b c h w]."""
        size = x.shape[2:]
        h = group_norm(x, self.norm)
        h = self.proj_in(to_tokens(h)) if self.linear_projection else to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = run(block, h, context, mask, recompute=recompute)
        h = to_map(self.proj_out(h), *size) if self.linear_projection else self.proj_out(to_map(h, *size))
        return x + h
