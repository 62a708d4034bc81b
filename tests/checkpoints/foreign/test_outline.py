"""What is listed without torch and open_clip is what they make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from ldm.checkpoints.foreign.families import FAMILIES
from ldm.checkpoints.foreign.outline import KL, LISTED, TOKEN, UNET, VQ, outline
from ldm.checkpoints.foreign.shapes import unet_section
from ldm.config import build
from ldm.errors import InputError

AUTOENCODERS = Path(__file__).parents[3] / "configs" / "autoencoder"

TOWER = {"_target_": "ldm.conditioning.frozen.FrozenOpenCLIP", "pretrained": None}
SMALL = {"width": 32, "layers": 3, "heads": 2, "embed_dim": 24}
PARTS = {
    "one": {**TOWER, "model": SMALL, "layer": 2},
    "two": {**TOWER, "model": SMALL | {"vocab_size": 99}, "pooled": True},
    "sizes": {"_target_": "ldm.conditioning.combined.Sizes", "width": 8},
}

COMBINED = "ldm.conditioning.combined.Combined"


@pytest.mark.parametrize(
    "section",
    [
        {**TOWER, "model": "ViT-L-14-quickgelu"},
        {**TOWER, "model": "ViT-H-14", "layer": "penultimate", "context_length": 32},
        {**TOWER, "model": "ViT-bigG-14", "pooled": True},
        {**TOWER, "model": "ViT-B-32"},  # not listed
        {**TOWER, "model": SMALL | {"mlp_ratio": 2.0, "context_length": 40}, "context_length": 20},
        {"_target_": COMBINED, "context_dim": 64, "pooled_dim": 72, "parts": PARTS},
        {"_target_": "ldm.conditioning.label.ClassToken", "num_classes": 11, "context_dim": 6},
    ],
)  # fmt: skip
def test_the_outline_is_that_of_the_network(section):
    same(section)


def same(section):
    with torch.device("meta"):
        state = build(section).state_dict()
    assert list(outline(section).items()) == [(name, tuple(value.shape)) for name, value in state.items()]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.slug)
def test_unets_of_the_families(family):
    same(unet_section(family.unet, family.heads))


TINY = {"_target_": UNET, "in_channels": 5, "out_channels": 3, "block_out_channels": [32, 64], "head_dim": 8}
TINY |= {"layers_per_block": 1, "transformer_depth": [0, 2], "mid_depth": 1, "context_dim": 24}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"layers_per_block": [1, 3], "head_dim": None, "num_heads": [5, 4]},
        {"mid_depth": 0, "linear_projection": True},
        {"transformer_depth": 0, "mid_depth": 0, "context_dim": None},
        {"context_dim": None},
        {"transformer_depth": [1, 0], "self_attention": [False, True], "pooled_dim": 10, "num_classes": 7},
        {"norm_groups": 8, "block_out_channels": [32, 40], "dropout": 0.1},
    ],
)
def test_other_unets(more):
    same(TINY | more)


PLAIN = {
    "_target_": KL,
    "in_channels": 3,
    "out_channels": 2,
    "latent_channels": 5,
    "block_out_channels": [32, 64],
}
PLAIN |= {"layers_per_block": 1}
CODES = {"_target_": "ldm.autoencoder.vq.VectorQuantizer", "_partial_": True, "num_codes": 9}
OURS = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(AUTOENCODERS.glob("*.yaml"))]


@pytest.mark.parametrize(
    "section",
    [
        *(section for section in OURS if section["_target_"] in LISTED),
        PLAIN,
        PLAIN | {"mid_attention": False, "use_quant_conv": False, "layers_per_block": 3},
        PLAIN | {"attention_levels": [True, False], "latent_scale": [1, 2, 3, 4, 5]},
        PLAIN | {"_target_": VQ, "quantizer": CODES, "attention_levels": [False, True]},
        PLAIN
        | {"_target_": VQ, "quantizer": CODES | {"_target_": CODES["_target_"].replace("Vec", "EMAVec")}},
    ],
)
def test_autoencoders(section):
    same(section)


@pytest.mark.parametrize(
    "section",
    [
        {"_target_": TOKEN, "num_classes": 5, "context_dim": 8},
        {"_target_": "ldm.conditioning.spatial.Inpainting"},
        {"_target_": "ldm.conditioning.spatial.Depth"},
        {
            "_target_": "ldm.conditioning.spatial.Upscaling",
            "noise_scheduler": {"_target_": "ldm.diffusion.noise_scheduler.VariancePreserving"},
            "max_noise_level": 350,
            "num_classes": 1000,
        },
    ],
)
def test_what_stands_beside_towers(section):
    same(section)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (TINY | {"head_dim": 7}, "block_out_channels 64 is not a multiple of head_dim 7"),
        (TINY | {"head_dim": None, "num_heads": 0}, "not a multiple of num_heads 0"),
        (TINY | {"norm_groups": 48}, "block_out_channels 32 is not a multiple of norm_groups 48"),
        (PLAIN | {"norm_groups": 48}, "block_out_channels 32 is not a multiple of norm_groups 48"),
        (TINY | {"layers_per_block": [1]}, "layers_per_block has 1 entries, block_out_channels has 2"),
        (PLAIN | {"attention_levels": [True]}, "attention_levels has 1 entries, block_out_channels has 2"),
        (PLAIN | {"block_out_channels": []}, "ldm.autoencoder.kl.AutoencoderKL: "),
        (TINY | {"block_out_channels": ["a", "b"]}, "ldm.backbones.unet.CrossAttentionUNet: "),
    ],
)
def test_what_no_network_can_be_is_one_line(section, message):
    with pytest.raises(InputError, match=message):
        outline(section)
