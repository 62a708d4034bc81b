"""What a single file holds: where the networks are in it, and whether it is a file for this house at all."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ldm.checkpoints.foreign.names import is_extra
from ldm.checkpoints.foreign.shapes import Shapes, layout_of
from ldm.errors import InputError

# What stands before the names of a network; without anything it is alone in its file.
UNET_HOMES = ("model.diffusion_model.", "diffusion_model.", "unet.", "")
AUTOENCODER_HOMES = ("first_stage_model.", "vae.", "")
UNET_FIRST = ("input_blocks.0.0.weight", "conv_in.weight")
AUTOENCODER_FIRST = ("encoder.conv_in.weight", "decoder.conv_in.weight")
AVERAGES = "model_ema.diffusion_model"
CLASS_TOKEN = "cond_stage_model.embedding.weight"
TEXT_HOME = re.compile(r"((?:cond_stage_model|conditioner\.embedders\.\d+)\.(?:\w+\.)*?)")
TEXT_FIRST = {
    "transformers": re.compile(TEXT_HOME.pattern + r"(text_model\.)?embeddings\.token_embedding\.weight"),
    "open_clip": re.compile(TEXT_HOME.pattern + r"()(?<!embeddings\.)token_embedding\.weight"),
}
CODEBOOK_MEANS = re.compile(r"(.+\.)?quantize\.(embedding\.)?(cluster_size|embed_avg|embed_prob)")
MARKERS = ("v_pred", "ztsnr")  # empty tensors: how such a file says it

NO_NETWORK = "this house has no network for it"
REFUSED = tuple(  # (names, what a file is that has one, what to do)
    (re.compile(pattern), what, fix)
    for pattern, what, fix in (
        (
            r"lora_\w+|.+\.lora_(down|up|[AB])\b.*|.+\.(hada|lokr)_w.*|.+\.lora\..+",
            "a LoRA, which changes a model and is none",
            "give the model",
        ),
        (
            r"(control_model|controlnet_\w+|input_hint_block|zero_convs)\..+",
            "a ControlNet, which steers a model and is none",
            "give the model",
        ),
        (
            r"string_to_param.*|emb_params|clip_[lg]",
            "a textual inversion, which is no model",
            "give the model",
        ),
        (
            r"(.+\.)?(exp_avg|exp_avg_sq|momentum_buffer)(\..+)?",
            "the state of an optimizer",
            "give the model",
        ),
        (
            r"(backbone|autoencoder|conditioner(?!\.embedders))\..+",
            "tensors of one of this house's own checkpoints",
            "give the folder that it lies in",
        ),
        (r"(.+\.)?joint_blocks\..+", "a Stable Diffusion 3 model", NO_NETWORK),
        (r"(.+\.)?(double|single)_blocks\..+", "a Flux model", NO_NETWORK),
        (
            r"(.+\.)?(time_stack|time_mixer|motion_modules|temporal_transformer)\b.*",
            "a video model",
            NO_NETWORK,
        ),
        (r"(noise_augmentor|embedder)\..+", "an unCLIP model", NO_NETWORK),
        (
            r"cond_stage_model\.transformer\.(token_emb|attn_layers)\..+",
            "latent diffusion conditioned on BERT",
            NO_NETWORK,
        ),
        (
            r"(.+\.)?(input|output|middle)_blocks?\..+\.qkv\.weight",
            "latent diffusion without cross-attention (AttentionBlock)",
            NO_NETWORK,
        ),
    )
)
REFUSED_SIZES = (  # (sizes of the U-Net, what it is)
    ({"context_dim": 1280, "pooled_dim": 2560}, "the refiner of Stable Diffusion XL"),
    ({"context_dim": 1024, "pooled_dim": 2048}, "an unCLIP model"),
    ({"context_dim": 1024, "pooled_dim": 1536}, "an unCLIP model"),
)


@dataclass(frozen=True)
class Home:
    """Where a network is: what stands before its names, and whose names they are."""

    prefix: str
    layout: str

    def shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Those of the network, without the prefix."""
        n = len(self.prefix)
        return {name[n:]: shape for name, shape in shapes.items() if name.startswith(self.prefix)}


UNET_HOME = Home("model.diffusion_model.", "original")  # of averages, too, when their names have dots again


@dataclass(frozen=True)
class Contents:
    """The networks of a file; None or empty where it has none.

    towers  in the order of their names
    """

    unet: Home | None
    autoencoder: Home | None
    towers: tuple[Home, ...]
    class_token: bool


def contents(shapes: Shapes, where: str) -> Contents:
    """What a file with tensors of these names and shapes holds. Raises InputError for what is not for us."""
    for name in shapes:
        for pattern, what, fix in REFUSED:
            if pattern.fullmatch(name):
                raise InputError(where, f"holds {what} ({name})", fix)
    unet = _home(shapes, UNET_HOMES, UNET_FIRST, where, "U-Net")
    autoencoder = _home(shapes, AUTOENCODER_HOMES, AUTOENCODER_FIRST, where, "autoencoder")
    if unet is None and autoencoder is None:
        first = next(iter(shapes), "")
        what = f"has neither a U-Net nor an autoencoder; it has {len(shapes)} tensors" + (
            f" ({first}, ...)" if first else ""
        )
        raise InputError(where, what, "give a file of a Stable Diffusion model")
    return Contents(unet, autoencoder, tuple(_towers(shapes)), CLASS_TOKEN in shapes)


def _home(shapes: Shapes, homes: Iterable[str], first: Iterable[str], where: str, what: str) -> Home | None:
    found = [prefix for prefix in homes if any(prefix + name in shapes for name in first)]
    if len(found) > 1:
        names = " and ".join(prefix or "(no prefix)" for prefix in found)
        raise InputError(where, f"holds more than one {what}: under {names}", "keep one of them")
    if not found:
        return None
    return Home(found[0], layout_of(Home(found[0], "").shapes(shapes), where, what))


def _towers(shapes: Shapes) -> list[Home]:
    found = [
        Home(match[1], layout)
        for layout, pattern in TEXT_FIRST.items()
        for name in shapes
        if (match := pattern.fullmatch(name))
    ]
    return sorted(found, key=lambda home: home.prefix)


def is_known(name: str) -> bool:
    """May a tensor of this name be there and be left out?"""
    return is_extra(name) or name in MARKERS or CODEBOOK_MEANS.fullmatch(name) is not None
