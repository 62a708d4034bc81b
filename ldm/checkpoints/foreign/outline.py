"""Names and shapes of a network that is not made: of what its config section describes.

The networks that other formats have are listed here, because `ldm info` is to answer at once: to build them
takes torch, and open_clip for text towers, which take seconds to import. Any other is built on the meta
device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ldm.checkpoints.foreign.families import PUBLISHED_TOWERS
from ldm.errors import InputError

FROZEN = "ldm.conditioning.frozen.FrozenOpenCLIP"
UNET, KL = "ldm.backbones.unet.CrossAttentionUNet", "ldm.autoencoder.kl.AutoencoderKL"
VQ, CODEBOOK = "ldm.autoencoder.vq.AutoencoderVQ", "ldm.autoencoder.vq.VectorQuantizer"
TOKEN = "ldm.conditioning.label.ClassToken"
SILENT = ("combined.Sizes", "spatial.Inpainting", "spatial.Depth", "spatial.Upscaling")  # have no tensors
PUBLISHED = {
    name: {
        "width": width,
        "layers": layers,
        "vocab_size": vocab,
        "context_length": length,
        "embed_dim": embed,
    }
    for (width, layers, vocab, length, _), (name, embed) in PUBLISHED_TOWERS.items()
}

Shapes = dict[str, tuple[int, ...]]


def outline(section: Mapping[str, Any]) -> Shapes:
    """Names and shapes of the state dict, in its order; takes no memory."""
    if "parts" in section:
        outlines = {name: outline(part) for name, part in section["parts"].items()}
        return {f"parts.{name}.{key}": shape for name, own in outlines.items() for key, shape in own.items()}
    model = section.get("model")
    sizes = PUBLISHED.get(model) if isinstance(model, str) else model
    if section["_target_"] == FROZEN and sizes is not None:
        return _tower(section, sizes)
    quantizer = section.get("quantizer", {}).get("_target_", CODEBOOK)
    if section["_target_"] in LISTED and quantizer == CODEBOOK:
        try:
            return LISTED[section["_target_"]](section)
        except (TypeError, ValueError, IndexError) as error:  # as `build` says what a constructor refuses
            raise InputError(str(section["_target_"]), " ".join(str(error).split())) from None
    import torch

    from ldm.config import build

    with torch.device("meta"):
        network = build(section)
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def _tower(section: Mapping[str, Any], sizes: Mapping[str, Any]) -> Shapes:
    width = sizes["width"]
    hidden = int(width * sizes.get("mlp_ratio", 4.0))
    found: Shapes = {"positional_embedding": (section.get("context_length", 77), width)}
    if section.get("pooled", False):
        found["text_projection"] = (width, sizes["embed_dim"])
    found["token_embedding.weight"] = (sizes.get("vocab_size", 49408), width)
    for block in (f"transformer.resblocks.{i}" for i in range(sizes["layers"])):
        found |= _norm(f"{block}.ln_1", width)
        found |= {
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
        }
        found |= _linear(f"{block}.attn.out_proj", width, width)
        found |= _norm(f"{block}.ln_2", width)
        found |= _linear(f"{block}.mlp.c_fc", width, hidden) | _linear(f"{block}.mlp.c_proj", hidden, width)
    found |= _norm("ln_final", width)
    return {f"text.{name}": shape for name, shape in found.items()}


# ---- the U-Net and the autoencoders --------------------------------------------------------------------


def _unet(section: Mapping[str, Any]) -> Shapes:
    """Of CrossAttentionUNet, which see for the options; those without a default are in every section here."""
    channels = section["block_out_channels"]
    count, width, context = len(channels), 4 * channels[0], section["context_dim"]
    layers = _per_level("layers_per_block", section["layers_per_block"], count)
    depths = _per_level("transformer_depth", section["transformer_depth"], count)
    looks = _per_level("self_attention", section.get("self_attention", True), count)
    split = "head_dim" if section.get("num_heads") is None else "num_heads"
    heads, present = (
        _per_level(split, section[split], count),
        [*depths[:-1], depths[-1] or section["mid_depth"]],
    )
    _check(split, channels, [part if there else 1 for part, there in zip(heads, present, strict=True)])
    _check("norm_groups", channels, [section.get("norm_groups", 32)] * count)

    def transformer(name: str, c: int, depth: int, looks: bool) -> Shapes:
        ends = () if section.get("linear_projection", False) else (1, 1)
        found = _norm(f"{name}.norm", c) | _linear(f"{name}.proj_in", c, c, ends)
        for block in (f"{name}.transformer_blocks.{i}" for i in range(depth)):
            found |= _norm(f"{block}.norm1", c) | _attention(f"{block}.attn1", c, c if looks else context)
            if context:
                found |= _norm(f"{block}.norm2", c) | _attention(f"{block}.attn2", c, context)
            found |= _norm(f"{block}.norm3", c) | _linear(f"{block}.ff.net.0.proj", c, 8 * c)
            found |= _linear(f"{block}.ff.net.2", 4 * c, c)
        return found | _linear(f"{name}.proj_out", c, c, ends)

    def level(name: str, incoming: Sequence[int], i: int) -> Shapes:
        found: Shapes = {}
        for j, c in enumerate(incoming):
            found |= _resnet(f"{name}.resnets.{j}", c, channels[i], width)
        for j in range(len(incoming) if depths[i] else 0):
            found |= transformer(f"{name}.attentions.{j}", channels[i], depths[i], looks[i])
        return found

    found = _mlp("time_embedding", channels[0], width)
    if section.get("pooled_dim"):
        found |= _mlp("add_embedding", section["pooled_dim"], width)
    if section.get("num_classes"):
        found["class_embedding.weight"] = (section["num_classes"], width)
    found |= _linear("conv_in", section["in_channels"], channels[0], (3, 3))
    skips = [channels[0]]
    for i, c in enumerate(channels):
        found |= level(f"down_blocks.{i}", [skips[-1]] + [c] * (layers[i] - 1), i)
        skips += [c] * layers[i]
        if i < count - 1:
            found |= _linear(f"down_blocks.{i}.downsamplers.0.conv", c, c, (3, 3))
            skips.append(c)
    c = channels[-1]
    for i in range(2 if section["mid_depth"] else 1):
        found |= _resnet(f"mid_block.resnets.{i}", c, c, width)
    if section["mid_depth"]:
        found |= transformer("mid_block.attentions.0", c, section["mid_depth"], True)
    for j, i in enumerate(reversed(range(count))):
        arriving = [c] + [channels[i]] * layers[i]
        c = channels[i]
        found |= level(f"up_blocks.{j}", [one + skips.pop() for one in arriving], i)
        if i > 0:
            found |= _linear(f"up_blocks.{j}.upsamplers.0.conv", c, c, (3, 3))
    return found | _norm("conv_norm_out", c) | _linear("conv_out", c, section["out_channels"], (3, 3))


def _autoencoder(section: Mapping[str, Any]) -> Shapes:
    """Of AutoencoderKL, and of AutoencoderVQ with a codebook that is trained by gradients."""
    channels, c = section["block_out_channels"], section["latent_channels"]
    moments, layers = (2 if section["_target_"] == KL else 1) * c, section["layers_per_block"]
    attention = _per_level("attention_levels", section.get("attention_levels") or False, len(channels))
    _check("norm_groups", channels, [section.get("norm_groups", 32)] * len(channels))
    pixels = section.get("mid_attention", True)
    found: Shapes = {"latent_shift": (c,), "latent_scale": (c,)}
    found |= _coder("encoder", section.get("in_channels", 3), moments, channels, layers, attention, pixels)
    back = channels[::-1], layers + 1, attention[::-1], pixels
    found |= _coder("decoder", c, section.get("out_channels", 3), *back)
    if section.get("use_quant_conv", True):
        found |= _linear("quant_conv", moments, moments, (1, 1)) | _linear("post_quant_conv", c, c, (1, 1))
    if "quantizer" in section:
        found["quantize.embedding.weight"] = (section["quantizer"]["num_codes"], c)
    return found


def _coder(
    name: str, i: int, o: int, channels: Sequence[int], layers: int, attention: Sequence[bool], pixels: bool
) -> Shapes:
    """Encoder or decoder; the decoder's middle, which is computed first, is listed first there, too."""
    up = name == "decoder"
    levels: Shapes = {}
    c = channels[0]
    for k, width in enumerate(channels):
        level = f"{name}.{'up' if up else 'down'}_blocks.{k}"
        for j in range(layers):
            levels |= _resnet(f"{level}.resnets.{j}", width if j else c, width)
        c = width
        for j in range(layers if attention[k] else 0):
            levels |= _pixels(f"{level}.attentions.{j}", c)
        if k < len(channels) - 1:
            levels |= _linear(f"{level}.{'up' if up else 'down'}samplers.0.conv", c, c, (3, 3))
    m = channels[0] if up else c
    middle: Shapes = {}
    for j in range(2):
        middle |= _resnet(f"{name}.mid_block.resnets.{j}", m, m)
    if pixels:
        middle |= _pixels(f"{name}.mid_block.attentions.0", m)
    found = _linear(f"{name}.conv_in", i, channels[0], (3, 3))
    found |= middle | levels if up else levels | middle
    return found | _norm(f"{name}.conv_norm_out", c) | _linear(f"{name}.conv_out", c, o, (3, 3))


# ---- layers --------------------------------------------------------------------------------------------


def _per_level(name: str, value: Any, count: int) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries, block_out_channels has {count}")
    return values


def _check(name: str, channels: Sequence[int], parts: Sequence[int]) -> None:
    for width, part in zip(channels, parts, strict=True):
        if part < 1 or width % part:
            raise ValueError(f"block_out_channels {width} is not a multiple of {name} {part}")


def _resnet(name: str, i: int, o: int, told: int = 0) -> Shapes:
    found = _norm(f"{name}.norm1", i) | _linear(f"{name}.conv1", i, o, (3, 3))
    if told:
        found |= _linear(f"{name}.time_emb_proj", told, o)
    found |= _norm(f"{name}.norm2", o) | _linear(f"{name}.conv2", o, o, (3, 3))
    return found | (_linear(f"{name}.conv_shortcut", i, o, (1, 1)) if i != o else {})


def _attention(name: str, width: int, context: int) -> Shapes:
    found = {f"{name}.to_{part}.weight": (width, width if part == "q" else context) for part in "qkv"}
    return found | _linear(f"{name}.to_out.0", width, width)


def _pixels(name: str, width: int) -> Shapes:
    found: Shapes = {}
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        found |= _linear(f"{name}.{part}", width, width)
    return found | _norm(f"{name}.group_norm", width)


def _mlp(name: str, i: int, o: int) -> Shapes:
    return _linear(f"{name}.linear_1", i, o) | _linear(f"{name}.linear_2", o, o)


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, i: int, o: int, kernel: tuple[int, ...] = ()) -> Shapes:
    """A linear layer, or with a kernel a convolution."""
    return {f"{name}.weight": (o, i, *kernel), f"{name}.bias": (o,)}


LISTED: dict[str, Callable[[Mapping[str, Any]], Shapes]] = {
    UNET: _unet,
    KL: _autoencoder,
    VQ: _autoencoder,
    TOKEN: lambda section: {"embedding.weight": (section["num_classes"], section["context_dim"])},
    **{f"ldm.conditioning.{name}": lambda section: {} for name in SILENT},
}
