"""A picture's recipe, there and back: what it was drawn with as the text of its PNG, and that as options.

The fields are those of the field's tools where they have one (Steps, Sampler, CFG scale, Batch pos, ...).
Every setting that changes pixels is in it, a float with all its digits. `Batch size` and `Batch pos` are
there because the last bits of a network's arithmetic depend on how many pictures it draws at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import ldm
from ldm.errors import InputError
from ldm.pictures import parse_recipe, recipe
from ldm.sampling.request import ALWAYS, Request, known_samplers

SAMPLERS = {  # our name: what the field's tools call it
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "heun_churn": "Heun churn",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "plms": "PLMS",
    "unipc": "UniPC",
}
ALIASES = {  # names in prompt files, beside ours
    "euler_a": "euler_ancestral",
    "k_euler": "euler",
    "k_euler_a": "euler_ancestral",
    "k_heun": "heun",
    "dpmsolver++": "dpmpp_2m",
    "dpm++_2m": "dpmpp_2m",
    "k_dpmpp_2m": "dpmpp_2m",
    "pndm": "plms",
}
SPACINGS = {"karras": "Karras", "uniform": "Uniform"}
FOREIGN_SPACINGS = {"exponential": "log_snr", "sgm uniform": "trailing", "automatic": "", "normal": ""}


def sampler_named(text: str) -> str:
    """Our name of a sampler that a prompt file or another tool's recipe names."""
    plain = text.strip().lower()
    theirs = {label.lower(): name for name, label in SAMPLERS.items()}
    name = theirs.get(plain) or ALIASES.get(plain, plain)
    if name not in known_samplers():
        aliases = [alias for alias, ours in ALIASES.items() if ours in known_samplers()]
        have = ", ".join([*known_samplers(), *aliases])
        raise InputError(f"sampler {text.strip()}", "no such sampler", f"have: {have}")
    return name


def recipe_of(
    request: Request, prompt: str, seed: int, batch: tuple[int, int], model: Mapping[str, str | None]
) -> str:
    """What the picture is made of; `batch` is its size and the picture's place, `model` the model's fields.

    Entries that are None are left out.
    """
    (size, place), interval = batch, request.guidance_interval
    settings: dict[str, object] = {
        "Steps": request.num_steps,
        "Sampler": SAMPLERS.get(request.sampler_name, request.sampler_name),
        **{f"Sampler {name}": _exact(value) for name, value in request.sampler_options.items()},
        "Schedule type": SPACINGS.get(request.spacing, request.spacing),
        "CFG scale": _exact(request.guidance_scale),
        "CFG rescale": _exact(request.guidance_rescale) if request.guidance_rescale else None,
        "CFG interval": None if interval == ALWAYS else " to ".join(map(_exact, interval)),
        "Seed": seed,
        "Size": f"{request.width}x{request.height}",
        "Model hash": model.get("hash") or None,
        "Model": model.get("name") or None,
        "Weights": model.get("weights"),
        "Precision": model.get("precision"),
        "Denoising strength": None if request.start is None else _exact(request.strength),
        "Init image hash": fingerprint(request.start),
        "Mask hash": fingerprint(request.mask),
        "Prompt weights": "on" if request.prompt_weights else None,
        "Clip skip": request.clip_skip if request.clip_skip != 1 else None,
        "Tile": request.tile,
        "Batch size": size if size > 1 else None,
        "Batch pos": place if size > 1 else None,
        "Version": f"ldm {ldm.__version__}",
    }
    given = {name: value for name, value in settings.items() if value is not None}
    return recipe(prompt, request.negative_prompt, given)


def _exact(value: Any) -> str:
    """A number in the fewest digits that give it back."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def fingerprint(pixels: Tensor | None) -> str | None:
    """First 16 digits of the sha256 of a prepared picture's or mask's pixels."""
    if pixels is None:
        return None
    data = pixels.to(torch.uint8).contiguous().cpu().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def _value(text: str) -> Any:
    """An option of a sampler: a whole number, a number, a truth value, or a word."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return {"True": True, "False": False, "None": None}.get(text, text)


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def _interval(text: str) -> list[float]:
    low, high = text.split(" to ")
    return [float(low), float(high)]


READERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "Steps": ("num_steps", int),
    "CFG scale": ("guidance_scale", float),
    "CFG rescale": ("guidance_rescale", float),
    "CFG interval": ("guidance_interval", _interval),
    "Seed": ("seed", int),
    "Weights": ("weights", str),
    "Precision": ("precision", str),
    "Denoising strength": ("strength", float),
    "Prompt weights": ("prompt_weights", lambda text: text == "on"),
    "Clip skip": ("clip_skip", int),
    "Tile": ("tile", int),
}


@dataclass(frozen=True)
class Recipe:
    """A recipe that was read, to be drawn again; raises InputErrors that name its file."""

    fields: Mapping[str, str]  # as `parse_recipe` gives them
    place: str

    @classmethod
    def read(cls, path: str) -> Recipe:
        """The recipe in a PNG."""
        place = f"--from-png {path}"
        if not Path(path).is_file():
            raise InputError(place, "no such file")
        try:
            with Image.open(path) as picture:
                picture.load()  # text may stand behind the pixels
                text = picture.info.get("parameters")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(place, f"not a picture that can be read ({type(error).__name__})") from None
        fields = parse_recipe(text) if isinstance(text, str) else {}
        if "Steps" not in fields:
            raise InputError(place, "carries no recipe (the text `parameters`)", "give a PNG as it was drawn")
        return cls(fields, place)

    @property
    def ours(self) -> bool:
        return self.fields.get("Version", "").startswith("ldm ")

    def options(self) -> dict[str, Any]:
        """As options of sample.py; fields that we lack are passed over.

        Of another tool it takes what maps: steps, sampler, schedule, scale, seed, size, strength.
        """
        found: dict[str, Any] = {"negative_prompt": self.fields["negative_prompt"]}
        for field, (option, read) in READERS.items():
            if field in self.fields:
                found[option] = self._read(field, read)
        if "Size" in self.fields:
            found["width"], found["height"] = self._read("Size", _size)
        label = self.fields.get("Sampler", "")
        schedule = self.fields.get("Schedule type", "karras" if label.endswith(" Karras") else "").lower()
        schedule = FOREIGN_SPACINGS.get(schedule, schedule)
        return (
            found | self._sampler(label.removesuffix(" Karras")) | ({"spacing": schedule} if schedule else {})
        )

    def _read(self, field: str, read: Callable[[str], Any]) -> Any:
        try:
            return read(self.fields[field])
        except ValueError:
            what = f"{field}: {self.fields[field]!r} in its recipe cannot be read"
            raise InputError(self.place, what) from None

    def _sampler(self, label: str) -> dict[str, Any]:
        """The sampler as a name, or as a section where it has options of its own."""
        if not label:
            return {}
        try:
            name = sampler_named(label)
        except InputError as error:
            raise InputError(self.place, str(error)) from None
        own = {field[8:]: _value(text) for field, text in self.fields.items() if field.startswith("Sampler ")}
        return {"sampler": {**known_samplers()[name], **own} if own else name}

    def batch(self) -> tuple[int, int] | None:
        """(size, place) of the batch that one of our pictures was drawn in; None for a batch of its own."""
        size, place = self.fields.get("Batch size", ""), self.fields.get("Batch pos", "")
        good = self.ours and size.isdecimal() and place.isdecimal() and int(place) < int(size)
        return (int(size), int(place)) if good else None

    def require_sources(self, options: Mapping[str, Any]) -> None:
        """Raise unless the pictures that the recipe names only by their hash are given."""
        for field, option, what in (
            ("Init image hash", "init_image", "was drawn over a picture"),
            ("Mask hash", "mask_image", "was drawn inside a mask"),
        ):
            if field in self.fields and not options[option]:
                fix = f"give it: {option}=FILE"
                raise InputError(self.place, f"{what}, of which its recipe has only the hash", fix)

    def require_same(self, request: Request, digest: str | None) -> None:
        """Raise where the checkpoint or a picture is not the one that the recipe names by its hash.

        A digest of None is not looked at, nor what another tool wrote, which hashes otherwise.
        """
        if not self.ours:
            return
        model, name = self.fields.get("Model hash"), self.fields.get("Model", "another checkpoint")
        if digest and model is not None and model != digest[:10]:
            what = f"was drawn by {name} (hash {model}), and this checkpoint has {digest[:10]}"
            raise InputError(self.place, what, "give that checkpoint")
        if self.fields.get("Size") != f"{request.width}x{request.height}":
            return  # cut to another size on purpose
        for field, option, pixels in (
            ("Init image hash", "init_image", request.start),
            ("Mask hash", "mask_image", request.mask),
        ):
            if field in self.fields and self.fields[field] != fingerprint(pixels):
                what = f"was drawn with another {option} (hash {self.fields[field]})"
                raise InputError(
                    self.place, f"{what}, and this one has {fingerprint(pixels)}", "give that one"
                )
