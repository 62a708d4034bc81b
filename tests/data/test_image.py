import io

import numpy as np
import pytest
from PIL import Image

from ldm.data import image as module
from ldm.data.image import BadImage, decode, header_size


def encoded(image, extension="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, extension, **options)
    return buffer.getvalue()


def colour(data):
    return np.asarray(decode(data, 8))[0, 0].tolist()


@pytest.mark.parametrize("extension", ["JPEG", "PNG", "WEBP"])
def test_sizes_without_and_with_decoding(extension):
    data = encoded(Image.new("RGB", (40, 30)), extension)
    assert header_size(data) == (40, 30)
    assert decode(data, 30).size == (40, 30)


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
    assert (np.asarray(decode(data, 4)) == np.asarray(expected)).all()


def test_a_large_jpeg_comes_reduced_but_large_enough():
    data = encoded(Image.new("RGB", (1600, 1200)), "JPEG")
    assert decode(data, 100).size == (400, 300)
    assert decode(data, 1200).size == (1600, 1200)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not_image"),
        (b"<html>404</html>", "not_image"),
        (encoded(Image.new("RGB", (8, 8)), "GIF"), "not_image"),
        (encoded(Image.new("RGB", (8, 8)), "TIFF"), "not_image"),
        (encoded(Image.effect_noise((64, 64), 50), "PNG")[:-900], "corrupt_image"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:-900], "corrupt_image"),
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
