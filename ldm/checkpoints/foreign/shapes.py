"""The architecture of a network, read off the names and shapes of its tensors.

Names are CompVis' (`input_blocks.1.0.in_layers.2.weight`) or diffusers' (`down_blocks.0.resnets.0.conv1...`),
without what stands before them in a file. What no shape tells (heads, prediction type) is not here. Only what
decides is read: that the rest fits is found when the tensors are taken.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ldm.checkpoints.foreign.families import Section, Tower
from ldm.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]
UNET, KL, VQ = (
    "ldm.backbones.unet.CrossAttentionUNet",
    "ldm.autoencoder.kl.AutoencoderKL",
    "ldm.autoencoder.vq.AutoencoderVQ",
)
CLIP_MLP = 4  # width of a tower's feed-forward layers, in units of its own


@dataclass(frozen=True)
class Names:
    """What a layout calls the tensors that decide.

    resnets  the levels in order of computation, each the (resnet, attention) modules that it may have
    """

    first: str
    last: str
    width: str  # of a resnet, its first convolution
    middle: str
    resnets: Callable[[Shapes], list[list[tuple[str, str]]]]
    pooled: str = ""
    classes: str = ""


def _run(shapes: Shapes, name: str, start: int = 0) -> Iterator[int]:
    """start, start + 1, ... as long as there is a tensor `name` with that for {}."""
    return itertools.takewhile(lambda i: name.format(i) in shapes, itertools.count(start))


def _numbered(
    levels: str, resnet: str, attention: str, width: str, shapes: Shapes
) -> list[list[tuple[str, str]]]:
    """Modules of layouts that number both: in `levels` {} is the level, in the others the layer."""
    first = f"{levels}.{resnet.format(0)}.{width}"
    return [
        [
            (f"{level}.{resnet.format(layer)}", f"{level}.{attention.format(layer)}")
            for layer in _run(shapes, f"{level}.{resnet}.{width}")
        ]
        for level in (levels.format(i) for i in _run(shapes, first))
    ]


def _blocks(shapes: Shapes) -> list[list[tuple[str, str]]]:
    """Modules of CompVis' U-Net, whose blocks are counted through: a downsampling ends a level."""
    levels: list[list[tuple[str, str]]] = [[]]
    for i in itertools.count(1):
        block = f"input_blocks.{i}"
        if f"{block}.0.in_layers.2.weight" in shapes:
            levels[-1].append((f"{block}.0", f"{block}.1"))
        elif f"{block}.0.op.weight" in shapes:
            levels.append([])
        else:
            return levels
    raise AssertionError


UNET_NAMES = {
    "original": Names(
        "input_blocks.0.0.weight",
        "out.2.weight",
        "in_layers.2.weight",
        "middle_block.1",
        _blocks,
        "label_emb.0.0.weight",
        "label_emb.weight",
    ),
    "diffusers": Names(
        "conv_in.weight",
        "conv_out.weight",
        "conv1.weight",
        "mid_block.attentions.0",
        partial(_numbered, "down_blocks.{}", "resnets.{}", "attentions.{}", "conv1.weight"),
        "add_embedding.linear_1.weight",
        "class_embedding.weight",
    ),
}
AUTOENCODER_NAMES = {
    "original": Names(
        "encoder.conv_in.weight",
        "decoder.conv_out.weight",
        "conv1.weight",
        "encoder.mid.attn_1",
        partial(_numbered, "encoder.down.{}", "block.{}", "attn.{}", "conv1.weight"),
    ),
    "diffusers": Names(
        "encoder.conv_in.weight",
        "decoder.conv_out.weight",
        "conv1.weight",
        "encoder.mid_block.attentions.0",
        partial(_numbered, "encoder.down_blocks.{}", "resnets.{}", "attentions.{}", "conv1.weight"),
    ),
}


def layout_of(shapes: Shapes, where: str, what: str) -> str:
    """original or diffusers; a mixture is refused."""
    found = {
        "original": any(
            name.startswith(("input_blocks.", "encoder.down.", "encoder.mid.")) for name in shapes
        ),
        "diffusers": any(name.startswith(("down_blocks.", "encoder.down_blocks.")) for name in shapes),
    }
    if all(found.values()):
        raise InputError(
            where, f"holds the {what} twice, in CompVis' names and in diffusers'", "keep one of them"
        )
    return "diffusers" if found["diffusers"] else "original"


def unet_sizes(shapes: Shapes, where: str) -> Section:
    """The arguments of CrossAttentionUNet that shapes tell: all in `families.SD1_UNET`. Raises InputError."""
    names = UNET_NAMES[layout_of(shapes, where, "U-Net")]
    first, last = _shape(shapes, names.first, where), _shape(shapes, names.last, where)
    levels = [level for level in names.resnets(shapes) if level]
    if not levels:
        raise InputError(where, "its U-Net has no levels", "is the file whole?")
    channels, depths, layers, own = [], [], [], []
    contexts: set[int] = set()
    for i, level in enumerate(levels):
        widths = {shapes[f"{resnet}.{names.width}"][0] for resnet, _ in level}
        found = {_depth(shapes, attention) for _, attention in level}
        if len(widths) > 1 or len(found) > 1:
            what = (
                f"level {i} of its U-Net has widths {sorted(widths)} and transformer depths {sorted(found)}"
            )
            raise InputError(where, what, "this house has one width and one depth a level")
        channels.append(widths.pop())
        depths.append(found.pop())
        layers.append(len(level))
        own.append(_reads(shapes, level[0][1], channels[-1], contexts, where) if depths[-1] else None)
    mid_depth = _depth(shapes, names.middle)
    if mid_depth and not _reads(shapes, names.middle, channels[-1], contexts, where):
        raise InputError(
            where, "the middle of its U-Net has no self-attention", "this house has no such network"
        )
    if len(contexts) > 1:
        raise InputError(where, f"its U-Net has contexts of widths {sorted(contexts)}", "this house has one")
    projections = [name for name in shapes if name.endswith(".proj_in.weight")]
    whole = all(value in (True, None) for value in own)
    return {
        "in_channels": first[1],
        "out_channels": last[0],
        "block_out_channels": channels,
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "transformer_depth": depths,
        "mid_depth": mid_depth,
        "context_dim": contexts.pop() if contexts else None,
        "linear_projection": bool(projections) and len(shapes[projections[0]]) == 2,
        "pooled_dim": shapes[names.pooled][1] if names.pooled in shapes else None,
        "num_classes": shapes[names.classes][0] if names.classes in shapes else None,
        "self_attention": True if whole else [value is True for value in own],
    }


def unet_section(sizes: Mapping[str, Any], heads: Mapping[str, int]) -> Section:
    """Config of the U-Net of these sizes."""
    usual = {"pooled_dim": None, "num_classes": None, "self_attention": True}
    said = {name: value for name, value in sizes.items() if name not in usual or value != usual[name]}
    return {"_target_": UNET, **said, **heads}


def _shape(shapes: Shapes, name: str, where: str) -> tuple[int, ...]:
    if name not in shapes:
        raise InputError(where, f"lacks {name}", "is the file whole?")
    return shapes[name]


def _depth(shapes: Shapes, transformer: str) -> int:
    return len(list(_run(shapes, f"{transformer}.transformer_blocks.{{}}.attn1.to_q.weight")))


def _reads(shapes: Shapes, transformer: str, width: int, contexts: set[int], where: str) -> bool:
    """Does the first attention look at the features themselves? Adds the width of the context to `contexts`.

    A context as wide as the features leaves it open: then yes, as in all published models.
    """
    block = f"{transformer}.transformer_blocks.0"
    first = _shape(shapes, f"{block}.attn1.to_k.weight", where)[1]
    if f"{block}.attn2.to_k.weight" in shapes:
        contexts.add(shapes[f"{block}.attn2.to_k.weight"][1])
    if first != width:
        contexts.add(first)
    return first == width


def autoencoder_section(shapes: Shapes, where: str) -> Section:
    """Config of the autoencoder, but for its latent scale. Raises InputError."""
    names = AUTOENCODER_NAMES[layout_of(shapes, where, "autoencoder")]
    first, last = _shape(shapes, names.first, where), _shape(shapes, names.last, where)
    latents, moments = (
        _shape(shapes, "decoder.conv_in.weight", where)[1],
        _shape(shapes, "encoder.conv_out.weight", where)[0],
    )
    codes = shapes.get("quantize.embedding.weight")
    levels = [level for level in names.resnets(shapes) if level]
    if not levels:
        raise InputError(where, "its autoencoder has no levels", "is the file whole?")
    widths, attention = [], []
    for i, level in enumerate(levels):
        widths.append(shapes[f"{level[-1][0]}.{names.width}"][0])
        found = {_is_module(shapes, module) for _, module in level}
        if len(found) > 1 or len(level) != len(levels[0]):
            raise InputError(
                where, f"level {i} of its autoencoder is unlike the others", "this house has no such network"
            )
        attention.append(found.pop())
    inner = shapes.get("post_quant_conv.weight", (latents, latents))[1]
    if inner != latents or (codes and codes[1] != latents) or moments != latents * (1 if codes else 2):
        what = f"its autoencoder has {moments} moments, {inner} embedded and {latents} latent channels"
        raise InputError(where, what, "this house has 2 moments a channel (KL) or 1 and a codebook (VQ)")
    section: Section = {
        "_target_": VQ if codes else KL,
        "in_channels": first[1],
        "out_channels": last[0],
        "latent_channels": latents,
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "mid_attention": _is_module(shapes, names.middle),
        "attention_levels": attention,
        "use_quant_conv": "quant_conv.weight" in shapes,
    }
    if codes:
        section["quantizer"] = {
            "_target_": "ldm.autoencoder.vq.VectorQuantizer",
            "_partial_": True,
            "num_codes": codes[0],
        }
    return section


def _is_module(shapes: Shapes, module: str) -> bool:
    return any(f"{module}.{norm}.weight" in shapes for norm in ("norm", "group_norm"))


TOWER_NAMES = {  # tokens, positions, a layer's feed-forward, projection [out width] or [width out]
    "transformers": (
        "embeddings.token_embedding.weight",
        "embeddings.position_embedding.weight",
        "encoder.layers.{}.mlp.fc1.weight",
        "text_projection.weight",
    ),
    "open_clip": (
        "token_embedding.weight",
        "positional_embedding",
        "transformer.resblocks.{}.mlp.c_fc.weight",
        "text_projection",
    ),
}


def tower_of(shapes: Shapes, layout: str, where: str, heads: int | None = None) -> Tower:
    """A text tower's sizes; transformers' names are those below `text_model.`, and text_projection.weight."""
    tokens, positions, layer, projection = TOWER_NAMES[layout]
    vocabulary, width = _shape(shapes, tokens, where)
    layers = len(list(_run(shapes, layer)))
    if not layers:
        raise InputError(where, "its text tower has no layers", "is the file whole?")
    hidden = shapes[layer.format(0)][0]
    if hidden != CLIP_MLP * width:
        raise InputError(
            where, f"the layers of its text tower go from {width} to {hidden}, not to {CLIP_MLP} times that"
        )
    projected = shapes.get(projection)
    out = None if projected is None else projected[1 if layout == "open_clip" else 0]
    length = _shape(shapes, positions, where)[0]
    return Tower(width, layers, vocabulary, length, out, heads)


# ---- averages, whose names have lost their dots --------------------------------------------------------

WORDS = re.compile(
    r"(?:in|out)put_blocks|middle_block|time_embed|label_emb|in_layers|out_layers|emb_layers|skip_connection"
    r"|transformer_blocks|attn[12]|to_[qkv]|to_out|ff|net|proj_in|proj_out|proj|norm[123]|norm|op|conv|out|qkv"
    r"|weight|bias|\d+"
)


def dotted(name: str) -> str:
    """`input_blocks10in_layers0weight` -> `input_blocks.1.0.in_layers.0.weight`; another name as it is.

    The second number of a block is always of one digit, and no other two numbers stand side by side but in
    label_emb.0.0.
    """
    words: Sequence[str] = WORDS.findall(name)
    if "".join(words) != name:
        return name
    parts: list[str] = []
    for before, word in zip(("", *words), words, strict=False):
        pair = word.isdigit() and len(word) > 1 and before in ("input_blocks", "output_blocks", "label_emb")
        parts += [word[:-1], word[-1]] if pair else [word]
    return ".".join(parts)
