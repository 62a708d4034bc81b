from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ldm.nn.resnet import Downsample, ResnetBlock, Upsample

X = torch.randn(2, 8, 6, 4, generator=torch.Generator().manual_seed(0))


def test_zero_init_starts_as_the_identity() -> None:
    emb = torch.ones(2, 5)
    assert torch.equal(ResnetBlock(8, 8, emb_width=5, norm_groups=4, eps=1e-5, zero_init=True)(X, emb), X)
    assert not torch.equal(ResnetBlock(8, 8, emb_width=5, norm_groups=4, eps=1e-5)(X, emb), X)


def test_embedding_is_added_between_the_convolutions() -> None:
    block = ResnetBlock(8, 12, emb_width=5, norm_groups=4, eps=1e-5)
    emb = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    h = block.conv1(F.silu(block.norm1(X))) + block.time_emb_proj(emb).reshape(2, 12, 1, 1)
    expected = block.conv_shortcut(X) + block.conv2(F.silu(block.norm2(h)))
    torch.testing.assert_close(block(X, emb), expected)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_downsample_pads_where_it_should(asymmetric: bool) -> None:
    layer = Downsample(8, asymmetric)
    pad = (0, 1, 0, 1) if asymmetric else (1, 1, 1, 1)
    expected = F.conv2d(F.pad(X, pad), layer.conv.weight, layer.conv.bias, stride=2)
    torch.testing.assert_close(layer(X), expected)
    assert layer(X).shape == (2, 8, 3, 2)


def test_upsample_repeats_pixels() -> None:
    layer = Upsample(8)
    doubled = X.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(layer(X), layer.conv(doubled))
    torch.testing.assert_close(layer(X, (11, 7)), layer.conv(F.interpolate(X, size=(11, 7), mode="nearest")))
