"""Small random single files of each family, and the same networks of diffusers and transformers as oracles.

Their weights come from the same tensors through diffusers' own converters: no name of ours plays a part.
"""

from __future__ import annotations

import re

import diffusers
import torch
import transformers
from diffusers.loaders import single_file_utils as theirs
from torch import Tensor

from ldm.checkpoints.model import Asked
from ldm.diffusion.noise_scheduler import VariancePreserving

HEADS = 4  # of all networks here
PREDICTIONS = {"sd2": "v_prediction", "upscaler": "v_prediction"}
CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"
SD1_PEER = {"cross_attention_dim": 32}
SD2_PEER = {"cross_attention_dim": 48, "use_linear_projection": True}
SDXL_PEER = {
    "levels": "oxx",
    "block_out_channels": (32, 64, 128),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 96,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 144,
}
UNETS: dict[str, dict] = {
    "sd1": SD1_PEER,
    "sd1_inpaint": SD1_PEER | {"in_channels": 9},
    "sd2": SD2_PEER,
    "sd2_inpaint": SD2_PEER | {"in_channels": 9},
    "sd2_depth": SD2_PEER | {"in_channels": 5},
    "sdxl": SDXL_PEER,
    "sdxl_inpaint": SDXL_PEER | {"in_channels": 9},
    "upscaler": SD2_PEER
    | {
        "levels": "oxxx",
        "block_out_channels": (32, 64, 64, 128),
        "only_cross_attention": (True, True, True, False),
        "num_class_embeds": 1000,
        "in_channels": 7,
    },
    "ldm_class": SD1_PEER
    | {"levels": "oxxx", "block_out_channels": (32, 64, 96, 160), "in_channels": 3, "out_channels": 3},
}
AUTOENCODERS: dict[str, dict] = {
    "kl_f4": {"channels": (32, 64, 128), "latent_channels": 3},
    "kl_f4_4": {"channels": (32, 64, 128), "latent_channels": 4},
    "kl_f8": {"channels": (32, 64, 128, 128), "latent_channels": 4},
    "kl_f16": {"channels": (32, 32, 64, 64, 128), "latent_channels": 16, "attention": (4,)},
    "vq_f4": {"channels": (32, 64, 128), "latent_channels": 3, "codes": 64},
    "vq_f8": {"channels": (32, 64, 64, 128), "latent_channels": 4, "attention": (3,), "codes": 64},
}
FIRST_STAGES = {"upscaler": "kl_f4_4", "ldm_class": "vq_f4"}  # the others: kl_f8


def asked(family: str, **more) -> Asked:
    """All that small files of it leave open."""
    told = {"prediction_type": PREDICTIONS.get(family, "epsilon"), "num_heads": HEADS, "latent_scale": 0.5}
    return Asked(**told | {"text_heads": HEADS} | more)


def schedule(start: float = 0.00085, end: float = 0.012, name: str = "scaled_linear") -> dict[str, Tensor]:
    """The buffers of a table, by CompVis' formula."""
    grid = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
    if name == "linear":
        grid = torch.linspace(start, end, 1000, dtype=torch.float64)
    return {"betas": grid.float(), "alphas_cumprod": torch.cumprod(1 - grid, 0).float()}


def zero_terminal() -> dict[str, Tensor]:
    process = VariancePreserving(zero_terminal_snr=True, prediction_type="v_prediction")
    alpha_bar = process.alpha(torch.arange(1000, dtype=torch.float64)) ** 2
    return {"alphas_cumprod": alpha_bar.float()}


def redrawn(shapes: dict, seed: int = 0) -> dict[str, Tensor]:
    """N(0, 0.05^2), but for what is counted."""
    generator = torch.Generator().manual_seed(seed)
    values = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    ids = {name: torch.arange(77)[None] for name in shapes if name.endswith("position_ids")}
    return values | ids


def unet_peer(family: str, tensors: dict[str, Tensor]) -> torch.nn.Module:
    options = {"levels": "xxxo", "block_out_channels": (32, 64, 128, 128)} | UNETS[family]
    names = [CROSS if level == "x" else PLAIN for level in options.pop("levels")]
    network = diffusers.UNet2DConditionModel(
        down_block_types=tuple(name.format("Down") for name in names),
        up_block_types=tuple(name.format("Up") for name in reversed(names)),
        attention_head_dim=HEADS,  # their name for the number of heads
        **options,
    )
    network.load_state_dict(theirs.convert_ldm_unet_checkpoint(tensors, network.config))
    return network.eval()


def autoencoder_peer(name: str, tensors: dict[str, Tensor]) -> torch.nn.Module:
    """From tensors without a prefix; their converter leaves out attention in levels, and codebooks."""
    options = dict(AUTOENCODERS[name])
    channels, attention = options.pop("channels"), options.pop("attention", ())
    codes, levels = options.pop("codes", None), range(len(channels))
    down = [f"{'Attn' if i in attention else ''}DownEncoderBlock2D" for i in levels]
    up = [f"{'Attn' if i in attention else ''}UpDecoderBlock2D" for i in reversed(levels)]
    shared = {"block_out_channels": channels, "down_block_types": tuple(down), "up_block_types": tuple(up)}
    if codes:
        network = diffusers.VQModel(num_vq_embeddings=codes, layers_per_block=2, **shared, **options)
    else:
        network = diffusers.AutoencoderKL(layers_per_block=2, **shared, **options)
    found = theirs.convert_ldm_vae_checkpoint(tensors, network.config)
    found = {name: value for name, value in found.items() if ".attn." not in name}
    parts = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}
    for tensor, value in tensors.items():
        if match := re.fullmatch(r"(\w+)\.(down|up)\.(\d)\.attn\.(\d)\.(\w+)\.(\w+)", tensor):
            coder, side, level, layer, part, leaf = match.groups()
            index = int(level) if side == "down" else len(channels) - 1 - int(level)
            module = f"{coder}.{side}_blocks.{index}.attentions.{layer}.{parts[part]}"
            found[f"{module}.{leaf}"] = value.flatten(1) if value.ndim == 4 else value
    if codes:
        found["quantize.embedding.weight"] = tensors["quantize.embedding.weight"]
    network.load_state_dict(found)
    return network.eval()


def tower_peer(tensors: dict[str, Tensor], width: int, layers: int, projection: int, quick: bool):
    """A CLIPTextModelWithProjection with the tensors given under transformers' or open_clip's own names."""
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        projection_dim=projection,
        hidden_act="quick_gelu" if quick else "gelu",
        eos_token_id=49407,
    )
    network = transformers.CLIPTextModelWithProjection(config)
    if "positional_embedding" in tensors:
        tensors = theirs.convert_open_clip_checkpoint(network, tensors, prefix="")
    tensors = {name: value for name, value in tensors.items() if not name.endswith("position_ids")}
    missing = network.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"text_projection.weight"}
    return network.eval()


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def relative(ours: Tensor, other: Tensor) -> float:
    assert ours.shape == other.shape
    assert other.std() > 1e-3
    return float(((ours - other).abs().max() / other.abs().max()).detach())
