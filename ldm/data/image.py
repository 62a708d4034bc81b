"""Bytes of a picture from a stranger -> RGB pixels, or one reason why not.

Only JPEG, PNG and WebP are tried, whatever the file is called, and the pixel count is checked in the header
before anything is decoded. The EXIF orientation is applied; transparency is put on white.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """A picture that cannot be used; the message is the reason code: not_image, corrupt_image, too_large."""


@contextmanager
def refusing(reason: str) -> Iterator[None]:
    """Any failure of PIL inside becomes `BadImage(reason)`; its parsers raise nearly every exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except BadImage:
            raise
        except Image.DecompressionBombError as error:
            raise BadImage("too_large") from error
        except Exception as error:
            raise BadImage(reason) from error


def _open(data: bytes) -> tuple[Image.Image, int]:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("too_large")
    orientation = image.getexif().get(ORIENTATION, 1) if image.info.get("exif") else 1
    return image, orientation


def header_size(data: bytes) -> tuple[int, int]:
    """Width and height as shown, from the first bytes of a picture, nothing decoded.

    `data` may be cut after the header; raises `BadImage("not_image")` if it was cut too early.
    """
    with refusing("not_image"):
        image, orientation = _open(data)
        return (image.height, image.width) if orientation >= 5 else (image.width, image.height)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: PIL would clip them to 8
        grey = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def decode(data: bytes, side: int) -> Image.Image:
    """The whole picture as RGB; a JPEG much larger than `side` may come reduced, to 2 * side or more.

    Raises `BadImage`.
    """
    with refusing("not_image"):
        image, orientation = _open(data)
    with refusing("corrupt_image"):
        image.draft(
            "RGB", (2 * side, 2 * side)
        )  # the JPEG decoder then skips detail that a resize would drop
        image.load()
        if orientation in TURNS:
            image = image.transpose(TURNS[orientation])
        return _rgb(image)
