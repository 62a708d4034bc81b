"""Bytes of a picture from a stranger -> RGB pixels, or one reason why not.

Only JPEG, PNG and WebP are tried, whatever the file is called, and the pixel count is checked in the header
before anything is decoded. The EXIF orientation is applied; transparency is put on white.

A JPEG that is much larger than needed is reduced inside its decoder (an inverse DCT of 4, 3, 2 or 1 points
instead of 8), which saves time and loses little: see tests/data/test_image.py.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 50_000_000
MAX_SCANS = 100  # of a JPEG; encoders write about ten
SPACES = ("YCbCr", "Gray", "RGB")  # of JPEGs that are not left to PIL
JPEG_START = b"\xff\xd8\xff"
START_OF_SCAN, APP1 = 0xDA, 0xE1  # markers
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # baseline, extended, progressive, ...
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


class Picture(NamedTuple):
    """RGB pixels of a picture, perhaps reduced while they were decoded.

    The picture covers height * eighths / 8 rows of them and width * eighths / 8 columns: the last row and
    column may lie partly beyond its edge.
    """

    pixels: NDArray[np.uint8]  # [h w 3]
    height: int  # of the whole picture, as shown
    width: int
    eighths: int = 8


def decode(data: bytes, side: int) -> Picture:
    """RGB pixels; a JPEG comes reduced if its shorter side is then still at least `side`.

    Raises `BadImage`.
    """
    picture = _jpeg(data, side) if data.startswith(JPEG_START) else None
    return _any(data) if picture is None else picture


def _any(data: bytes) -> Picture:
    with refusing("not_image"):
        image, orientation = _open(data)
    with refusing("corrupt_image"):
        image.load()
        if orientation in TURNS:
            image = image.transpose(TURNS[orientation])
        image = _rgb(image)
        return Picture(np.array(image), image.height, image.width)


def _jpeg(data: bytes, side: int) -> Picture | None:
    """A JPEG by libjpeg-turbo, straight from the bytes; None where PIL is to decide.

    That is: CMYK, and whatever the library has a complaint about (PIL forgives some of it).
    """
    head = _head(data)
    if (head is None or head.several_scans) and _scans(data) > MAX_SCANS:
        raise BadImage("too_large")
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except Exception:
        return None
    if height * width > MAX_PIXELS:
        raise BadImage("too_large")
    if head is None or space not in SPACES:
        return None
    orientation = 1
    if head.exif:
        with refusing("not_image"):
            orientation = _open(data)[1]
    eighths = 8 if orientation in TURNS else _eighths(min(height, width), side)
    size = (-(-height * eighths // 8), -(-width * eighths // 8))
    try:
        pixels = simplejpeg.decode_jpeg(
            data, min_height=size[0], min_width=size[1], min_factor=1 if eighths == 8 else 2
        )
    except Exception:
        return None
    if orientation in TURNS:
        pixels = np.array(Image.fromarray(pixels).transpose(TURNS[orientation]))
        height, width = pixels.shape[:2]
    return Picture(pixels, height, width, eighths)


class _Head(NamedTuple):
    exif: bool
    several_scans: bool


def _head(data: bytes) -> _Head | None:
    """What the segments of a JPEG before its first scan tell; None if they are not in order."""
    at, exif, progressive, components = 2, False, False, 0
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == START_OF_SCAN:
            return _Head(exif, progressive or data[at + 4] < components)
        if marker == APP1 and data.startswith(b"Exif\0\0", at + 4):
            exif = True
        elif marker in FRAMES:
            progressive, components = marker % 4 == 2, data[at + 9]
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _scans(data: bytes) -> int:
    """How often a scan begins: each costs a pass over all pixels, in a few bytes if its author wishes."""
    values = np.frombuffer(data, np.uint8)
    return int(np.count_nonzero((values[:-1] == 0xFF) & (values[1:] == START_OF_SCAN)))


def _eighths(shorter: int, side: int) -> int:
    """Into how many eighths a JPEG is reduced: the sizes for which the decoder is fast, at least `side`."""
    return next((k for k in (1, 2, 3, 4) if shorter * k >= 8 * max(side, 8)), 8)
