"""What the first-stage autoencoders share: encoder, decoder, and the shift and scale of their latents.

Rombach et al. 2022, section 3.1. State-dict names are those of diffusers' AutoencoderKL and VQModel. The
autoencoder owns the latent shift and scale: nobody else multiplies by 0.18215.

b batch, c latent channels, m channels of the moments, h w latent size, H W image size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ldm.nn.attention import PixelAttention
from ldm.nn.norm import group_norm
from ldm.nn.resnet import Downsample, Level, ResnetBlock, Upsample

EPS = 1e-6  # of every group norm here


class Stage(Level):
    """One resolution of the encoder or decoder, or the middle."""

    def forward(self, x: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x)
            if i < len(self.attentions):
                x = self.attentions[i](x)
        for resample in (*self.downsamplers, *self.upsamplers):
            x = resample(x)
        return x


class Coder(nn.Module):
    """Encoder (`up` False) or decoder: levels and a middle; [b c_in h w] -> [b c_out h' w'].

    `channels`, `layers` and `attention` are in the order of computation of the levels.
    """

    def __init__(
        self,
        up: bool,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        layers: int,
        attention: Sequence[bool],
        norm_groups: int,
        mid_attention: bool,
    ) -> None:
        super().__init__()
        resnet = partial(ResnetBlock, norm_groups=norm_groups, eps=EPS)
        pixels = partial(PixelAttention, norm_groups=norm_groups, eps=EPS)
        middle = channels[0] if up else channels[-1]
        last = len(channels) - 1
        levels = nn.ModuleList()
        incoming = channels[0]
        for i, width in enumerate(channels):
            levels.append(
                Stage(
                    [resnet(incoming if j == 0 else width, width) for j in range(layers)],
                    [pixels(width) for _ in range(layers) if attention[i]],
                    downsamplers=[Downsample(width, asymmetric=True)] if i < last and not up else [],
                    upsamplers=[Upsample(width)] if i < last and up else [],
                )
            )
            incoming = width
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList() if up else levels
        self.mid_block = Stage(
            [resnet(middle, middle) for _ in range(2)], [pixels(middle)] if mid_attention else []
        )
        self.up_blocks = levels if up else nn.ModuleList()
        self.conv_norm_out = nn.GroupNorm(norm_groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in (*self.down_blocks, self.mid_block, *self.up_blocks):
            x = level(x)
        return self.conv_out(group_norm(x, self.conv_norm_out, silu=True))


class ConvAutoencoder(nn.Module):
    """Images in [-1, 1] to latents = (z - latent_shift) * latent_scale of about unit variance, and back.

    A subclass says what the encoder's output means: `sample`, `forward`, and how many moments a latent has.

    block_out_channels  one entry a level; images are 2^(levels - 1) times larger than latents
    layers_per_block    resnets a level in the encoder (one more in the decoder)
    mid_attention       attention at the lowest resolution
    attention_levels    one bool a level: attention after each of its resnets; None: nowhere
    use_quant_conv      1x1 convolutions around the latents
    latent_shift, latent_scale   one number or one a channel, in units of z; measured ones replace them
    """

    moments_per_latent: int  # m / c
    latent_shift: Tensor
    latent_scale: Tensor

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 4,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        norm_groups: int = 32,
        mid_attention: bool = True,
        attention_levels: Sequence[bool] | None = None,
        use_quant_conv: bool = True,
        latent_shift: float | Sequence[float] = 0.0,
        latent_scale: float | Sequence[float] = 1.0,
    ) -> None:
        super().__init__()
        channels = tuple(block_out_channels)
        attention = (False,) * len(channels) if attention_levels is None else tuple(attention_levels)
        if len(attention) != len(channels):
            raise ValueError(
                f"attention_levels has {len(attention)} entries, block_out_channels has {len(channels)}"
            )
        for width in channels:
            if width % norm_groups:
                raise ValueError(f"block_out_channels {width} is not a multiple of norm_groups {norm_groups}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.latent_channels = latent_channels
        self.factor = 2 ** (len(channels) - 1)

        c, m = latent_channels, self.moments_per_latent * latent_channels
        shared: dict[str, Any] = {"norm_groups": norm_groups, "mid_attention": mid_attention}
        self.encoder = Coder(False, in_channels, m, channels, layers_per_block, attention, **shared)
        self.decoder = Coder(
            True, c, out_channels, channels[::-1], layers_per_block + 1, attention[::-1], **shared
        )
        self.quant_conv = nn.Conv2d(m, m, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(c, c, 1) if use_quant_conv else None
        self.register_buffer("latent_shift", _per_channel("latent_shift", latent_shift, c))
        self.register_buffer("latent_scale", _per_channel("latent_scale", latent_scale, c))
        self.register_load_state_dict_pre_hook(_keep_own_statistics)

    def sample(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        """z [b c h w] in float32 at least, by standard normal `noise` of that shape; None: the mode."""
        raise NotImplementedError

    def forward(
        self, images: Tensor, noise: Tensor | None = None, weight: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction [b 3 H W], and [b] terms of the loss; in training, shift and scale play no part.

        `weight` [b]: 0 for pictures that must leave no trace in what is not trained by the loss.
        """
        raise NotImplementedError

    def moments(self, images: Tensor) -> Tensor:
        """[b 3 H W] in [-1, 1] -> [b m h w]: all there is to know of z, for `latents`."""
        for size in images.shape[2:]:
            if size % self.factor:
                raise ValueError(
                    f"image size {size} is not a multiple of the autoencoder's factor {self.factor}"
                )
        return self._encode(images)

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """[b m h w] -> [b c h w], shifted and scaled, float32 at least: a sample, without noise the mode."""
        z = self.sample(moments, noise)
        return (z - self.latent_shift.view(1, -1, 1, 1)) * self.latent_scale.view(1, -1, 1, 1)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """[b 3 H W] in [-1, 1] -> latents [b c h w]; noise standard normal of that shape, None: the mode."""
        return self.latents(self.moments(images), noise)

    def decode(self, latents: Tensor) -> Tensor:
        """[b c h w] -> [b 3 H W], about [-1, 1] but not clamped."""
        return self._decode(self._unscaled(latents))

    @torch.no_grad()
    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Shift by `mean` and scale by 1 / `std` from now on: both [c], of unscaled z over the data."""
        for name, value in (("mean", mean), ("std", std)):
            if value.shape != self.latent_shift.shape:
                raise ValueError(
                    f"{name} has shape {list(value.shape)}, but latent_channels = {self.latent_channels}"
                )
        if not (std > 0).all():
            raise ValueError(
                f"std must be positive in all {self.latent_channels} channels, not {std.tolist()}"
            )
        self.latent_shift.copy_(mean)
        self.latent_scale.copy_(1.0 / std)

    def _unscaled(self, latents: Tensor) -> Tensor:
        return latents / self.latent_scale.view(1, -1, 1, 1) + self.latent_shift.view(1, -1, 1, 1)

    def _encode(self, images: Tensor) -> Tensor:
        moments: Tensor = self.encoder(images)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def _decode(self, z: Tensor) -> Tensor:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))


def _per_channel(name: str, value: float | Sequence[float], channels: int) -> Tensor:
    values = [float(value)] * channels if isinstance(value, int | float) else [float(v) for v in value]
    if len(values) != channels:
        raise ValueError(f"{name} has {len(values)} entries, but latent_channels = {channels}")
    return torch.tensor(values)


def _keep_own_statistics(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
    """Foreign state dicts have no latent_shift and latent_scale: ours stay, and strict loading succeeds."""
    for name in ("latent_shift", "latent_scale"):
        if prefix + name not in state_dict:
            state_dict[prefix + name] = getattr(module, name)  # type: ignore[index]
