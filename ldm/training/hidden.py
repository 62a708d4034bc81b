"""What no shape of a network's weights tells: how they are used, which another network may do differently."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ldm.errors import InputError

TOLD = {  # what no tensor shows of a module: attribute, and how it is said
    "heads": "{} heads",
    "num_heads": "{} heads",
    "num_groups": "{} groups",
    "self_attention": "self_attention={}",
}
TOWERS = {"depth": "the context after {} blocks", "final_norm": "final_norm={}", "zero_null": "zero_null={}"}


def hidden(network: nn.Module) -> dict[str, str]:
    """Heads, groups, kind of activation, how a tower is read, by module name and attribute."""
    found: dict[str, str] = {}
    for name, part in network.named_modules():
        tower = hasattr(part, "zero_null")
        for attribute, words in (TOLD | TOWERS if tower else TOLD).items():
            if hasattr(part, attribute):
                found[f"{name}.{attribute}".lstrip(".")] = words.format(getattr(part, attribute))
        if tower:
            found[f"{name}.padding".lstrip(".")] = f"padding={part.tokenizer.padding}"  # type: ignore[union-attr]
        if name.endswith("gelu"):
            found[f"{name}.kind"] = f"the activation {type(part).__name__}"
    return found


def refuse_hidden(name: str, network: nn.Module, theirs: Mapping[str, str], where: str) -> None:
    for key, ours in hidden(network).items():
        if key in theirs and theirs[key] != ours:
            place = f"{name}.{key}".rpartition(".")[0]
            what = f"{place} has {theirs[key]} there, {ours} by this config"
            raise InputError(where, what, f"correct the section {name}")


def without_tags(section: Any, tags_only: bool = False) -> Any:
    """The section of a network whose weights a checkpoint brings: no `pretrained` in it or in its parts.

    `tags_only`: one that is fetched is taken out, and a local file or `random` stays.
    """
    if not isinstance(section, Mapping):
        return section
    bare = {key: without_tags(value, tags_only) for key, value in section.items()}
    tag = section.get("pretrained")
    if tag and not (tags_only and (tag == "random" or Path(str(tag)).is_file())):
        bare["pretrained"] = None
    return bare
