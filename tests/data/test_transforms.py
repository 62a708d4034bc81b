import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.image import BadImage
from ldm.data.transforms import SquareCrop
from ldm.errors import InputError

RAMP = Image.fromarray(np.arange(12 * 20 * 3, dtype=np.uint8).reshape(12, 20, 3))


@pytest.mark.parametrize(("size", "expected"), [(12, (12, 20)), (6, (6, 10)), (24, (24, 40)), (7, (7, 12))])
def test_resize_makes_the_shorter_side_exact(size, expected):
    assert SquareCrop(size).resize(RAMP).shape[:2] == expected
    tall = RAMP.transpose(Image.Transpose.ROTATE_90)
    assert SquareCrop(size).resize(tall).shape[:2] == expected[::-1]


def test_a_picture_of_the_right_size_is_untouched():
    assert (SquareCrop(12).resize(RAMP) == np.asarray(RAMP)).all()


def test_resize_is_antialiased():
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    assert np.abs(SquareCrop(8).resize(board).astype(int) - 127).max() <= 2


def test_a_very_long_strip_is_refused():
    with pytest.raises(BadImage, match="too_large"):
        SquareCrop(512).resize(Image.new("RGB", (20_000, 1)))


def test_center_crop():
    pixels = np.asarray(RAMP)
    transform = SquareCrop(12)
    places, mirror = transform.draws(np.arange(3))
    assert not mirror.any()
    square, corner = transform.cut(pixels, places[0], False)
    assert corner == (0, 4)
    assert (square == pixels[:, 4:16].transpose(2, 0, 1)).all()
    assert SquareCrop(11).cut(pixels, places[0], False)[1] == (1, 5)


def test_mirrored_crop_counts_from_the_mirrored_edge():
    pixels = np.asarray(RAMP)
    square, (top, left) = SquareCrop(8).cut(pixels, np.array([0.0, 0.3]), True)
    assert (top, left) == (0, 3)
    assert (square == pixels[:, ::-1][:8, 3:11].transpose(2, 0, 1)).all()


def test_draws_depend_on_seed_and_n_alone():
    transform = SquareCrop(8, "random", 0.5, seed=3)
    n = np.arange(1000)
    places, mirror = transform.draws(n)
    some, flips = transform.draws(n[[7, 500]])
    assert (some == places[[7, 500]]).all()
    assert (flips == mirror[[7, 500]]).all()
    assert (SquareCrop(8, "random", 0.5, seed=4).draws(n)[0] != places).any()
    assert 430 < mirror.sum() < 570
    assert places.min() >= 0
    assert places.max() < 1
    assert np.abs(places.mean(0) - 0.5).max() < 0.05
    assert np.abs(np.corrcoef(places[:, 0], mirror)[0, 1]) < 0.1


def test_random_crops_reach_every_corner():
    transform = SquareCrop(10, "random")
    places, _ = transform.draws(np.arange(400))
    corners = {transform.cut(np.asarray(RAMP), place, False)[1] for place in places}
    assert corners == {(top, left) for top in range(3) for left in range(11)}


def test_flip_probability_ends():
    n = np.arange(200)
    assert SquareCrop(8, flip=1.0).draws(n)[1].all()
    assert not SquareCrop(8, flip=0.0).draws(n)[1].any()
    assert SquareCrop(8, "random", 0.5).draws(n[:0])[0].shape == (0, 2)


def test_pixels_become_a_tensor_without_strides():
    square, _ = SquareCrop(12).cut(np.asarray(RAMP), np.array([0.5, 0.5]), True)
    assert torch.from_numpy(np.ascontiguousarray(square)).shape == (3, 12, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"crop": "centre"}, "data.crop"), ({"flip": 1.5}, "data.flip"), ({"size": 0}, "data.image_size")],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(InputError, match=message):
        SquareCrop(**{"size": 8} | options)
