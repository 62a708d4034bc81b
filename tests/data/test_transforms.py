import io

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.image import BadImage, Picture, decode
from ldm.data.transforms import SquareCrop
from ldm.errors import InputError

RAMP = np.arange(12 * 20 * 3, dtype=np.uint8).reshape(12, 20, 3)


def picture(pixels):
    return Picture(np.array(pixels, order="C"), *pixels.shape[:2])


def photo(width, height, seed=0):
    """A picture with the spectrum of a photograph: noise, of half the strength at each half of the scale."""
    rng, pixels, grid = np.random.default_rng(seed), np.full((height, width, 3), 128.0), 4
    while grid <= max(width, height):
        for channel in range(3):
            noise = Image.fromarray(rng.normal(0, 240 / grid, (grid, grid)).astype(np.float32))
            pixels[..., channel] += noise.resize((width, height), Image.Resampling.BICUBIC)
        grid *= 2
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(("size", "expected"), [(12, (12, 20)), (6, (6, 10)), (24, (24, 40)), (7, (7, 12))])
def test_resize_makes_the_shorter_side_exact(size, expected):
    assert SquareCrop(size).resize(picture(RAMP)).shape[:2] == expected
    assert SquareCrop(size).resize(picture(np.rot90(RAMP))).shape[:2] == expected[::-1]


def test_a_picture_of_the_right_size_is_untouched():
    assert (SquareCrop(12).resize(picture(RAMP)) == RAMP).all()


def test_resize_is_antialiased():
    board = np.repeat((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None], 3, 2)
    assert np.abs(SquareCrop(8).resize(picture(board)).astype(int) - 127).max() <= 2


@pytest.mark.parametrize("size", [(300, 200), (131, 97), (64, 64), (40, 33), (20, 500)])
def test_resize_is_that_of_pil(size):
    image = photo(*size)
    out = SquareCrop(64).resize(picture(np.asarray(image)))
    expected = np.asarray(image.resize(out.shape[1::-1], Image.Resampling.BICUBIC))
    assert np.abs(out.astype(int) - expected).max() <= 2
    assert np.abs(out.astype(float) - expected).mean() < 0.05


@pytest.mark.parametrize("size", [(515, 389), (386, 514), (345, 700), (1000, 257), (277, 263), (1201, 1007)])
@pytest.mark.parametrize("side", [64, 96, 128])
def test_a_reduced_jpeg_is_nearly_the_whole_one_resized(size, side):
    """Against a full decode and PIL's resize: 44 dB, and 1 of 255 levels on average."""
    file = io.BytesIO()
    photo(*size, seed=side).save(file, "JPEG", quality=90)
    small = decode(file.getvalue(), side)
    assert small.eighths < 8
    out = SquareCrop(side).resize(small)
    expected = np.asarray(Image.open(file).resize(out.shape[1::-1], Image.Resampling.BICUBIC))
    assert min(out.shape[:2]) == side
    error = out.astype(float) - expected
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 44
    assert np.abs(error).mean() < 1
    halves = np.array_split(error, 2, 0) + np.array_split(error, 2, 1)  # no shift: no side is brighter
    assert max(abs(half.mean()) for half in halves) < 0.2


def test_a_reduced_jpeg_is_not_shifted():
    """An edge stays at its place, though 128 columns of an eighth cover more than 1023 of the picture."""
    pixels = np.zeros((520, 1023, 3), np.uint8)
    pixels[:, 512:] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    small = decode(file.getvalue(), 65)
    assert small.eighths == 1
    out = SquareCrop(65).resize(small)
    width = out.shape[1]
    bright = out[..., 0].astype(float).sum(1) / 255  # pixels of each row beyond the edge
    assert np.abs(bright - width * (1023 - 512) / 1023).max() < 0.1


def test_threads_change_nothing():
    image = picture(np.asarray(photo(400, 300)))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append(SquareCrop(64).resize(image))
    finally:
        torch.set_num_threads(threads)
    assert (results[0] == results[1]).all()


def test_a_very_long_strip_is_refused():
    with pytest.raises(BadImage, match="too_large"):
        SquareCrop(512).resize(picture(np.zeros((1, 20_000, 3), np.uint8)))


def test_center_crop():
    pixels = RAMP
    transform = SquareCrop(12)
    places, mirror = transform.draws(np.arange(3))
    assert not mirror.any()
    square, corner = transform.cut(pixels, places[0], False)
    assert corner == (0, 4)
    assert (square == pixels[:, 4:16].transpose(2, 0, 1)).all()
    assert SquareCrop(11).cut(pixels, places[0], False)[1] == (1, 5)


def test_mirrored_crop_counts_from_the_mirrored_edge():
    pixels = RAMP
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
    corners = {transform.cut(RAMP, place, False)[1] for place in places}
    assert corners == {(top, left) for top in range(3) for left in range(11)}


def test_flip_probability_ends():
    n = np.arange(200)
    assert SquareCrop(8, flip=1.0).draws(n)[1].all()
    assert not SquareCrop(8, flip=0.0).draws(n)[1].any()
    assert SquareCrop(8, "random", 0.5).draws(n[:0])[0].shape == (0, 2)


def test_pixels_become_a_tensor_without_strides():
    square, _ = SquareCrop(12).cut(RAMP, np.array([0.5, 0.5]), True)
    assert torch.from_numpy(np.ascontiguousarray(square)).shape == (3, 12, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"crop": "centre"}, "data.crop"), ({"flip": 1.5}, "data.flip"), ({"size": 0}, "data.image_size")],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(InputError, match=message):
        SquareCrop(**{"size": 8} | options)
