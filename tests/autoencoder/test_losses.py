"""Each term of the reconstruction loss against its formula, written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm.autoencoder.kl import kl
from ldm.autoencoder.losses import FLAT, ReconstructionLoss, edge_strength

B, H, W = 3, 4, 5
VALUES = 3 * H * W
NONE = {"l1": 0.0, "l2": 0.0, "gradient": 0.0, "kl": 0.0}


def example() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, 3, H, W), (B, 3, H, W), (B, 8, 2, 3)]
    output, target, moments = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return output, target, moments


def given() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What the loss takes."""
    output, target, moments = example()
    return output, target, {"kl": kl(moments)}


def by_hand(name: str, i: int) -> Tensor:
    output, target, moments = (x[i] for x in example())
    e = output - target
    if name == "l1":
        return e.abs().sum() / VALUES
    if name == "l2":
        return (e * e).sum() / VALUES
    if name == "gradient":
        dx = sum((e[:, y, x + 1] - e[:, y, x]).square().sum() for y in range(H) for x in range(W - 1))
        dy = sum((e[:, y + 1, x] - e[:, y, x]).square().sum() for y in range(H - 1) for x in range(W))
        return dx / (3 * H * (W - 1)) + dy / (3 * (H - 1) * W)
    mean, log_variance = moments[:4], moments[4:]
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum() / VALUES


@pytest.mark.parametrize("name", ["l1", "l2", "gradient", "kl"])
def test_each_term(name: str) -> None:
    loss, logged = ReconstructionLoss(**{**NONE, name: 0.5})(*given())
    expected = torch.stack([by_hand(name, i) for i in range(B)])
    torch.testing.assert_close(loss, 0.5 * expected, rtol=1e-12, atol=1e-12)
    per_image = VALUES if name == "kl" else 1
    torch.testing.assert_close(logged[name], per_image * expected.mean(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logged["loss"], loss.mean())


def test_terms_add_up() -> None:
    weights = {"l1": 1.0, "l2": 2.0, "gradient": 3.0, "kl": 4.0}
    loss, logged = ReconstructionLoss(**weights)(*given())
    expected = torch.stack(
        [sum(weight * by_hand(name, i) for name, weight in weights.items()) for i in range(B)]
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert logged.keys() == {*weights, "loss"}
    assert all(value.ndim == 0 and not value.requires_grad for value in logged.values())


def distance(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum(dim=(1, 2, 3))


def test_perceptual_term() -> None:
    output, target, terms = given()
    module = ReconstructionLoss(**NONE, perceptual_weight=0.25)
    loss, logged = module(output, target, terms, distance)
    torch.testing.assert_close(loss, 0.25 * distance(output, target))
    torch.testing.assert_close(logged["perceptual"], distance(output, target).mean())
    assert module.state_dict() == {}


def test_codebook_term_is_added_as_it_is_and_other_terms_are_only_logged() -> None:
    output, target, _ = given()
    terms = {"codebook": torch.arange(3.0), "usage": torch.full((3,), 0.5)}
    loss, logged = ReconstructionLoss(**NONE)(output, target, terms)
    torch.testing.assert_close(loss, torch.arange(3.0).double())
    assert (float(logged["codebook"]), float(logged["usage"])) == (1.0, 0.5)
    assert float(ReconstructionLoss(**NONE, codebook=3.0)(output, target, terms)[0][2]) == 6.0


def test_the_part_that_compares_images_stands_alone() -> None:
    output, target, terms = given()
    loss = ReconstructionLoss(l2=2.0, kl=4.0)
    nll, logged = loss.nll(output, target, distance)
    whole, _ = loss(output, target, terms, distance)
    torch.testing.assert_close(whole - nll, 4.0 * terms["kl"] / VALUES)
    assert logged.keys() == {"l1", "l2", "perceptual"}


def test_learnt_log_variance() -> None:
    """nll = R / exp(s) + s, whose minimum over s is at s = log of the mean of R."""
    output, target, terms = given()
    plain = ReconstructionLoss(kl=4.0)
    loss = ReconstructionLoss(kl=4.0, learn_log_variance=True, log_variance=0.5).double()
    rest = plain.nll(output, target, distance)[0]
    expected = rest / math.exp(0.5) + 0.5 + 4.0 * terms["kl"] / VALUES
    found, logged = loss(output, target, terms, distance)
    torch.testing.assert_close(found, expected)
    assert float(logged["log_variance"]) == 0.5
    assert list(loss.state_dict()) == ["log_variance"]
    found.mean().backward()
    torch.testing.assert_close(loss.log_variance.grad, 1 - rest.mean() / math.exp(0.5))
    assert list(plain.parameters()) == []


def test_edges_ask_for_sharpness_wherever_the_edge_is() -> None:
    step = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    step[..., 5:] = 1.0
    moved, blurred = step.roll(1, dims=3), step.clone()
    moved[..., 0] = 0.0
    blurred[..., 4:7] = torch.tensor([0.25, 0.5, 0.75])
    strength = edge_strength(step)
    assert strength.shape == (1, 3, 2, 2)
    torch.testing.assert_close(strength[0, 0, :, 1], torch.full((2,), (1 / 4 + FLAT) ** 0.5).double())
    torch.testing.assert_close(strength[0, 0, :, 0], torch.full((2,), FLAT**0.5).double())
    loss = ReconstructionLoss(**{**NONE, "edges": 2.0})
    expected = 2.0 * (strength - edge_strength(blurred)).abs().mean()
    torch.testing.assert_close(loss(blurred, step, {})[0], expected[None])
    assert loss(moved, step, {})[0] == pytest.approx(0.0, abs=1e-12)


def test_low_precision_is_summed_in_float32() -> None:
    output, target, moments = (x.bfloat16() for x in example())
    module = ReconstructionLoss(l2=1.0, gradient=1.0)
    loss, _ = module(output, target, {"kl": kl(moments)})
    exact, _ = module(output.double(), target.double(), {"kl": kl(moments.double())})
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


def test_gradients_flow() -> None:
    output, target, moments = example()
    output.requires_grad_()
    moments.requires_grad_()
    ReconstructionLoss(gradient=1.0)(output, target, {"kl": kl(moments)})[0].sum().backward()
    assert output.grad.abs().min() > 0
    assert moments.grad.abs().max() > 0


def test_shapes_that_do_not_fit_are_refused() -> None:
    output, target, terms = given()
    with pytest.raises(ValueError, match=r"\[3, 3, 4, 5\].*\[1, 3, 4, 5\]"):
        ReconstructionLoss()(output, target[:1], terms)
