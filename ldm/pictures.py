"""Pictures in and out: float to uint8, contact sheets with captions, PNG files that carry their recipe.

The recipe is the `parameters` text chunk that the field's tools read: the prompt, `Negative prompt: ...`, and
one last line of `Name: value` pairs; a value that holds a comma, a colon or a line break is quoted as JSON.
b batch, H W picture size.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldm.errors import InputError

PAIR = re.compile(
    r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'
)  # the parser the field's tools share
NEGATIVE = "Negative prompt:"
CELL = 144  # pixels: smaller pictures are enlarged to about this, so that captions have room
FONT_SIZE = 14  # pixels
MAX_LINES = 3


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [-1, 1] to uint8, rounded and clamped; truncation would darken by half a level."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(images: Tensor) -> list[Image.Image]:
    """uint8 [b 3 H W] to a list of b RGB pictures."""
    arrays = images.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(a)) for a in arrays]


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size to uint8 [b 3 H W]."""
    return torch.stack([torch.from_numpy(np.array(p.convert("RGB"))).permute(2, 0, 1) for p in pictures])


def open_picture(
    source: str | os.PathLike[str] | Image.Image, height: int, width: int, where: str = "init_image"
) -> Image.Image:
    """An RGB picture of that size: `read_picture`, scaled to cover it and cut at the centre."""
    return ImageOps.fit(read_picture(source, where), (width, height), method=Image.Resampling.LANCZOS)


def read_picture(source: str | os.PathLike[str] | Image.Image, where: str = "init_image") -> Image.Image:
    """An RGB picture: upright, on white if transparent.

    `where` is the option that gave the path, for the InputError of a file that is missing or no picture.
    """
    if isinstance(source, Image.Image):
        picture = ImageOps.exif_transpose(source).convert("RGBA")
    else:
        place = f"{where}={os.fspath(source)}"
        if not Path(source).is_file():
            raise InputError(place, "no such file")
        try:
            with Image.open(source) as file:
                picture = ImageOps.exif_transpose(file).convert("RGBA")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(place, f"not a picture that can be read ({type(error).__name__})") from None
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    return canvas.convert("RGB")


def open_mask(source: str | os.PathLike[str] | Image.Image, height: int, width: int) -> Tensor:
    """bool [1 1 H W], True where the picture is white (or transparent); cut as `open_picture` does."""
    picture = open_picture(source, height, width, where="mask_image").convert("L")
    mask = torch.from_numpy(np.array(picture) > 127)[None, None]
    if not mask.any():
        raise InputError("mask_image", "nothing in it is white", "white is what is drawn anew")
    return mask


def contact_sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str] | None = None, columns: int | None = None
) -> Image.Image:
    """Pictures in rows, each above its caption, wrapped to three lines; about square without `columns`."""
    if not pictures:
        raise ValueError("contact_sheet: 0 pictures")
    captions = captions or [""] * len(pictures)
    if len(captions) != len(pictures):
        raise ValueError(f"contact_sheet: {len(pictures)} pictures but {len(captions)} captions")
    columns = min(columns or math.ceil(math.sqrt(len(pictures))), len(pictures))
    pictures = [_enlarged(p.convert("RGB")) for p in pictures]
    font = ImageFont.load_default(size=FONT_SIZE)
    gap, line_height = 8, FONT_SIZE + 4
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    wrapped = [_wrap(caption, width, font) for caption in captions]
    cell_height = height + max(len(lines) for lines in wrapped) * line_height + gap
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (cell_height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, lines) in enumerate(zip(pictures, wrapped, strict=True)):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (cell_height + gap)
        sheet.paste(picture, (x, y))
        for k, line in enumerate(lines):
            draw.text((x, y + height + 2 + k * line_height), line, fill=(20, 20, 20), font=font)
    return sheet


def xy_sheet(
    pictures: Sequence[Image.Image], columns: Sequence[str], rows: Sequence[str], title: str = ""
) -> Image.Image:
    """Pictures row after row, under the labels of their columns and beside those of their rows."""
    if len(pictures) != len(columns) * len(rows):
        raise ValueError(f"xy_sheet: {len(pictures)} pictures for {len(columns)} x {len(rows)} cells")
    pictures = [_enlarged(p.convert("RGB")) for p in pictures]
    font = ImageFont.load_default(size=FONT_SIZE)
    gap, line_height = 8, FONT_SIZE + 4
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    left = gap + (CELL if any(rows) else 0)
    heading = _wrap(title, len(columns) * (width + gap), font)
    headers, sides = [_wrap(c, width, font) for c in columns], [_wrap(r, CELL - gap, font) for r in rows]
    top = gap + (len(heading) + max(map(len, headers))) * line_height
    size = (left + len(columns) * (width + gap), top + len(rows) * (height + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)

    def write(lines: Sequence[str], x: int, y: int) -> None:
        for k, line in enumerate(lines):
            draw.text((x, y + k * line_height), line, fill=(20, 20, 20), font=font)

    write(heading, left, gap // 2)
    for i, lines in enumerate(headers):
        write(lines, left + i * (width + gap), gap // 2 + len(heading) * line_height)
    for j, lines in enumerate(sides):
        write(lines, gap, top + j * (height + gap))
    for i, picture in enumerate(pictures):
        row, column = divmod(i, len(columns))
        sheet.paste(picture, (left + column * (width + gap), top + row * (height + gap)))
    return sheet


def _enlarged(picture: Image.Image) -> Image.Image:
    """The picture at least CELL wide, by a whole factor and without smoothing: its pixels stay visible."""
    factor = max(1, math.ceil(CELL / picture.width))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _wrap(caption: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """The caption in at most MAX_LINES lines of `width` pixels; what does not fit ends in dots."""
    lines: list[str] = [""]
    for word in caption.split():
        while word:
            joined = f"{lines[-1]} {word}".strip()
            if font.getlength(joined) <= width:
                lines[-1], word = joined, ""
            elif lines[-1]:
                lines.append("")
            else:  # one word wider than the cell is cut
                fits = max(1, sum(font.getlength(word[:k]) <= width for k in range(1, len(word) + 1)))
                lines[-1], word = word[:fits], word[fits:]
                lines.append("")
    lines = [line for line in lines if line]
    if len(lines) > MAX_LINES:
        lines = lines[:MAX_LINES]
        while lines[-1] and font.getlength(lines[-1] + "...") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] = lines[-1].rstrip() + "..."
    return lines


def recipe(prompt: str, negative_prompt: str = "", settings: Mapping[str, object] | None = None) -> str:
    """The text of the `parameters` chunk; `settings` are the pairs of the last line, at least three."""
    settings = dict(settings or {})
    text = _layout(prompt, negative_prompt, settings)
    back = parse_recipe(text)
    if (back["prompt"], back["negative_prompt"]) != (prompt, negative_prompt):  # a layout inside the prompt
        text = _layout(prompt, negative_prompt, {**settings, "Prompt": prompt, "Negative": negative_prompt})
    return text


def _layout(prompt: str, negative_prompt: str, settings: Mapping[str, object]) -> str:
    pairs = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items())
    return "\n".join([prompt, *([f"{NEGATIVE} {negative_prompt}"] if negative_prompt else []), pairs])


def _quoted(value: str) -> str:
    plain = value == value.strip() and not any(c in value for c in ',:"\n\r')
    return value if plain else json.dumps(value, ensure_ascii=False)


def _unquoted(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:
            return value
    return value


def parse_recipe(text: str) -> dict[str, str]:
    """`prompt`, `negative_prompt` and the pairs of the last line, all as text; of other tools, too."""
    *lines, last = text.split("\n")
    pairs = {name: _unquoted(value) for name, value in PAIR.findall(last)}
    if len(pairs) < 3:  # no line of settings
        lines, pairs = [*lines, last], {}
    start = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).removeprefix(NEGATIVE).removeprefix(" ")
    found = {"prompt": "\n".join(lines[:start]), "negative_prompt": negative}
    if "Prompt" in pairs and "Negative" in pairs:
        found = {"prompt": pairs.pop("Prompt"), "negative_prompt": pairs.pop("Negative")}
    return {**found, **pairs}


def save_png(path: str | os.PathLike[str], picture: Image.Image, parameters: str | None = None) -> None:
    """Write a new PNG; `parameters` (default: the one in `picture.info`) becomes its text chunk.

    Raises FileExistsError rather than replace a picture.
    """
    text = picture.info.get("parameters", "") if parameters is None else parameters
    info = PngInfo()
    if text:
        info.add_text("parameters", text)  # tEXt, or iTXt where the text is not Latin-1
    save_new(Path(path), lambda file: picture.save(file, format="PNG", pnginfo=info))


def save_new(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """A new file that others see whole or not at all; raises FileExistsError rather than replace one."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(part, "xb") as file:
            write(file)
        try:
            os.link(part, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with open(part, "rb") as source, open(path, "xb") as target:
                shutil.copyfileobj(source, target)
    finally:
        part.unlink(missing_ok=True)


def save_next(folder: Path, picture: Image.Image, prefix: str = "", start: int = 0) -> Path:
    """Save under the first free number from `start` on: `00000.png`, `00001.png`, ...; never overwrites."""
    folder.mkdir(parents=True, exist_ok=True)
    number = start
    while True:
        path = folder / f"{prefix}{number:05d}.png"
        try:
            save_png(path, picture)
            return path
        except FileExistsError:
            number += 1
