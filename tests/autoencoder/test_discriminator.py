"""The discriminator's shape and reach, and its losses against their formulas."""

from __future__ import annotations

import pytest
import torch

from ldm.autoencoder.discriminator import (
    PatchDiscriminator,
    hinge_discriminator,
    hinge_generator,
    softplus_discriminator,
    softplus_generator,
)
from ldm.nn import norm


@pytest.mark.parametrize(("layers", "logits", "patch"), [(1, 62, 16), (2, 30, 34), (3, 14, 70)])
def test_each_logit_judges_a_patch(layers: int, logits: int, patch: int) -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator(width=8, layers=layers, norm_groups=4).double()
    for layer in judge.layers:
        if isinstance(layer, torch.nn.GroupNorm):
            layer.forward = lambda x: x  # it looks at the whole picture: without it only convolutions do
    images = torch.randn(1, 3, 128, 128, dtype=torch.float64, requires_grad=True)
    out = judge(images)
    assert out.shape == (1, 1, logits, logits)
    out[0, 0, logits // 2, logits // 2].backward()
    seen = images.grad[0].abs().sum(0) > 0
    assert (int(seen.any(0).sum()), int(seen.any(1).sum())) == (patch, patch)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of Triton's interpreter
def test_its_norms_use_the_kernel(monkeypatch) -> None:
    kernels = pytest.importorskip("ldm.nn.kernels.group_norm")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    judge = PatchDiscriminator(width=8, layers=1, norm_groups=4).to(device, memory_format=torch.channels_last)
    images = torch.randn(2, 3, 16, 16, device=device).contiguous(memory_format=torch.channels_last)
    expected, used, original = judge(images), [], kernels.group_norm
    monkeypatch.setattr(norm, "_fused", True)
    monkeypatch.setattr(kernels, "group_norm", lambda *a: used.append(a) or original(*a))
    torch.testing.assert_close(judge(images), expected)
    assert len(used) == 1


def test_sizes_and_start_are_those_of_pix2pix() -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator()
    convolutions = [layer for layer in judge.layers if isinstance(layer, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.stride[0], c.bias is not None) for c in convolutions] == [
        (3, 64, 2, True), (64, 128, 2, False), (128, 256, 2, False), (256, 512, 1, False), (512, 1, 1, True)
    ]  # fmt: skip
    for convolution in convolutions:
        assert float(convolution.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert convolution.bias is None or not convolution.bias.any()
    deep = [layer for layer in PatchDiscriminator(layers=6).layers if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in deep] == [64, 128, 256, 512, 512, 512, 512, 1]


def test_rows_of_a_batch_are_independent() -> None:
    torch.manual_seed(0)
    judge = PatchDiscriminator(width=8, layers=2, norm_groups=4).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(judge(images)[1:2], judge(images[1:2]), rtol=1e-9, atol=1e-12)


def test_losses_by_hand() -> None:
    real = torch.tensor([[2.0, 0.5], [-1.0, 0.0]]).reshape(2, 1, 1, 2)
    fake = torch.tensor([[-3.0, 0.0], [1.0, -0.5]]).reshape(2, 1, 1, 2)
    # (relu(1 - r) + relu(1 + f)) / 2, each a mean over two patches
    assert hinge_discriminator(real, fake).tolist() == [(0.25 + 0.5) / 2, (1.5 + 1.25) / 2]
    assert hinge_generator(fake).tolist() == [1.5, -0.25]

    bce = torch.nn.functional.binary_cross_entropy_with_logits
    for i in range(2):
        ones = torch.ones_like(real[i])
        both = 0.5 * (bce(real[i], ones) + bce(fake[i], 0 * ones))
        torch.testing.assert_close(softplus_discriminator(real, fake)[i], both)
        torch.testing.assert_close(softplus_generator(fake)[i], bce(fake[i], ones))
    assert hinge_generator(fake.bfloat16()).dtype == torch.float32


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="48.*32"):
        PatchDiscriminator(width=24)
