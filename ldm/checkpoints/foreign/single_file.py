"""A single file of CompVis' and Stability AI's names (or of diffusers', of one network) as a `Model`.

First what the file holds (contents.py), then each network's config from its shapes (shapes.py), the family
they belong to (families.py) and what no tensor tells (answers.py); then the tensors by name (names.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoints.foreign import names as keys
from ldm.checkpoints.foreign import original
from ldm.checkpoints.foreign.answers import SPEC, Answers
from ldm.checkpoints.foreign.contents import (
    AVERAGES,
    CLASS_TOKEN,
    NO_NETWORK,
    REFUSED_SIZES,
    UNET_HOME,
    Contents,
    Home,
    contents,
    is_known,
)
from ldm.checkpoints.foreign.families import SD1, Family, Section, conditioner_section, family_of
from ldm.checkpoints.foreign.names import Rule
from ldm.checkpoints.foreign.original import Original
from ldm.checkpoints.foreign.outline import outline
from ldm.checkpoints.foreign.rules import Shape
from ldm.checkpoints.foreign.shapes import (
    VQ,
    Shapes,
    autoencoder_section,
    dotted,
    tower_of,
    unet_section,
    unet_sizes,
)
from ldm.checkpoints.lazy import LazyTensor, open_tensors
from ldm.checkpoints.model import Asked, Model
from ldm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

RULES: Mapping[str, Mapping[str, Callable[[Iterable[str]], list[Rule]]]] = {
    "backbone": {"original": keys.original_unet, "diffusers": keys.diffusers_unet},
    "autoencoder": {"original": keys.original_autoencoder, "diffusers": keys.diffusers_autoencoder},
    "conditioner": {"transformers": keys.transformers_text, "open_clip": keys.open_clip_text},
}
DDIM = {"_target_": "ldm.diffusion.samplers.ddim", "_partial_": True, "eta": 0.0}
STAGE = "first_stage_model."
# Of text towers: the scale of a loss, and a projection that a single tower is used without.
UNUSED = re.compile(
    r"(cond_stage_model|conditioner)\.(.+\.)?logit_scale|cond_stage_model\.(.+\.)?text_projection(\.weight)?"
)
CONDITIONERS = ("cond_stage_model.", "conditioner.")  # what stands before the names of text towers
AUTOENCODER_SIZE = 256  # pixels a side that first stages were trained on
FACTS = {"title": "title", "author": "author", "license": "licence", "date": "date"}  # of ModelSpec: ours


def read(path: Path, asked: Asked, otherwise: Asked | None = None) -> Model:
    """The model in a file, of which headers alone are read (and the table of its noise schedule).

    `asked` goes before what the file says, `otherwise` (a run's config) is for what nothing else tells.

    Raises InputError, one line, for what is no such file, and one for all that nothing tells.
    """
    where, notes = f"{path}", list[str]()
    tensors, other = open_tensors(path)
    tensors, averages = _averages(tensors, notes)
    shapes = {name: value.shape for name, value in tensors.items()}
    found = contents(shapes, where)
    answers = Answers(where, asked, _original(path, asked, notes), tensors, other, notes, otherwise)
    sizes = _unet_sizes(found, shapes, answers)
    family, exact = family_of(sizes, found.class_token, bool(found.towers)) if sizes else (None, False)
    published = family if exact else None
    autoencoder = _autoencoder(found, shapes, answers, published)
    conditioner = _conditioner(found, shapes, sizes, family, answers)
    backbone = unet_section(sizes, answers.heads(published)) if sizes else None
    scheduler = answers.noise_scheduler(family, published) if sizes else None
    answers.finish(family)
    config = {
        "run_name": path.stem,
        "data": {"image_size": _image_size(family, autoencoder, answers.said, scheduler)},
        "autoencoder": autoencoder,
        "conditioner": conditioner,
        "backbone": backbone,
        "noise_scheduler": scheduler,
        "sampler": dict(DDIM) if scheduler else None,
        "sampling": (family or SD1).sampled(scheduler["zero_terminal_snr"]) if scheduler else None,
    }
    ours = _taken(config, found, tensors, where)
    ema = {}
    if averages and backbone is not None:
        ema = keys.taken(*_rules("backbone", backbone, UNET_HOME), averages, f"{where}, its averages")
    elif backbone is None and autoencoder is not None and found.autoencoder is not None:
        ema = _autoencoder_averages(autoencoder, found.autoencoder, tensors, where)
    if backbone is not None and any(name.startswith(f"{STAGE}model_ema.") for name in tensors):
        notes.append("averages of its autoencoder are left out: the U-Net was trained with its weights")
    lost = [name for name in tensors if UNUSED.fullmatch(name)]
    if conditioner is not None and lost:
        notes.append(f"no part of what is computed here, and left out: {', '.join(lost)}")
    alone = "autoencoder_vq" if autoencoder and autoencoder["_target_"] == VQ else "autoencoder_kl"
    facts = {
        "format": "single file",
        "path": path,
        "family": family.slug if family else "unet" if sizes else alone,
        "step": other["global_step"] if isinstance(other.get("global_step"), int) else None,
        "weights": "raw, ema" if ema else "ema" if backbone and "model_ema.decay" in tensors else "raw",
        "notes": notes,
    }
    if published is not None:  # which this file need not be
        notes.append(f"the published {published.title}, of just these sizes, is under {published.licence}")
    return Model(config, ours, ema, facts | _described(other))


def _averages(
    tensors: dict[str, LazyTensor], notes: list[str]
) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """(tensors, averages of the U-Net by the names of its own); without the U-Net they are its tensors."""
    averages = {
        UNET_HOME.prefix + dotted(name.removeprefix(AVERAGES)): value
        for name, value in tensors.items()
        if name.startswith(AVERAGES)
    }
    if not averages or any(name.startswith(UNET_HOME.prefix) for name in tensors):
        return tensors, averages
    notes.append("it has averages (model_ema) of the U-Net alone, which are taken for its weights")
    return {name: value for name, value in tensors.items() if not name.startswith(AVERAGES)} | averages, {}


def _autoencoder_averages(
    section: Section, home: Home, tensors: Mapping[str, LazyTensor], where: str
) -> dict[str, LazyTensor]:
    """Averages of an autoencoder alone, whose names are its own without the dots; empty: it has none."""
    below = f"{home.prefix}model_ema."
    rules, shapes = _rules("autoencoder", section, home)
    own = {name: below + name.removeprefix(home.prefix).replace(".", "") for r in rules for name in r.theirs}
    found = {name: tensors[average] for name, average in own.items() if average in tensors}
    # A codebook that is not trained by gradients is no parameter there, and has no average.
    rules = [rule for rule in rules if "quantize." not in rule.ours or rule.theirs[0] in found]
    return keys.taken(rules, shapes, found, f"{where}, its averages") if found else {}


def _original(path: Path, asked: Asked, notes: list[str]) -> Original:
    """What the YAML says that was given, or lies beside the file."""
    if asked.config is not None:
        return original.read(asked.config, f"--config {asked.config}")
    found = original.beside(path)
    if found is None:
        return Original("")
    notes.append(f"{found.name} beside it was read, too")
    return original.read(found, f"{found}")


def _unet_sizes(found: Contents, shapes: Shapes, answers: Answers) -> Section | None:
    if found.unet is None:
        return None
    sizes = unet_sizes(found.unet.shapes(shapes), answers.where)
    for refused, what in REFUSED_SIZES:
        if all(sizes[name] == value for name, value in refused.items()):
            raise InputError(answers.where, f"holds {what}", NO_NETWORK)
    answers.said.agree(answers.said.unet, sizes, "U-Net")
    return sizes


def _autoencoder(
    found: Contents, shapes: Shapes, answers: Answers, published: Family | None
) -> Section | None:
    if found.autoencoder is None:
        answers.notes.append("it has no autoencoder")
        return None
    section = autoencoder_section(found.autoencoder.shapes(shapes), answers.where)
    answers.said.agree(answers.said.autoencoder, section, "autoencoder")
    return section | {"latent_scale": answers.latent_scale(section, published)}


def _conditioner(
    found: Contents, shapes: Shapes, sizes: Section | None, family: Family | None, answers: Answers
) -> Section | None:
    if not found.towers and not found.class_token:
        lost = [name for name in shapes if name.startswith(CONDITIONERS) and not is_known(name)]
        if lost:
            what = f"has {lost[0]}, but no whole text tower that could be told by its names"
            raise InputError(answers.where, what, "is the file whole? if it is, leave them out of it")
    if sizes is None:
        if found.towers:
            answers.notes.append("its text towers are left out: it has no U-Net")
        return None
    if family is not None and found.class_token and not family.text:
        rows, width = shapes[CLASS_TOKEN]
        return {
            "_target_": "ldm.conditioning.label.ClassToken",
            "num_classes": rows,
            "context_dim": width,
        }
    if family is None or not found.towers:
        answers.notes.append("its text towers are left out" if found.towers else "it has no text tower")
        return None
    if any(name.startswith("depth_model.") for name in shapes):
        answers.notes.append("its network that makes depth maps is left out: give maps")
    towers = []
    for home in found.towers:
        below = {name.removeprefix("text_model."): shape for name, shape in home.shapes(shapes).items()}
        towers.append(tower_of(below, home.layout, answers.where, answers.text_heads))
        answers.check_heads(towers[-1])
    return conditioner_section(family, towers, sizes, answers.where)


def _image_size(
    family: Family | None, autoencoder: Section | None, said: Original, scheduler: Section | None
) -> int:
    if said.latent_size is not None and autoencoder is not None:
        return int(said.latent_size * 2 ** (len(autoencoder["block_out_channels"]) - 1))
    return (family or SD1).image_size[scheduler["prediction_type"]] if scheduler else AUTOENCODER_SIZE


def _taken(
    config: Mapping[str, Any], found: Contents, tensors: Mapping[str, LazyTensor], where: str
) -> dict[str, LazyTensor]:
    """All tensors of the networks under our names, and the latents' scale, which has no name there."""
    rules: list[Rule] = []
    shapes: dict[str, Shape] = {}
    for network, home in (("backbone", found.unet), ("autoencoder", found.autoencoder)):
        if config[network] is not None and home is not None:
            more, its = _rules(network, config[network], home)
            rules, shapes = rules + more, shapes | its
    if config["conditioner"] is not None:
        more, its = _conditioner_rules(config["conditioner"], found)
        rules, shapes = rules + more, shapes | its
    left = () if config["conditioner"] is not None else CONDITIONERS
    ours = keys.taken(rules, shapes, tensors, where, lambda name: is_known(name) or name.startswith(left))
    section = config["autoencoder"]
    if section is None:
        return ours
    if config["backbone"] is not None and config["backbone"]["out_channels"] != section["latent_channels"]:
        what = (
            f"its U-Net gives {config['backbone']['out_channels']} channels, "
            f"its autoencoder has {section['latent_channels']}"
        )
        raise InputError(where, what, "is it put together of two models?")
    statistics = {"latent_shift": 0.0, "latent_scale": section["latent_scale"]}
    channels = section["latent_channels"]
    return ours | {f"autoencoder.{name}": _filled(channels, value) for name, value in statistics.items()}


def _filled(channels: int, value: float) -> LazyTensor:
    def read() -> Tensor:
        import torch

        return torch.full((channels,), value)

    return LazyTensor((channels,), "F32", read)


def _rules(network: str, section: Section, home: Home) -> tuple[list[Rule], dict[str, Shape]]:
    """Rules and our shapes for a network at a place in the file, by full names on both sides."""
    shapes = outline(section)
    rules = keys.under(RULES[network][home.layout](shapes), f"{network}.", home.prefix)
    return rules, {f"{network}.{name}": shape for name, shape in shapes.items()}


def _conditioner_rules(section: Section, found: Contents) -> tuple[list[Rule], dict[str, Shape]]:
    shapes = {f"conditioner.{name}": shape for name, shape in outline(section).items()}
    if "parts" not in section and "model" not in section:
        return [Rule("conditioner.embedding.weight", (CLASS_TOKEN,))], shapes
    parts = [name for name, part in section.get("parts", {}).items() if "model" in part]
    prefixes = [f"conditioner.parts.{name}.text." for name in parts] or ["conditioner.text."]
    rules: list[Rule] = []
    for prefix, home in zip(prefixes, found.towers, strict=True):
        own = [name.removeprefix(prefix) for name in shapes if name.startswith(prefix)]
        rules += keys.under(RULES["conditioner"][home.layout](own), prefix, home.prefix)
    return rules, shapes


def _described(other: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says of itself in ModelSpec's words."""
    spec = {key: str(value) for key, value in other.items() if key.startswith(SPEC)}
    own = {ours: spec[SPEC + key] for key, ours in FACTS.items() if SPEC + key in spec}
    return own | {"metadata": spec}
