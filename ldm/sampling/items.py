"""What is to be drawn, as a list of pictures: prompts of a file with options of their own, grids, batches.

A line of a prompt file is a prompt, with options at its end as sd-scripts and the tools after it write them:

    a red apple --n blurry, dark --w 64 --h 64 --d 7 --s 30 --l 5.5 --ss euler_a

n negative prompt, w and h size, d seed, s steps, l guidance scale, ss sampler. Lines that begin with # are
comments. A grid's axis is `OPTION:VALUE,VALUE`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ldm.errors import InputError
from ldm.pictures import contact_sheet, xy_sheet
from ldm.sampling.output import Sheet
from ldm.sampling.recipes import sampler_named
from ldm.sampling.request import whole

MODEL = ("checkpoint", "weights", "precision")  # the options of sample.py that open the pipeline,
LIST = (  # those that say what there is to draw and where it goes; the others are of the pipeline's call
    "prompt", "prompt_file", "from_png", "num_images", "seed", "batch_size", "speed", "xy", "format",
    "output",
)  # fmt: skip
SHEET = 100  # pictures, at most, on the contact sheet of a list
FLAG = re.compile(r"(?:^|\s)--([a-zA-Z]+)(?=\s|$)")
FLAGS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "n": ("negative_prompt", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("num_steps", int),
    "l": ("guidance_scale", float),
    "ss": ("sampler", sampler_named),
}
OUTSIDE_BRACKETS = re.compile(r",(?![^\[]*\])")
Axis = Mapping[str, Mapping[str, Any]]  # what each value of an axis sets, by its label


@dataclass(frozen=True)
class Prompt:
    """A prompt and what was said with it: options of the pipeline's call, and where they stand."""

    text: str
    options: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""


@dataclass(frozen=True)
class Item:
    """One picture: what it shows, its seed, the pipeline that draws it and the options of the call.

    `batch` (size, place) is for a picture made again, whose bits depend on how many were drawn with it.
    """

    prompt: str
    seed: int
    model: tuple[str, ...]  # values of MODEL
    options: Mapping[str, Any]
    place: str = ""
    batch: tuple[int, int] | None = None


def read_prompts(path: str) -> list[Prompt]:
    """The prompts of a file, at least one; errors name the file and the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"prompt_file={path}", reason) from None
    numbered = [(n, line.rstrip("\r")) for n, line in enumerate(lines, 1)]
    found = [(n, line) for n, line in numbered if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise InputError(f"prompt_file={path}", "no prompt in it", "write one a line")
    return [_prompt(line, f"{path}:{n}") for n, line in found]


def _prompt(line: str, place: str) -> Prompt:
    text, *rest = FLAG.split(line)
    options: dict[str, Any] = {}
    for flag, value in zip(rest[::2], rest[1::2], strict=True):
        name, read = FLAGS.get(flag.lower(), ("", str))
        if not name:
            have = " ".join(f"--{known}" for known in FLAGS)
            raise InputError(place, f"--{flag} is no option of a prompt", f"have: {have}")
        if name in options:
            raise InputError(place, f"--{flag} is given twice")
        try:
            options[name] = read(value.strip())
        except InputError as error:
            raise InputError(place, str(error)) from None
        except ValueError:
            raise InputError(place, f"--{flag} {value.strip()}: not a number") from None
    return Prompt(text, options, place)


def planned(
    config: Mapping[str, Any], prompts: Sequence[Prompt], columns: Axis, rows: Axis
) -> tuple[list[Item], list[Sheet]]:
    """The pictures that a config of sample.py asks for, cell after cell of the grid, and their sheets."""
    cells = [{**row, **column} for row in rows.values() for column in columns.values()]
    if any(row.keys() & column.keys() for row in rows.values() for column in columns.values()):
        raise InputError("xy.y", "sets what xy.x sets, too", "choose another option")
    items: list[Item] = []
    for cell in cells:
        shown = [Prompt(cell["prompt"])] if "prompt" in cell else prompts
        items += _items(shown, {**config, **cell}, cell)
    images = len(items) // len(cells)
    if len(cells) > 1:
        titles = ["" if "prompt" in cells[0] else item.prompt for item in items[:images]]
        sheet = partial(xy_sheet, columns=list(columns), rows=list(rows))
        return items, [(range(k, len(items), images), partial(sheet, title=t)) for k, t in enumerate(titles)]
    captions = [item.prompt for item in items]
    whole_list: Sheet = (range(len(items)), partial(contact_sheet, captions=captions))
    return items, [whole_list] if 1 < len(items) <= SHEET else []


def _items(prompts: Sequence[Prompt], config: Mapping[str, Any], fixed: Collection[str]) -> list[Item]:
    """`num_images` pictures of each prompt; picture i has the seed `seed` + i, or its line's seed onward.

    What a line says goes before the config, but for the options named in `fixed`.
    """
    model = tuple(str(config[name]) for name in MODEL)
    options = {name: value for name, value in config.items() if name not in (*MODEL, *LIST)}
    images = range(whole("num_images", config["num_images"], 1))
    items: list[Item] = []
    for prompt in prompts:
        own = {name: value for name, value in prompt.options.items() if name not in fixed}
        first = own.pop("seed", config["seed"] + len(items))
        its = {**options, **own}
        items += [Item(prompt.text, first + k, model, its, prompt.place) for k in images]
    return items


def batches(items: Sequence[Item], size: int) -> list[list[int]]:
    """Places of the items that are drawn together: neighbours with equal options, at most `size`.

    It knows nothing of processes: whoever draws a batch draws the same bits.
    """
    found: list[list[int]] = []
    for i, item in enumerate(items):
        last = items[found[-1][0]] if found else None
        if last is not None and len(found[-1]) < size and _together(last, item):
            found[-1].append(i)
        else:
            found.append([i])
    return found


def _together(a: Item, b: Item) -> bool:
    return a.batch is None is b.batch and a.model == b.model and a.options == b.options


def read_axis(option: str, texts: Sequence[str], verbatim: Sequence[str]) -> tuple[str, list[str]]:
    """The name and the values of an axis, as typed.

    Values are parted at commas outside [brackets]; those of options in `verbatim` are taken whole, and the
    axis is repeated for each.
    """
    axes = [text.partition(":") for text in texts]
    names = list(dict.fromkeys(name for name, _, _ in axes))
    if len(names) != 1 or not all(colon and value for _, colon, value in axes):
        raise InputError(
            f"{option}={texts[-1]}", "not one option with values", f"write {option}=OPTION:VALUE,VALUE"
        )
    if names[0] in verbatim:
        return names[0], [value for _, _, value in axes]
    return names[0], [part.strip() for _, _, value in axes for part in OUTSIDE_BRACKETS.split(value)]
