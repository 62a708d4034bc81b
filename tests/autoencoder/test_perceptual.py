"""LPIPS against torchmetrics with equal random weights, and the distance of any features by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ldm.autoencoder.perceptual import LPIPS, FeatureDistance


def images(seed: int, size: int = 32) -> Tensor:
    return 2 * torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) - 1


@pytest.fixture(scope="module")
def peer():
    """torchmetrics' LPIPS: random VGG16, the published weights of the channels."""
    module = pytest.importorskip("torchmetrics.functional.image.lpips")
    torch.manual_seed(0)
    theirs = module._LPIPS(pretrained=True, net="vgg", pnet_rand=True)
    for parameter in theirs.net.parameters():
        nn.init.normal_(parameter, std=0.05)
    return theirs


def test_lpips_against_torchmetrics(peer) -> None:
    ours = LPIPS()
    ours.load_weights(peer.state_dict())
    output, twin, target = images(0).requires_grad_(), images(0).requires_grad_(), images(1)
    distance, expected = ours(output, target), peer(twin, target).flatten()
    assert expected.min() > 0.01
    torch.testing.assert_close(distance, expected, rtol=1e-5, atol=0)
    assert ours(target, target).tolist() == [0.0, 0.0]
    distance.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(output.grad, twin.grad, rtol=1e-3, atol=1e-6)


def test_names_of_torchvision_and_of_lpips_are_known(peer) -> None:
    import re

    reference, ours = LPIPS(), LPIPS()
    reference.load_weights(peer.state_dict())
    mixed = {re.sub(r"net\.slice\d", "features", name): value for name, value in peer.state_dict().items()}
    assert "features.0.weight" in mixed
    assert "lin0.model.1.weight" in mixed
    ours.load_weights(mixed | {"classifier.0.weight": torch.zeros(1)})
    for name, value in reference.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name])
    del mixed["features.28.bias"]
    with pytest.raises(ValueError, match=r"no tensor network\.28\.bias"):
        ours.load_weights(mixed)
    with pytest.raises(ValueError, match=r"network\.28\.bias has shape \[3\].*\[512\]"):
        ours.load_weights(mixed | {"features.28.bias": torch.zeros(3)})


def test_names_are_those_of_torchvisions_vgg16() -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        theirs = torchvision.models.vgg16(weights=None).features.state_dict()
        ours = LPIPS().network.state_dict()
    assert {name: value.shape for name, value in ours.items()} == {n: v.shape for n, v in theirs.items()}


def test_distance_by_hand() -> None:
    """Layers 1x1: sum over layers of the mean over places of |a/|a| - b/|b||^2 = 2 - 2 cos(a, b)."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(5, 4, 1)).double()
    distance = FeatureDistance(network, ["0", "3"], [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]).double()
    output, target = images(0, 8).double().requires_grad_(), images(1, 8).double().requires_grad_()
    expected = torch.zeros(2, dtype=torch.float64)
    for depth in (1, 4):
        maps = []
        for x in (output, target):
            x = (x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 1, 2]).view(3, 1, 1)
            maps.append(network[:depth](x))
        expected += (2 - 2 * torch.cosine_similarity(*maps, dim=1)).mean((1, 2)).detach()
    found = distance(output, target)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    found.sum().backward()
    assert output.grad.abs().max() > 0
    assert target.grad is None
    assert distance._maps == []
    with torch.autocast("cpu", torch.bfloat16):
        low = distance.float()(output.detach().float(), target.detach().float())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), expected, rtol=0.05, atol=0)


def test_features_of_length_zero_have_a_slope() -> None:
    distance = FeatureDistance(nn.Sequential(nn.ReLU()), ["0"], [0.0] * 3, [1.0] * 3)
    output = torch.full((1, 3, 2, 2), -1.0, requires_grad=True)
    distance(output, output.detach()).sum().backward()
    assert output.grad.isfinite().all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    distance = FeatureDistance(nn.Sequential(nn.ReLU()), ["0"], [0.0] * 3, [1.0] * 3)
    with pytest.raises(ValueError, match=r"\[2, 3, 8, 8\].*\[2, 3, 4, 4\]"):
        distance(images(0, 8), images(0, 4))
