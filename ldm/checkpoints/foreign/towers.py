"""The text towers of a conditioner: where their tensors are, and how they are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\..+")
KINDS = ("ldm.conditioning.frozen.FrozenOpenCLIP", "ldm.conditioning.text.TextTransformer")


@dataclass(frozen=True)
class Tower:
    """A text tower; `names` are those of its tensors below `prefix`, which are open_clip's."""

    prefix: str
    section: Mapping[str, Any]
    names: tuple[str, ...]

    @property
    def layers(self) -> int:
        return 1 + max(int(found[1]) for name in self.names if (found := BLOCK.fullmatch(name)))

    @property
    def depth(self) -> int:
        """Blocks that are run for the context."""
        layer = self.section.get("layer", "last")
        return {"last": self.layers, "penultimate": self.layers - 1}.get(layer, layer)

    @property
    def layer(self) -> str | int:
        """The same in words, where there are some."""
        return {self.layers: "last", self.layers - 1: "penultimate"}.get(self.depth, self.depth)

    @property
    def kind(self) -> str:
        return kind(self.section)

    @property
    def quick(self) -> bool:
        """Has it OpenAI's approximation of GELU?"""
        model = self.section.get("model")
        if isinstance(model, Mapping):
            return bool(model.get("quick_gelu"))
        return "quickgelu" in str(model) or self.section.get("pretrained") == "openai"

    @property
    def padding(self) -> str:
        return str(self.section.get("padding", "zero"))

    def unused(self, name: str) -> bool:
        """Is the tensor part of a block that no one asks for?"""
        block = BLOCK.fullmatch(name)
        return block is not None and int(block[1]) >= self.depth and "text_projection" not in self.names


def parts(section: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """The parts of a conditioner by the prefix of their tensors; a conditioner of one part has none."""
    if section is None:
        return {}
    if "parts" in section:
        return {f"parts.{name}.": part for name, part in section["parts"].items()}
    return {"": section}


def kind(section: Mapping[str, Any]) -> str:
    """The class that a section names, without its module."""
    return str(section["_target_"]).rpartition(".")[2]


def blank(section: Any) -> Any:
    """A section by which nothing is fetched: its text towers wait for a checkpoint's weights."""
    if isinstance(section, Mapping):
        return {key: None if key == "pretrained" else blank(value) for key, value in section.items()}
    return section


def towers(section: Mapping[str, Any] | None, names: Iterable[str]) -> list[Tower]:
    """The text towers of a conditioner, in order; `names` are those of its tensors."""
    found, names = [], list(names)
    for prefix, part in parts(section).items():
        below = f"{prefix}text."
        own = tuple(name.removeprefix(below) for name in names if name.startswith(below))
        if part["_target_"] in KINDS and own:
            found.append(Tower(below, part, own))
    return found
