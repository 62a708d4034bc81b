"""The VQ autoencoder and its codebook against diffusers' VQModel: same names, numbers and gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from ldm.autoencoder.vq import AutoencoderVQ, EMAVectorQuantizer, VectorQuantizer
from ldm.config import CONFIG_DIR, build, from_yaml

diffusers = pytest.importorskip("diffusers")
SIZES = {"block_out_channels": (16, 32, 32), "layers_per_block": 1}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


def blocks(levels: str) -> dict[str, tuple[str, ...]]:
    """`levels`: one letter a level, x with attention, o without."""
    down = {"x": "AttnDownEncoderBlock2D", "o": "DownEncoderBlock2D"}
    up = {"x": "AttnUpDecoderBlock2D", "o": "UpDecoderBlock2D"}
    return {
        "down_block_types": tuple(down[x] for x in levels),
        "up_block_types": tuple(up[x] for x in levels[::-1]),
    }


def peer() -> torch.nn.Module:
    """Weights drawn anew, codes near the latents; beta on the term that the paper gives it to."""
    theirs = diffusers.VQModel(**SIZES, **blocks("oox"), norm_num_groups=8, num_vq_embeddings=24).double()
    with torch.no_grad():
        for i, parameter in enumerate(theirs.parameters()):
            parameter.copy_(0.05 * normal(*parameter.shape, seed=i))
        std, mean = torch.std_mean(theirs.encode(normal(2, 3, 16, 16, seed=1)).latents, (0, 2, 3))
        theirs.quantize.embedding.weight.copy_(mean + std * normal(24, 3, seed=5))
    theirs.quantize.legacy = False
    return theirs


@pytest.mark.parametrize("quantizer", [VectorQuantizer, EMAVectorQuantizer])
def test_forward_decode_and_gradients(quantizer: type[VectorQuantizer]) -> None:
    theirs = peer()
    ours = AutoencoderVQ(
        partial(quantizer, num_codes=24), **SIZES, norm_groups=8, attention_levels=(False, False, True)
    ).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    if quantizer is EMAVectorQuantizer:  # a fixed codebook: only the networks' gradients compare
        theirs.quantize.embedding.requires_grad_(False)
        ours.eval()
    images, twin = (normal(2, 3, 16, 16, seed=1).requires_grad_() for _ in range(2))
    z = theirs.encode(twin).latents
    expected, loss, (_, _, indices) = theirs.quantize(z)
    assert indices.unique().numel() > 3
    assert relative(ours.moments(images), z) <= 1e-9
    assert torch.equal(ours.quantize.indices(ours.moments(images)).flatten(), indices)
    assert relative(ours.quantize(z)[0], expected) <= 1e-9

    out, terms = ours(images)
    decoded = theirs.decode(z).sample
    assert relative(out, decoded) <= 1e-9
    assert relative(ours.decode(ours.encode(images)), decoded) <= 1e-6  # shift and scale are float32
    if quantizer is EMAVectorQuantizer:
        loss = loss - (expected - z).detach().square().mean()
    torch.testing.assert_close(terms["codebook"].mean(), loss)

    (out.square().sum() + 100 * terms["codebook"].mean()).backward()
    (decoded.square().sum() + 100 * loss).backward()
    assert relative(images.grad, twin.grad) <= 1e-6
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert gradients.keys() == {name for name, p in ours.named_parameters() if p.requires_grad}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad and not name.endswith("to_k.bias"):  # the softmax takes that one out
            assert relative(parameter.grad, gradients[name]) <= 1e-6, name


@pytest.mark.parametrize(
    ("name", "levels", "widths"), [("vq_f4", "ooo", (128, 256, 512)), ("vq_f8", "ooox", (128, 256, 256, 512))]
)
def test_full_size_names_and_shapes(name: str, levels: str, widths: tuple[int, ...]) -> None:
    with torch.device("meta"):
        ours = build(from_yaml((CONFIG_DIR / f"autoencoder/{name}.yaml").read_text()))
        theirs = diffusers.VQModel(
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=ours.latent_channels,
            num_vq_embeddings=ours.quantize.num_codes,
            **blocks(levels),
        )
    extra = ("latent_", "quantize.counts", "quantize.sums", "quantize.updates")
    names = {key: value.shape for key, value in ours.state_dict().items() if not key.startswith(extra)}
    assert names == {key: value.shape for key, value in theirs.state_dict().items()}
