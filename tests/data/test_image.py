import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from ldm.data import image as module
from ldm.data.image import BadImage, decode, header_size


def encoded(image, extension="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, extension, **options)
    return buffer.getvalue()


def colour(data):
    return decode(data, 8).pixels[0, 0].tolist()


def photo(width, height, seed=0):
    """A picture with the spectrum of a photograph: noise, of half the strength at each half of the scale."""
    rng, pixels, grid = np.random.default_rng(seed), np.full((height, width, 3), 128.0), 4
    while grid <= max(width, height):
        for channel in range(3):
            noise = Image.fromarray(rng.normal(0, 240 / grid, (grid, grid)).astype(np.float32))
            pixels[..., channel] += noise.resize((width, height), Image.Resampling.BICUBIC)
        grid *= 2
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def mean_error(a, b):
    assert a.shape == b.shape
    return np.abs(a.astype(float) - b).mean()


@pytest.mark.parametrize("extension", ["JPEG", "PNG", "WEBP"])
def test_sizes_without_and_with_decoding(extension):
    data = encoded(Image.new("RGB", (40, 30)), extension)
    assert header_size(data) == (40, 30)
    picture = decode(data, 30)
    assert picture.pixels.shape == (30, 40, 3)
    assert picture[1:] == (30, 40, 8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), [255, 255, 255]),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 255)), [0, 0, 0]),
        (Image.new("LA", (4, 4), (0, 0)), [255, 255, 255]),
        (Image.new("L", (4, 4), 77), [77, 77, 77]),
        (Image.new("1", (4, 4), 1), [255, 255, 255]),
        (Image.fromarray(np.full((4, 4), 257 * 99, np.uint16)), [99, 99, 99]),
        (Image.new("RGB", (4, 4), (1, 2, 3)).quantize(2), [1, 2, 3]),
    ],
)
def test_modes_become_rgb_on_white(image, expected):
    assert colour(encoded(image)) == expected


def test_palette_with_transparency():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert colour(encoded(image, transparency=1)) == [255, 255, 255]
    assert colour(encoded(image, transparency=b"\xff\xff")) == [10, 20, 30]


def test_cmyk_jpeg():
    assert colour(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")) == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    from PIL import ImageOps

    image = Image.fromarray((np.arange(6 * 4 * 3).reshape(4, 6, 3) * 3).astype(np.uint8))
    exif = Image.Exif()
    exif[module.ORIENTATION] = orientation
    data = encoded(image, "WEBP", lossless=True, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert header_size(data) == expected.size
    assert (decode(data, 4).pixels == np.asarray(expected)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_a_jpeg(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[module.ORIENTATION] = orientation
    data = encoded(photo(48, 33), "JPEG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    picture = decode(data, 33)
    assert (picture.width, picture.height) == header_size(data) == expected.size
    assert mean_error(picture.pixels, np.asarray(expected)) < 0.1
    assert decode(data, 8).eighths == (8 if orientation > 1 else 2)


@pytest.mark.parametrize(
    ("side", "eighths", "shape"),
    [
        (1200, 8, (1200, 1600)),
        (601, 8, (1200, 1600)),
        (600, 4, (600, 800)),
        (450, 3, (450, 600)),
        (300, 2, (300, 400)),
        (150, 1, (150, 200)),
        (1, 1, (150, 200)),
    ],
)
def test_a_large_jpeg_comes_reduced_but_large_enough(side, eighths, shape):
    picture = decode(encoded(Image.new("RGB", (1600, 1200)), "JPEG"), side)
    assert picture.pixels.shape[:2] == shape
    assert picture[1:] == (1200, 1600, eighths)


@pytest.mark.parametrize("width", range(57, 66))
def test_reduced_sizes_are_rounded_up(width):
    data = encoded(photo(width, 40), "JPEG")
    for side in range(1, 41):
        picture = decode(data, side)
        expected = -(-40 * picture.eighths // 8), -(-width * picture.eighths // 8)
        assert picture.pixels.shape[:2] == expected


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_whole_jpeg_is_what_pil_decodes(subsampling, progressive):
    data = encoded(photo(75, 50), "JPEG", subsampling=subsampling, progressive=progressive)
    picture = decode(data, 50)
    assert mean_error(picture.pixels, np.asarray(Image.open(io.BytesIO(data)))) < 0.05


def test_grey_and_rgb_jpegs():
    grey = photo(64, 64).convert("L")
    data = encoded(grey, "JPEG", quality=95)
    assert mean_error(decode(data, 64).pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))) < 0.05
    assert decode(data, 8).pixels.shape == (8, 8, 3)
    data = encoded(photo(64, 64), "JPEG", keep_rgb=True)
    assert mean_error(decode(data, 64).pixels, np.asarray(Image.open(io.BytesIO(data)))) < 0.05


def test_what_the_fast_decoder_complains_about_is_left_to_pil():
    data = encoded(photo(64, 64), "JPEG")
    spoiled = data[:-2] + b"some words" + data[-2:]  # between the last row and the end marker
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(spoiled)
    assert (decode(spoiled, 64).pixels == np.asarray(Image.open(io.BytesIO(spoiled)))).all()


def test_many_scans_are_refused():
    """A scan of a few bytes costs a pass over all pixels."""
    data = encoded(photo(64, 64), "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    bomb = data[:scan] + data[scan:-2] * module.MAX_SCANS + data[-2:]
    with pytest.raises(BadImage, match="too_large"):
        decode(bomb, 8)
    unordered = data[:2] + b"\xff" + data[2:scan] + data[scan:-2] * module.MAX_SCANS  # a fill byte
    with pytest.raises(BadImage, match="too_large"):
        decode(unordered, 8)


def test_bytes_after_the_start_of_a_jpeg_that_are_anything():
    """Whatever they are: pixels or a reason, nothing else."""
    data, rng = bytearray(encoded(photo(48, 48), "JPEG", progressive=True)), np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        spoiled = bytearray(data)
        for at in rng.integers(2, len(data), 3):
            spoiled[at] = rng.integers(256)
        try:
            outcomes.add(decode(bytes(spoiled), 8).pixels.shape[2])
        except BadImage as error:
            outcomes.add(str(error))
    assert {3, "not_image"} < outcomes <= {3, "not_image", "corrupt_image", "too_large"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not_image"),
        (b"<html>404</html>", "not_image"),
        (encoded(Image.new("RGB", (8, 8)), "GIF"), "not_image"),
        (encoded(Image.new("RGB", (8, 8)), "TIFF"), "not_image"),
        (encoded(Image.effect_noise((64, 64), 50), "PNG")[:-900], "corrupt_image"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:-900], "corrupt_image"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:200], "not_image"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:4], "not_image"),
        (encoded(Image.new("L", (8000, 8000)), "JPEG"), "too_large"),
        (encoded(Image.new("L", (8000, 8000))), "too_large"),
        (encoded(Image.new("1", (20000, 20000))), "too_large"),  # PIL's own limit comes first
    ],
)
def test_bad_images_have_a_reason(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode(data, 8)
    if reason != "corrupt_image":  # that needs decoding
        with pytest.raises(BadImage, match=reason):
            header_size(data)
