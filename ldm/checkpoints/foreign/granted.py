"""What readers of a single file take for granted, by the family that they see in its names and shapes.

Such a file holds tensors alone, so the rest (`families.py`) must be what the model is.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.checkpoints.foreign.families import Family, family_of
from ldm.checkpoints.foreign.towers import Tower, kind, parts, towers
from ldm.checkpoints.model import Model
from ldm.config import build
from ldm.errors import InputError

CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
BOTH = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
TOWERS = {  # where text towers lie; below transformer. in transformers' names, below model. in open_clip's
    "sd1": (CLIP,),
    "sd1_inpaint": (CLIP,),
    "sd2": (OPEN_CLIP,),
    "sd2_inpaint": (OPEN_CLIP,),
    "sd2_depth": (OPEN_CLIP,),
    "upscaler": (OPEN_CLIP,),
    "sdxl": BOTH,
    "sdxl_inpaint": BOTH,
    "ldm_class": (),
}
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # ours, ModelSpec's
FOLDER = "use --format diffusers, which has a place for it"


def family_in(model: Model) -> tuple[Family, bool]:
    """The family that readers take the model for, and whether its sizes are the published ones.

    Raises InputError where they would be wrong about it.
    """
    section, conditioner = model.config.get("backbone"), model.config.get("conditioner")
    if section is None:
        raise InputError("backbone", "the checkpoint has none", "use --format autoencoder")
    unet, found = sizes(section), towers(conditioner, model.of("conditioner"))
    others = {kind(part) for part in parts(conditioner).values()} - {tower.kind for tower in found}
    reads = bool(found) or (conditioner is None and unet["context_dim"] is not None)
    family, published = family_of(unet, "ClassToken" in others, reads)
    beside = {kind(part) for part in family.beside.values()} if family and family.text else {"ClassToken"}
    if family is None or not (conditioner is None or others == beside):
        what = "no family of single files has a U-Net and a conditioner like these"
        raise InputError("backbone", what, FOLDER)
    _same("backbone", {"norm_groups": unet["norm_groups"]}, {"norm_groups": 32})
    heads = heads_of(unet, next(iter(family.heads)))
    if published:
        _same("backbone", heads, family.heads)
    if conditioner is not None:
        _check_towers(family, found)
    _check_process(model, family)
    return family, published


def prediction_of(model: Model) -> str:
    return str((model.config.get("noise_scheduler") or {}).get("prediction_type", "epsilon"))


def heads_of(unet: Mapping[str, Any], first: str = "num_heads") -> dict[str, int]:
    """How attention is split, in one number for all levels; `first`: num_heads or head_dim, if both would do.

    `unet` are all arguments of the network. Raises InputError where there is no such number.
    """
    channels, depths = unet["block_out_channels"], list(unet["transformer_depth"])
    depths[-1] = depths[-1] or unet["mid_depth"]
    given = "head_dim" if unet["num_heads"] is None else "num_heads"
    values = _levels(unet[given], len(channels))
    other = [width // value for width, value in zip(channels, values, strict=True)]
    said = {given: values, ({"num_heads", "head_dim"} - {given}).pop(): other}
    for name in (first, *said):
        used = {value for value, depth in zip(said[name], depths, strict=True) if depth}
        if len(used) == 1:
            return {name: used.pop()}
    what = f"{given}={unet[given]}: neither the number of heads nor their width is the same on every level"
    raise InputError("backbone", what, FOLDER)


def _levels(value: int | Sequence[int], count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value)


def sizes(section: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of the U-Net of a config section."""
    made = build({**section, "_partial_": True})
    given = {p.name: p.default for p in inspect.signature(made.func).parameters.values()} | made.keywords
    depths = given["transformer_depth"] = _levels(
        given["transformer_depth"], len(given["block_out_channels"])
    )
    if given["mid_depth"] is None:
        given["mid_depth"] = next((depth for depth in reversed(depths) if depth), 0)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def _same(network: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    for name, value in ours.items():
        if value != theirs.get(name):
            what = f"{name}={value}, and readers of a single file take {name}={theirs.get(name)} for granted"
            raise InputError(network, what, FOLDER)


def _check_towers(family: Family, found: list[Tower]) -> None:
    if len(found) != len(family.text):
        what = f"it has {len(found)} text towers, and {family.title} has {len(family.text)}"
        raise InputError("conditioner", what, FOLDER)
    for tower, place, read in zip(found, TOWERS[family.slug], family.text.values(), strict=True):
        last = "last" if read["layer"] == "last" else "penultimate"
        theirs = {"QuickGELU": place.endswith("transformer."), "final_norm": read["final_norm"]}
        theirs |= {"pooled": read.get("pooled", False), "padding": read["padding"], "layer": last}
        ours = {"QuickGELU": tower.quick, "final_norm": tower.section.get("final_norm", True)}
        ours |= {"pooled": "text_projection" in tower.names, "padding": tower.padding, "layer": tower.layer}
        if (last, tower.layer) == ("penultimate", "last"):
            ours["layer"] = last  # it gets a block that is not run
        _same("conditioner", ours, theirs)


def _check_process(model: Model, family: Family) -> None:
    section = model.config.get("noise_scheduler")
    if section is None:
        return
    if kind(section) != "VariancePreserving" or prediction_of(model) not in PREDICTIONS:
        what = f"readers of a single file know no {kind(section)} with {prediction_of(model)}"
        raise InputError("noise_scheduler", what, FOLDER)
    if family.text:  # whose programs draw by the family; others go by the file's tables
        scheduler = build(section)
        ours = {"num_train_timesteps": scheduler.num_train_timesteps, "schedule": scheduler.schedule}
        ours |= {"beta_start": scheduler.beta_start, "beta_end": scheduler.beta_end}
        _same("noise_scheduler", ours, dict(zip(ours, (1000, *family.schedule), strict=True)))


def check_autoencoder(section: Mapping[str, Any] | None) -> None:
    """Raises InputError for one that has no place in a single file, or alone in a file."""
    if section is None:
        raise InputError("autoencoder", "the checkpoint has none", "give another SRC")
    if kind(section) not in ("AutoencoderKL", "AutoencoderVQ"):
        raise InputError(
            "autoencoder", f"no other program has a {kind(section)}", "train a kl_f8 to share it"
        )
    _same("autoencoder", {"norm_groups": section.get("norm_groups", 32)}, {"norm_groups": 32})
