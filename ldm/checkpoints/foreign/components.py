"""Config sections of the networks here, and config.json of diffusers' and transformers' models: both ways.

The way out reads a built network (on the meta device), so that a section's own defaults are in it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ldm.checkpoints.foreign.documents import refuse_others
from ldm.errors import InputError

if TYPE_CHECKING:
    from torch import nn

Section = dict[str, Any]
UNET, KL = "ldm.backbones.unet.CrossAttentionUNet", "ldm.autoencoder.kl.AutoencoderKL"
VQ, TOWER = "ldm.autoencoder.vq.AutoencoderVQ", "ldm.conditioning.frozen.FrozenOpenCLIP"

# Options of UNet2DConditionModel that are not choices here; those at the end change nothing by themselves.
UNET_SAME = {
    "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1,
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"), "mid_block_scale_factor": 1,
    "act_fn": ("silu", "swish"), "norm_eps": 1e-5, "dual_cross_attention": False, "class_embed_type": None,
    "encoder_hid_dim": None, "encoder_hid_dim_type": None, "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional",
    "time_embedding_dim": None, "time_embedding_act_fn": None, "timestep_post_act": None,
    "time_cond_proj_dim": None, "conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default",
    "class_embeddings_concat": False, "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": None, "reverse_transformer_layers_per_block": None, "num_attention_heads": None,
    "addition_embed_type": (None, "text_time"),
}  # fmt: skip
AUTOENCODER_SAME = {
    "act_fn": ("silu", "swish"),
    "norm_type": "group",
    "lookup_from_codebook": False,
    "vq_embed_dim": None,
}
TEXT_SAME = {"hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": 1e-5}
VOCABULARY = 49408  # tokens of CLIP
PUBLISHED = {  # width, layers, heads, quick_gelu, width of the projection: open_clip's name
    (768, 12, 12, True, 768): "ViT-L-14-quickgelu",
    (1024, 24, 16, False, 1024): "ViT-H-14",
    (1280, 32, 20, False, 1280): "ViT-bigG-14",
}


# ---- the U-Net -----------------------------------------------------------------------------------------


def unet_section(found: Mapping[str, Any], where: str) -> Section:
    """Section of a U-Net. Raises InputError for what changes the computation and is not there here."""
    refuse_others(found, UNET_SAME, where)
    channels = list(found.get("block_out_channels", (320, 640, 1280, 1280)))
    crossed = _attention(
        found, ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D"), where
    )
    depths = _levels(
        "transformer_layers_per_block", found.get("transformer_layers_per_block", 1), channels, where
    )
    alone = found.get("only_cross_attention", False)
    if alone is True:
        refuse_others({"only_cross_attention": True}, {"only_cross_attention": False}, where)
    context = found.get("cross_attention_dim", 1280)
    if isinstance(context, (list, tuple)):
        refuse_others(
            {"cross_attention_dim": list(context)},
            {"cross_attention_dim": [context[0]] * len(channels)},
            where,
        )
        context = context[0]
    heads = found.get("attention_head_dim", 8)  # theirs means the number, whatever its name
    _levels("attention_head_dim", heads, channels, where)
    return {
        "_target_": UNET,
        "in_channels": found.get("in_channels", 4),
        "out_channels": found.get("out_channels", 4),
        "block_out_channels": channels,
        "layers_per_block": found.get("layers_per_block", 2),
        "transformer_depth": [depth if there else 0 for depth, there in zip(depths, crossed, strict=True)],
        "mid_depth": depths[-1]
        if found.get("mid_block_type", "UNetMidBlock2DCrossAttn").endswith("CrossAttn")
        else 0,
        "self_attention": [not only for only in alone] if isinstance(alone, list) and any(alone) else True,
        "num_heads": heads if isinstance(heads, int) else list(heads),
        "context_dim": context,
        "linear_projection": found.get("use_linear_projection", False),
        "pooled_dim": found.get("projection_class_embeddings_input_dim")
        if found.get("addition_embed_type")
        else None,
        "num_classes": found.get("num_class_embeds"),
        "norm_groups": found.get("norm_num_groups", 32),
        "dropout": found.get("dropout", 0.0),
    }


def unet_config(network: Any, section: Mapping[str, Any], sizes_width: int | None) -> dict[str, Any]:
    """config.json of a built U-Net; `sizes_width` that of each size of the pooled embedding."""
    options = _options(network, section)
    channels = list(options["block_out_channels"])
    depths = [
        len(level.attentions[0].transformer_blocks) if len(level.attentions) else 0
        for level in network.down_blocks
    ]
    crossed = [bool(depth) for depth in depths]
    middle = network.mid_block.attentions
    mid_depth = len(middle[0].transformer_blocks) if len(middle) else 0
    if mid_depth and depths[-1] not in (0, mid_depth):
        what = f"mid_depth={mid_depth} differs from the deepest level's {depths[-1]}"
        raise InputError("backbone", what, "diffusers has one number for both")
    heads = options["num_heads"]
    if heads is None:
        split = options["head_dim"]
        split = [split] * len(channels) if isinstance(split, int) else split
        heads = [max(width // one, 1) for width, one in zip(channels, split, strict=True)]
    looks = options.get("self_attention", True)
    looks = [looks] * len(channels) if isinstance(looks, bool) else list(looks)
    layers = [depth or 1 for depth in depths[:-1]] + [mid_depth or depths[-1] or 1]
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": network.in_channels,
        "out_channels": network.out_channels,
        "block_out_channels": channels,
        "layers_per_block": options["layers_per_block"],
        "down_block_types": [("CrossAttn" if there else "") + "DownBlock2D" for there in crossed],
        "up_block_types": [("CrossAttn" if there else "") + "UpBlock2D" for there in reversed(crossed)],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if mid_depth else "UNetMidBlock2D",
        "only_cross_attention": False if all(looks) else [not look for look in looks],
        "transformer_layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "attention_head_dim": heads if isinstance(heads, int) else list(heads),
        "cross_attention_dim": options["context_dim"],
        "use_linear_projection": options["linear_projection"],
        "addition_embed_type": "text_time" if network.pooled_dim else None,
        "addition_time_embed_dim": sizes_width if network.pooled_dim else None,
        "projection_class_embeddings_input_dim": network.pooled_dim,
        "num_class_embeds": network.num_classes,
        "norm_num_groups": options["norm_groups"],
        "dropout": options["dropout"],
        "act_fn": "silu",
        "norm_eps": 1e-05,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }


# ---- the autoencoders ----------------------------------------------------------------------------------


def autoencoder_section(found: Mapping[str, Any], where: str) -> Section:
    """Section of AutoencoderKL or VQModel. Raises InputError for what is not there here."""
    channels = list(found.get("block_out_channels", (64,)))
    latents = found.get("latent_channels", 4 if found["_class_name"] == "AutoencoderKL" else 3)
    refuse_others(found, AUTOENCODER_SAME | {"vq_embed_dim": (None, latents)}, where)
    convs = found.get("use_quant_conv", True)
    refuse_others(found, {"use_post_quant_conv": convs}, where)
    attention = _attention(
        found,
        ("AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        where,
    )
    shift, scale = _statistics(found, where)
    section = {
        "_target_": KL,
        "in_channels": found.get("in_channels", 3),
        "out_channels": found.get("out_channels", 3),
        "latent_channels": latents,
        "block_out_channels": channels,
        "layers_per_block": found.get("layers_per_block", 1),
        "norm_groups": found.get("norm_num_groups", 32),
        "mid_attention": found.get("mid_block_add_attention", True),
        "attention_levels": attention if any(attention) else None,
        "use_quant_conv": convs,
        "latent_shift": shift,
        "latent_scale": scale,
    }
    if found["_class_name"] == "VQModel":
        quantizer = {"_target_": "ldm.autoencoder.vq.VectorQuantizer", "_partial_": True}
        section |= {
            "_target_": VQ,
            "quantizer": quantizer | {"num_codes": found.get("num_vq_embeddings", 256)},
        }
    return section


def _statistics(found: Mapping[str, Any], where: str) -> tuple[float | list[float], float | list[float]]:
    """Latent shift and scale."""
    numbers = {name: found.get(name) for name in ("scaling_factor", "latents_std", "latents_mean")}
    for name, value in (numbers | {"shift_factor": found.get("shift_factor")}).items():
        positive = name in ("scaling_factor", "latents_std")
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(one, int | float) or not math.isfinite(one) or (positive and one <= 0):
                what = f"{name}={value!r} is no number{' above 0' if positive else ''}"
                raise InputError(where, what, "latents are (z - shift) * scale")
    scale = numbers["scaling_factor"]
    scale = 0.18215 if scale is None else float(scale)
    mean, std = numbers["latents_mean"], numbers["latents_std"]
    if mean is not None and std is not None:
        return [float(m) for m in mean], [scale / float(s) for s in std]
    return float(found.get("shift_factor") or 0.0), scale


def autoencoder_config(network: Any, section: Mapping[str, Any], scaling_factor: float) -> dict[str, Any]:
    """config.json of a built autoencoder whose latents are z * scaling_factor."""
    options = _options(network, section)
    if section["_target_"] not in (KL, VQ):
        kind = str(section["_target_"]).rpartition(".")[2]
        raise InputError("autoencoder", f"diffusers has no {kind}", "train an AutoencoderKL for it")
    channels = list(options["block_out_channels"])
    levels = options["attention_levels"] or [False] * len(channels)
    is_vq = section["_target_"] == VQ
    config = {
        "_class_name": "VQModel" if is_vq else "AutoencoderKL",
        "in_channels": network.in_channels,
        "out_channels": network.out_channels,
        "latent_channels": network.latent_channels,
        "block_out_channels": channels,
        "layers_per_block": options["layers_per_block"],
        "down_block_types": [("Attn" if there else "") + "DownEncoderBlock2D" for there in levels],
        "up_block_types": [("Attn" if there else "") + "UpDecoderBlock2D" for there in reversed(levels)],
        "norm_num_groups": options["norm_groups"],
        "mid_block_add_attention": options["mid_attention"],
        "act_fn": "silu",
        "scaling_factor": scaling_factor,
    }
    if is_vq:
        return config | {
            "num_vq_embeddings": network.quantize.num_codes,
            "vq_embed_dim": network.latent_channels,
        }
    convs = network.quant_conv is not None
    return config | {"use_quant_conv": convs, "use_post_quant_conv": convs}


# ---- text towers ---------------------------------------------------------------------------------------


def text_section(found: Mapping[str, Any], where: str, projected: bool) -> Section:
    """Section of CLIPTextModel, or `projected` CLIPTextModelWithProjection, but for how it is read."""
    text = found.get("text_config") or found
    refuse_others(text, TEXT_SAME | {"intermediate_size": 4 * text.get("hidden_size", 512)}, where)
    width, layers, heads = (
        text.get(name, usual)
        for name, usual in (("hidden_size", 512), ("num_hidden_layers", 12), ("num_attention_heads", 8))
    )
    if heads < 1 or width % heads:
        raise InputError(where, f"num_attention_heads={heads} do not divide hidden_size={width}")
    quick = text.get("hidden_act", "quick_gelu") == "quick_gelu"
    tokens, length = text.get("vocab_size", VOCABULARY), text.get("max_position_embeddings", 77)
    if tokens < VOCABULARY:
        raise InputError(where, f"vocab_size={tokens}, but CLIP's vocabulary has {VOCABULARY} tokens")
    embed_dim = text.get("projection_dim", width) if projected else width
    model: str | Section | None = PUBLISHED.get((width, layers, heads, quick, embed_dim))
    if model is None or (tokens, length) != (VOCABULARY, 77):
        sizes = {"width": width, "layers": layers, "heads": heads, "embed_dim": embed_dim}
        model = sizes | {"quick_gelu": quick, "vocab_size": tokens, "context_length": length}
    return {"_target_": TOWER, "model": model, "pretrained": None, "pooled": projected, "context_dim": width}


def text_config(tower: Any, layers: int, padding: int) -> dict[str, Any]:
    """config.json of the first `layers` blocks of a built tower; `padding` the token that fills up."""
    text = tower.text
    tokens, width = text.token_embedding.weight.shape
    block = text.transformer.resblocks[0]
    if block.mlp.c_fc.out_features != 4 * width:
        raise InputError(
            "conditioner", f"the text tower's mlp_ratio {block.mlp.c_fc.out_features / width:g} is not 4"
        )
    quick = type(block.mlp.gelu).__name__ == "QuickGELU"
    projected = tower.pooled_dim is not None
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": block.attn.num_heads,
        "max_position_embeddings": len(text.positional_embedding),
        "projection_dim": tower.pooled_dim or width,
        "hidden_act": "quick_gelu" if quick else "gelu",
        "layer_norm_eps": 1e-05,
        "vocab_size": tokens,
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": VOCABULARY - 1,
        "pad_token_id": padding,
    }


# ---- both sides ----------------------------------------------------------------------------------------


def _levels(name: str, value: int | Sequence[int], channels: Sequence[int], where: str) -> list[int]:
    """One number a level."""
    values = [value] * len(channels) if isinstance(value, int) else list(value)
    if len(values) != len(channels) or not all(isinstance(one, int) and one > 0 for one in values):
        raise InputError(
            where, f"{name}={value} is not one number above 0, or one for each of {len(channels)} levels"
        )
    return values


def _attention(
    found: Mapping[str, Any], down: tuple[str, str], up: tuple[str, str], where: str
) -> list[bool]:
    """Levels that have attention, by the names of the blocks (those with it come first); up mirrors down."""
    levels = len(found.get("block_out_channels", ()))
    usual = {4: [down[0]] * 3 + [down[1]]}.get(levels, []) if down[1] == "DownBlock2D" else [down[1]] * levels
    names = list(found.get("down_block_types", usual))
    for name in names:
        refuse_others({"down_block_types": name}, {"down_block_types": down}, where)
    there = [name == down[0] for name in names]
    mirrored = [up[0] if one else up[1] for one in reversed(there)]
    refuse_others(found, {"up_block_types": mirrored}, where)
    if len(names) != levels:
        raise InputError(where, f"{len(names)} down_block_types for {levels} block_out_channels")
    return there


def _options(network: nn.Module, section: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a network: those of its section, and the defaults of its class."""
    options: dict[str, Any] = {}
    kinds = [kind for kind in reversed(type(network).__mro__) if "__init__" in vars(kind)]
    for kind in kinds:
        parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
        options |= {p.name: p.default for p in parameters if p.default is not p.empty}
    return options | dict(section)
