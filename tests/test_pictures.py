"""Pictures round to uint8, sheets show every picture and caption, recipes come back as they went in."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.pictures import (
    contact_sheet,
    parse_recipe,
    recipe,
    save_next,
    save_png,
    to_pil,
    to_tensor,
    to_uint8,
    xy_sheet,
)

SETTINGS = {
    "Steps": 30,
    "Sampler": "DPM++ 2M",
    "Schedule type": "Karras",
    "CFG scale": 4.5,
    "Seed": 965400086,
    "Size": "512x448",
    "Model hash": "45dee52b01",
    "Model": "run, with: comma",
    "Version": "ldm 0.1.0",
}
PROMPTS = [
    "a red apple",
    'a cat, "grumpy", (soft:1.2) [x|y], a=b',
    "two\nlines",
    "Steps: 3, Sampler: x, Seed: 1, Size: 2x2",
    "ends with Negative prompt: inside",
    "first\nNegative prompt: a trap",
    "Negative prompt: from the start",
    "back\\slash and \\n",
    "",
    "  spaces kept  ",
    "\n",
    "caf\u00e9 \u732b \U0001f34e",
]


def test_uint8_rounds_and_clamps():
    levels = torch.arange(256) / 127.5 - 1
    assert torch.equal(to_uint8(levels), torch.arange(256, dtype=torch.uint8))
    assert torch.equal(to_uint8(levels - 0.4 / 127.5), torch.arange(256, dtype=torch.uint8))  # not truncated
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_pil_and_back():
    images = torch.randint(0, 256, (3, 3, 5, 7), dtype=torch.uint8)
    pictures = to_pil(images)
    assert pictures[0].size == (7, 5)
    assert torch.equal(to_tensor(pictures), images)


@pytest.mark.parametrize(
    "negative", ["", "blurry, low quality", 'he said "no"\nNegative prompt: twice', " x "]
)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_recipe_round_trip_through_png(tmp_path, prompt, negative):
    save_png(tmp_path / "x.png", Image.new("RGB", (8, 8)), recipe(prompt, negative, SETTINGS))
    with Image.open(tmp_path / "x.png") as picture:
        back = parse_recipe(picture.text["parameters"])
    assert back == {"prompt": prompt, "negative_prompt": negative, **{k: str(v) for k, v in SETTINGS.items()}}


def test_recipe_has_the_layout_that_the_field_reads():
    text = recipe("a cat,\nsleeping", "dog", SETTINGS)
    lines = text.split("\n")
    assert lines[:3] == ["a cat,", "sleeping", "Negative prompt: dog"]
    assert lines[3].startswith(
        "Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4.5, Seed: 965400086, "
    )
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', lines[3])
    assert [name for name, _ in pairs] == list(SETTINGS)
    assert dict(pairs)["Model"] == '"run, with: comma"'
    assert "Negative prompt" not in recipe("a cat", "", SETTINGS)


def test_recipe_of_another_tool_and_of_none():
    text = "masterpiece, cat\nNegative prompt: bad\nhands\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1"
    back = parse_recipe(text)
    assert (back["prompt"], back["negative_prompt"], back["Sampler"]) == (
        "masterpiece, cat",
        "bad\nhands",
        "Euler a",
    )
    assert parse_recipe("just: a prompt") == {"prompt": "just: a prompt", "negative_prompt": ""}


def test_saving_never_overwrites(tmp_path):
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    assert save_next(tmp_path / "new", red).name == "00000.png"
    assert save_next(tmp_path / "new", blue).name == "00001.png"
    with Image.open(tmp_path / "new" / "00000.png") as picture:
        assert picture.getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(FileExistsError):
        save_png(tmp_path / "new" / "00000.png", blue)


def test_sheet_shows_every_picture_unsmoothed_in_order():
    colours = [(10 * i, 255 - 10 * i, 7 * i) for i in range(7)]
    sheet = np.array(contact_sheet([Image.new("RGB", (64, 64), c) for c in colours], columns=3))
    places = [np.argwhere((sheet == c).all(-1)) for c in colours]
    assert all(len(p) == 192 * 192 for p in places)  # 64 px enlarged by a whole factor past the minimum
    firsts = [tuple(p[0]) for p in places]
    assert firsts == sorted(firsts)
    assert len({y for y, _ in firsts}) == 3


def test_sheet_captions_are_drawn_in_their_own_cell_and_wrapped():
    blank = [Image.new("RGB", (64, 64), "white")] * 2
    long = "a very long caption about a red apple on a blue background " * 4 + "w" * 200
    sheet = np.array(contact_sheet(blank, [long, ""], columns=2).convert("L"))
    assert (sheet < 128).sum() > 300  # there is dark text
    ink = np.argwhere(sheet < 200)
    assert ink[:, 0].min() >= 8 + 192  # below the picture
    assert ink[:, 1].max() < 8 + 192 + 2  # and not in the next column
    assert ink[:, 0].max() < sheet.shape[0] - 4  # nor cut at the end of the sheet


def test_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    from ldm.pictures import save_new

    def breaks(file):
        file.write(b"half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        save_new(tmp_path / "a.png", breaks)
    assert list(tmp_path.iterdir()) == []

    def refuse(*paths):
        raise PermissionError(1, "no hard links here")

    monkeypatch.setattr("os.link", refuse)
    save_png(tmp_path / "a.png", Image.new("RGB", (8, 8), "red"))
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(FileExistsError):
        save_png(tmp_path / "a.png", Image.new("RGB", (8, 8), "blue"))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.png", before)]


def test_grid_sheet_has_its_pictures_in_place_and_labels_around_them():
    colours = [(10 * i, 255 - 10 * i, 7 * i) for i in range(6)]
    pictures = [Image.new("RGB", (64, 32), c) for c in colours]
    sheet = np.array(xy_sheet(pictures, ["x=1", "x=2", "x=3"], ["y=1", "y=2"], "a red apple"))
    places = [np.argwhere((sheet == c).all(-1)) for c in colours]
    assert all(len(p) == 192 * 96 for p in places)
    corners = np.array([p[0] for p in places]).reshape(2, 3, 2)
    assert (np.diff(corners[:, :, 1], axis=1) > 0).all()  # columns go right
    assert (np.diff(corners[:, :, 0], axis=0) > 0).all()  # rows go down
    top, left = corners[0, 0]
    dark = (sheet < 128).all(-1)
    assert dark[:top, left:].sum() > 100  # the title and the columns' labels
    for y in corners[:, 0, 0]:
        assert dark[y : y + 96, :left].sum() > 20  # each row's label
    with pytest.raises(ValueError, match="6 pictures for 2 x 2 cells"):
        xy_sheet(pictures, ["a", "b"], ["c", "d"])


@pytest.mark.parametrize(("pictures", "captions"), [(0, 0), (2, 1)])
def test_sheet_refuses(pictures, captions):
    with pytest.raises(ValueError, match=f"{pictures} pictures"):
        contact_sheet([Image.new("RGB", (8, 8))] * pictures, ["x"] * captions)
