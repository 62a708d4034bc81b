"""Architectures from names and shapes: published sizes, both layouts, names without dots, what is refused."""

from __future__ import annotations

import pytest
import torch

from ldm.checkpoints.foreign.families import FAMILIES, Tower, family_of
from ldm.checkpoints.foreign.shapes import autoencoder_section, dotted, tower_of, unet_section, unet_sizes
from ldm.config import CONFIG_DIR, build, from_yaml, plain
from ldm.errors import InputError

CONFIGS = ("kl_f4", "kl_f8", "kl_f16", "kl_f32", "vq_f4", "vq_f8")


def native(section) -> dict:
    with torch.device("meta"):
        network = build(section)
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def refused(function, *args) -> str:
    with pytest.raises(InputError) as error:
        function(*args)
    return str(error.value)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.slug)
@pytest.mark.parametrize("small", [False, True])
def test_unets_in_both_layouts(family, small, sd_names):
    shapes = sd_names.network(f"unet_{family.slug}", small)
    sizes = unet_sizes(shapes, "file")
    assert family_of(sizes, not family.text, False) == (family, not small)
    if not small:
        assert sizes == family.unet
    else:  # diffusers' names are ours
        assert unet_sizes(native(unet_section(sizes, {"num_heads": 4})), "file") == sizes


@pytest.mark.parametrize("small", [False, True])
def test_unusual_unets(small, sd_names):
    shapes = sd_names.unet((32, 64), (1, 2), 3, context=40, layers=(1, 2), pooled=24, classes=7)
    if small:
        sizes = unet_sizes(shapes, "file")
        shapes = native(unet_section(sizes, {"num_heads": 4}))
    assert unet_sizes(shapes, "file") == {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [32, 64],
        "layers_per_block": [1, 2],
        "transformer_depth": [1, 2],
        "mid_depth": 3,
        "context_dim": 40,
        "linear_projection": False,
        "pooled_dim": 24,
        "num_classes": 7,
        "self_attention": True,
    }
    assert family_of(unet_sizes(shapes, "file"), False, False) == (None, False)


@pytest.mark.parametrize("name", CONFIGS)
def test_autoencoders_are_those_of_our_configs(name, sd_names):
    section = autoencoder_section(sd_names.network(name), "file")
    text = (CONFIG_DIR / "autoencoder" / f"{name}.yaml").read_text()
    ours = {
        key: shape for key, shape in native(plain(from_yaml(text))).items() if not key.startswith("quantize")
    }
    found = {key: shape for key, shape in native(section).items() if not key.startswith("quantize")}
    assert found == ours
    codes = sd_names.network(name).get("quantize.embedding.weight", (None,))[0]
    assert section.get("quantizer", {}).get("num_codes") == codes


@pytest.mark.parametrize(
    "options",
    [
        {"use_quant_conv": False, "mid_attention": False},
        {"attention_levels": [False, True], "layers_per_block": 1, "latent_channels": 6},
    ],
)
def test_unusual_autoencoders_in_diffusers_names(options):
    section = {"_target_": "ldm.autoencoder.kl.AutoencoderKL", "block_out_channels": [32, 64]} | options
    found = autoencoder_section(native(section), "file")
    assert {key: found[key] for key in section} == section
    assert native(found) == native(section)


def test_towers(sd_names):
    bare = {name.removeprefix("text_model."): shape for name, shape in sd_names.network("clip_l").items()}
    assert tower_of(bare, "transformers", "file") == Tower(768, 12, 49408, 77)
    assert tower_of(bare | {"text_projection.weight": (512, 768)}, "transformers", "file").projection == 512
    assert tower_of(sd_names.network("clip_h"), "open_clip", "file").model == "ViT-H-14"
    assert tower_of(sd_names.network("big_g"), "open_clip", "file").model == "ViT-bigG-14"
    cut = tower_of(sd_names.open_clip(1024, 23, 1024), "open_clip", "file").model
    assert (cut["heads"], cut["layers"], cut["width"]) == (16, 23, 1024)
    small = sd_names.network("big_g", small=True)
    assert tower_of(small, "open_clip", "file").model["heads"] is None
    assert tower_of(small, "open_clip", "file", 4).model == {
        "width": 64,
        "layers": 3,
        "heads": 4,
        "embed_dim": 48,
        "quick_gelu": False,
        "vocab_size": 49408,
        "context_length": 77,
    }
    wrong = small | {"transformer.resblocks.0.mlp.c_fc.weight": (65, 64)}
    assert "go from 64 to 65" in refused(tower_of, wrong, "open_clip", "file")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.slug)
def test_names_get_their_dots_back(family, sd_names):
    names = sd_names.network(f"unet_{family.slug}")
    assert [dotted(name.replace(".", "")) for name in names] == list(names)
    assert dotted("somethingelse0weight") == "somethingelse0weight"


def test_what_no_network_here_is(sd_names):
    shapes = sd_names.network("unet_sd1", small=True)
    resnet = "input_blocks.2.0.in_layers.2.weight"
    uneven = shapes | {resnet: (48, 32, 3, 3)}
    assert "level 0 of its U-Net has widths [32, 48] and transformer depths [1]" in refused(
        unet_sizes, uneven, "file"
    )
    context = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    two = shapes | {context: (64, 48)}
    assert "contexts of widths [32, 48]" in refused(unet_sizes, two, "file")
    middle = shapes | {"middle_block.1.transformer_blocks.0.attn1.to_k.weight": (128, 32)}
    assert "the middle of its U-Net has no self-attention" in refused(unet_sizes, middle, "file")
    del shapes["out.2.weight"]
    assert refused(unet_sizes, shapes, "file") == "file: lacks out.2.weight; is the file whole?"
    kl = sd_names.network("kl_f8", small=True)
    assert "8 moments, 8 embedded and 4 latent" in refused(
        autoencoder_section, kl | {"post_quant_conv.weight": (4, 8, 1, 1)}, "file"
    )
    short = {name: shape for name, shape in kl.items() if not name.startswith("encoder.down.1.block.1")}
    assert "level 1 of its autoencoder is unlike the others" in refused(autoencoder_section, short, "file")
