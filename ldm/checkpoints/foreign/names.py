"""Names of tensors here and elsewhere: CompVis and Stability single files, diffusers, transformers.

Native names of U-Nets and autoencoders are diffusers'; text towers have open_clip's. Rules are made from the
native names of a network alone: how many levels it has, and layers, and where attention is, is in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ldm.checkpoints.foreign.rules import Rule, given, taken, under
from ldm.errors import InputError

__all__ = [
    "Rule",
    "diffusers_autoencoder",
    "diffusers_unet",
    "ema_name",
    "given",
    "is_extra",
    "is_local",
    "open_clip_text",
    "original_autoencoder",
    "original_unet",
    "taken",
    "transformers_text",
    "under",
]

# Ends of native names that no other format has, so that there are no rules for them.
LOCAL = ("latent_shift", "latent_scale", "quantize.counts", "quantize.sums", "quantize.updates")

# Modules, ours to CompVis'.
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
CODER = {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"}
RESNET = {leaf: leaf for leaf in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
PIXELS = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
# Ours, which are diffusers', to those of its old folders.
OLD_PIXELS = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
# Ours, and open_clip's, to transformers'.
TEXT = {
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final": "final_layer_norm",
}
TEXT_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}

EXTRA = re.compile(
    r"""
    betas | (log_|sqrt_)? (one_minus_|recip_|recipm1_)? alphas_cumprod (_prev)?
    | posterior_ (variance|log_variance_clipped|mean_coef[12])
    | lvlb_weights | logvar | scale_factor | ddim_\w+ | denoiser\.sigmas
    | (first_stage_model\.)? (model_ema|loss) \..+
    | (low_scale_model|depth_model) \..+
    | (.+\.)? (position_ids|logit_scale|attn_mask)
    | cond_stage_model\. (.+\.)? text_projection (\.weight)?
    """,
    re.VERBOSE,
)


def is_local(name: str) -> bool:
    """Is it a native tensor that only this house has: told by the config, or started by the module?"""
    return name.endswith(LOCAL)


def is_extra(name: str) -> bool:
    """May a single file hold a tensor of this (full) name though no network here has it?

    Buffers of the noise schedule, averages (see `ema_name`), losses of an autoencoder, the networks that make
    depth maps or blur small pictures, position_ids, and the projection of a text tower that does without.
    """
    return EXTRA.fullmatch(name) is not None


def ema_name(name: str) -> str:
    """Where a single file keeps the average of a tensor whose own name in the file is `name`."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def original_unet(names: Iterable[str]) -> list[Rule]:
    """Rules for native names of a U-Net to those of CompVis (without model.diffusion_model.)."""
    modules, places, block = _Modules(names), dict(UNET), 1
    for level in modules.children("down_blocks"):
        for i, resnet in enumerate(modules.children(f"{level}.resnets")):
            places |= _leaves(resnet, f"input_blocks.{block}.0", UNET_RESNET)
            places[f"{level}.attentions.{i}"] = f"input_blocks.{block}.1"
            block += 1
        if f"{level}.downsamplers" in modules:
            places[f"{level}.downsamplers.0.conv"] = f"input_blocks.{block}.0.op"
            block += 1
    places["mid_block.attentions.0"] = "middle_block.1"
    for i in range(2):
        places |= _leaves(f"mid_block.resnets.{i}", f"middle_block.{2 * i}", UNET_RESNET)
    block = 0
    for level in modules.children("up_blocks"):
        for i, resnet in enumerate(modules.children(f"{level}.resnets")):
            places |= _leaves(resnet, f"output_blocks.{block}.0", UNET_RESNET)
            places[f"{level}.attentions.{i}"] = f"output_blocks.{block}.1"
            block += 1
        behind = 2 if f"{level}.attentions" in modules else 1
        places[f"{level}.upsamplers.0"] = f"output_blocks.{block - 1}.{behind}"
    return [Rule(name, (_renamed(name, places),)) for name in modules.names]


def original_autoencoder(names: Iterable[str]) -> list[Rule]:
    """Rules for native names of an autoencoder to those of CompVis (without first_stage_model.)."""
    modules = _Modules(names)
    places = {same: same for same in ("quant_conv", "post_quant_conv", "quantize.embedding")}
    for coder, side in (("encoder", "down"), ("decoder", "up")):
        places |= _leaves(coder, coder, CODER)
        levels = modules.children(f"{coder}.{side}_blocks")
        for i, level in enumerate(levels):  # there, the first is that of the picture's resolution
            there = f"{coder}.{side}.{i if side == 'down' else len(levels) - 1 - i}"
            places[f"{level}.{side}samplers.0"] = f"{there}.{side}sample"
            for j, resnet in enumerate(modules.children(f"{level}.resnets")):
                places |= _leaves(resnet, f"{there}.block.{j}", RESNET)
                places |= _leaves(f"{level}.attentions.{j}", f"{there}.attn.{j}", PIXELS)
        for i in range(2):
            places |= _leaves(f"{coder}.mid_block.resnets.{i}", f"{coder}.mid.block_{i + 1}", RESNET)
        places |= _leaves(f"{coder}.mid_block.attentions.0", f"{coder}.mid.attn_1", PIXELS)
    return [
        Rule(name, (_renamed(name, places),), "pointwise" if _projects_pixels(name) else "same")
        for name in modules.names
    ]


def diffusers_unet(names: Iterable[str]) -> list[Rule]:
    """Rules to diffusers' UNet2DConditionModel: the same names."""
    return [Rule(name, (name,)) for name in names]


def diffusers_autoencoder(names: Iterable[str]) -> list[Rule]:
    """Rules to diffusers' AutoencoderKL and VQModel: the same; old folders' attention is read, too."""
    rules = []
    for name in _Modules(names).names:
        older = name
        for leaf, old in OLD_PIXELS.items() if ".attentions." in name else ():
            older = older.replace(f".{leaf}.", f".{old}.")
        kind = "linear" if _projects_pixels(name) else "same"
        rules.append(Rule(name, (name,), kind, () if older == name else (older,)))
    return rules


def transformers_text(names: Iterable[str]) -> list[Rule]:
    """Rules for native names of a text tower, below `text.`, to CLIPTextModel(WithProjection)'s.

    Those of transformers up to 4; CLIPTextModel of 5 has no `text_model.` before them, which is read, too.
    """
    modules, places, rules = _Modules(names), dict(TEXT), []
    for i, block in enumerate(modules.children("transformer.resblocks")):
        places |= _leaves(block, f"encoder.layers.{i}", TEXT_BLOCK)
        for leaf in ("weight", "bias"):
            places[f"{block}.attn.in_proj_{leaf}"] = f"encoder.layers.{i}.self_attn.*_proj.{leaf}"
    for name in modules.names:
        if name == "text_projection":
            rules.append(Rule(name, ("text_projection.weight",), "transposed"))
            continue
        theirs = _renamed(name, places)
        bare = tuple(theirs.replace("*", part) for part in ("qkv" if "*" in theirs else "q"))
        rules.append(Rule(name, tuple(f"text_model.{part}" for part in bare), older=bare))
    return rules


def open_clip_text(names: Iterable[str]) -> list[Rule]:
    """Rules for native names of a text tower, below `text.`, to open_clip's: the same names."""
    return [Rule(name, (name,)) for name in names]


class _Modules:
    """The modules that names belong to."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = [name for name in names if not is_local(name)]
        paths = [name.split(".") for name in self.names]
        self.found = {".".join(path[:n]) for path in paths for n in range(1, len(path))}

    def __contains__(self, module: str) -> bool:
        return module in self.found

    def children(self, module: str) -> list[str]:
        """`module.0`, `module.1` and so on, as far as there are any."""
        children: list[str] = []
        while (child := f"{module}.{len(children)}") in self:
            children.append(child)
        return children


def _leaves(ours: str, theirs: str, leaves: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in leaves.items()}


def _renamed(name: str, places: Mapping[str, str]) -> str:
    """The name with its beginning, the longest that `places` knows, replaced."""
    path = name.split(".")
    for n in range(len(path), 0, -1):
        place = places.get(".".join(path[:n]))
        if place is not None:
            return ".".join([place, *path[n:]])
    raise InputError(name, "the other format has no such tensor", "keep the model in its own format")


def _projects_pixels(name: str) -> bool:
    """Is it a weight of an autoencoder's attention that the original has as a 1x1 convolution?"""
    return ".attentions." in name and name.endswith(".weight") and ".group_norm." not in name
