"""Every name of every family, both ways; diffusers' own converters; what a mismatch says."""

from __future__ import annotations

import functools
import hashlib
import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoints.foreign import names as n
from ldm.checkpoints.lazy import LazyTensor
from ldm.config import build
from ldm.errors import InputError

CONFIGS = Path(__file__).parents[3] / "configs"
UNETS = {  # name: (config, options of the published one, and of the small one)
    "unet_sd1": ("sd1", {"context_dim": 768}, {"context_dim": 32}),
    "unet_sd1_inpaint": ("sd1", {"context_dim": 768, "in_channels": 9}, {"context_dim": 32}),
    "unet_sd2": ("sd2", {"context_dim": 1024}, {"context_dim": 48, "head_dim": 16}),
    "unet_sd2_depth": ("sd2", {"context_dim": 1024, "in_channels": 5}, {"context_dim": 48, "head_dim": 16}),
    "unet_sdxl": (
        "sdxl",
        {"context_dim": 2048},
        {
            "context_dim": 96,
            "head_dim": 16,
            "transformer_depth": [0, 1, 2],
            "mid_depth": 2,
            "pooled_dim": 144,
        },
    ),
    "unet_upscaler": ("upscaler", {"context_dim": 1024, "in_channels": 7}, {"context_dim": 48}),
    "unet_ldm_class": (
        "ldm_class",
        {"context_dim": 512, "in_channels": 3, "out_channels": 3},
        {"context_dim": 32},
    ),
    "unet_ldm_text": ("sd1", {"context_dim": 1280}, {"context_dim": 40}),
}
AUTOENCODERS = {
    "kl_f4": ("kl_f4", {}),
    "kl_f4_4": ("kl_f4", {"latent_channels": 4}),
    "kl_f8": ("kl_f8", {}),
    "kl_f16": ("kl_f16", {}),
    "kl_f32": ("kl_f32", {}),
    "vq_f4": ("vq_f4", {}),
    "vq_f8": ("vq_f8", {}),
    "vq_f16": (
        "vq_f8",
        {
            "latent_channels": 8,
            "block_out_channels": [128, 128, 256, 256, 512],
            "attention_levels": [False, False, False, False, True],
        },
    ),
}
TOWERS = {
    "clip_l": ("ViT-L-14-quickgelu", {"width": 32, "layers": 2, "heads": 2, "embed_dim": 32}),
    "clip_h": ("ViT-H-14", {"width": 48, "layers": 3, "heads": 3, "embed_dim": 48}),
    "big_g": ("ViT-bigG-14", {"width": 64, "layers": 3, "heads": 4, "embed_dim": 48}),
}
NETWORKS = [*UNETS, *AUTOENCODERS, *TOWERS]
# Tensors, their values, and a digest of names and shapes: those of the published files.
FACTS = {
    "unet_sd1": (686, 859_520_964, "6eb9118e12ebb943"),
    "unet_sd1_inpaint": (686, 859_535_364, "329e2ebd0aa9b5bc"),
    "unet_sd2": (686, 865_910_724, "43006135b2f36d88"),
    "unet_sd2_depth": (686, 865_913_604, "fd1b957ebff7524a"),
    "unet_sdxl": (1680, 2_567_463_684, "b20fa34f1c213f06"),
    "unet_upscaler": (687, 473_398_020, "ac14dc2f7b338b73"),
    "unet_ldm_text": (686, 872_300_484, "b8034fd4e83c1b7a"),
    "unet_ldm_class": (688, 400_920_579, "489a7d9e0d6492aa"),
    "kl_f8": (248, 83_653_863, "843ce3c02f194469"),
    "kl_f4": (204, 55_312_063, "bedf4e277cc70037"),
    "kl_f16": (342, 69_610_963, "755601d589e520d3"),
    "kl_f32": (436, 103_880_131, "71001bb7bf970cb1"),
    "vq_f4": (205, 55_322_782, "0fe11d9a1abf69ef"),
    "vq_f8": (299, 67_717_295, "ce79e5935fc9396c"),
    "vq_f16": (343, 69_593_371, "8aba1ecaae7e862c"),
    "clip_l": (197, 123_060_480 + 77, "fdadc418c16bf76e"),
    "clip_h": (294, 354_032_641, "daf5b2881678b063"),
    "big_g": (390, 694_659_841, "feef48d43f8a5e95"),
    "sd1": (1831, 859_520_964 * 2 + 83_653_863 + 123_060_557 + 12_000 + 2, "2c379514d80bb772"),
}


def section(group, name, options):
    """A config's section as a plain dict, with options in the place of its own."""
    found = OmegaConf.to_container(OmegaConf.load(CONFIGS / group / f"{name}.yaml"), resolve=False)
    defaults = {"in_channels": 4, "out_channels": 4} if group == "backbone" else {}
    return found | defaults | options


@functools.cache
def native(name, small=False):
    """(rules to the single file's names, names and shapes) of the network of our configs."""
    if name in UNETS:
        config, options, little = UNETS[name]
        if small:
            channels = {"sdxl": [32, 64, 128], "upscaler": [32, 64, 64, 128], "ldm_class": [32, 64, 96, 160]}
            options = options | little | {"block_out_channels": channels.get(config, [32, 64, 128, 128])}
        made, rules_of = section("backbone", config, options), n.original_unet
    elif name in AUTOENCODERS:
        made, rules_of = section("autoencoder", *AUTOENCODERS[name]), n.original_autoencoder
        if small:
            made["block_out_channels"] = [width // 4 for width in made["block_out_channels"]]
            made.get("quantizer", {})["num_codes"] = 64
    else:
        model, little = TOWERS[name]
        made = {
            "_target_": "ldm.conditioning.frozen.FrozenOpenCLIP",
            "model": little if small else model,
            "pretrained": None,
            "pooled": name != "clip_l",
        }
        rules_of = n.transformers_text if name == "clip_l" else n.open_clip_text
    with torch.device("meta"):
        network = build(made)
    network = network.text if name in TOWERS else network
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    return rules_of(shapes), shapes


def lazy(tensors):
    return {name: LazyTensor.of(value) for name, value in tensors.items()}


def unread(shapes, dtype=torch.float32):
    """Lazy tensors that nobody may read."""

    def refuse():
        raise AssertionError("read")

    return {name: LazyTensor(shape, dtype, refuse) for name, shape in shapes.items()}


def assert_equal(ours, theirs):
    """Bit for bit, names included; lazy tensors say the truth of what they read."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        read, expected = value.read(), theirs[name].read()
        assert (tuple(value.shape), value.dtype) == (tuple(read.shape), read.dtype), name
        assert read.is_contiguous(), name
        assert read.dtype == expected.dtype, name
        assert torch.equal(read, expected), name


def foreign_shapes(shapes):
    return {name: shape for name, shape in shapes.items() if not n.is_extra(f"x.{name}")}


@pytest.mark.parametrize("name", FACTS)
def test_names_in_tests_are_those_of_the_published_files(name, family_shapes):
    shapes = family_shapes(name, ema=True) if name == "sd1" else family_shapes(name)
    lines = "".join(f"{key}\t{list(shapes[key])}\n" for key in sorted(shapes))
    digest = hashlib.sha256(lines.encode()).hexdigest()[:16]
    assert (len(shapes), sum(map(math.prod, shapes.values())), digest) == FACTS[name]


@pytest.mark.parametrize("small", [False, True], ids=["published", "small"])
@pytest.mark.parametrize("name", NETWORKS)
def test_rules_cover_every_name_once_each_way(name, small, family_shapes):
    rules, shapes = native(name, small)
    given = n.given(rules, unread(shapes))
    assert {key: value.shape for key, value in given.items()} == foreign_shapes(family_shapes(name, small))
    assert [rule.ours for rule in rules] == [key for key in shapes if not n.is_local(key)]
    theirs = [key for rule in rules for key in rule.theirs]
    assert len(theirs) == len(set(theirs))
    found = unread(family_shapes(name, small))
    taken = n.taken(rules, shapes, found, "file", lambda key: n.is_extra(f"x.{key}"))
    assert {key: value.shape for key, value in taken.items()} == {
        key: shape for key, shape in shapes.items() if not n.is_local(key)
    }


def test_other_depths_and_widths(sd_names):
    """What no published network has: other numbers of layers, one a level, and gaps in the attention."""
    options = {"block_out_channels": [32, 64, 96], "layers_per_block": [1, 3, 2], "context_dim": 24}
    options |= {"transformer_depth": [2, 0, 1], "mid_depth": 3, "num_classes": 5}
    with torch.device("meta"):
        state = build(section("backbone", "sd1", options)).state_dict()
    rules = n.original_unet(state)
    expected = sd_names.unet((32, 64, 96), (2, 0, 1), 3, context=24, classes=5, layers=(1, 3, 2))
    given = n.given(rules, unread({name: tuple(value.shape) for name, value in state.items()}))
    assert {name: value.shape for name, value in given.items()} == expected


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("unet_sdxl", torch.float16),
        ("kl_f8", torch.float32),
        ("kl_f16", torch.bfloat16),
        ("vq_f8", torch.float32),
        ("clip_l", torch.float16),
        ("big_g", torch.float32),
    ],
)
def test_there_and_back_is_bit_equal(name, dtype, family_shapes, random_tensors):
    rules, shapes = native(name, small=True)
    theirs = lazy(random_tensors(foreign_shapes(family_shapes(name, small=True)), dtype=dtype))
    ours = n.taken(rules, shapes, theirs, "file")
    assert_equal(n.given(rules, ours), theirs)
    mine = {key: shape for key, shape in shapes.items() if not n.is_local(key)}
    ours = lazy(random_tensors(mine, seed=1, dtype=dtype))
    assert_equal(n.taken(rules, shapes, n.given(rules, ours), "file"), ours)


def test_stacked_tensors_share_no_storage():
    rule = n.Rule("both", ("first", "second"))
    given = n.given([rule], lazy({"both": torch.arange(6.0).reshape(2, 3)}))
    assert given["second"].read().untyped_storage().nbytes() == 3 * 4


@pytest.mark.parametrize("name", ["unet_sd1", "unet_sdxl", "unet_upscaler"])
def test_unets_become_what_diffusers_makes_of_them(name, family_shapes, random_tensors):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    rules, shapes = native(name, small=True)
    tensors = random_tensors(family_shapes(name, small=True))
    config = {"layers_per_block": 2, "num_class_embeds": 1000}
    if name == "unet_sdxl":
        config["addition_embed_type"] = "text_time"
    prefixed = {f"model.diffusion_model.{key}": value for key, value in tensors.items()}
    expected = convert_ldm_unet_checkpoint(prefixed, config)
    assert_equal(n.taken(rules, shapes, lazy(tensors), "file"), lazy(expected))


@pytest.mark.parametrize("name", ["kl_f4", "kl_f8"])
def test_autoencoders_become_what_diffusers_makes_of_them(name, family_shapes, random_tensors):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    rules, shapes = native(name, small=True)
    tensors = random_tensors(family_shapes(name, small=True))
    blocks = [None] * (3 if name == "kl_f4" else 4)
    expected = convert_ldm_vae_checkpoint(
        dict(tensors), {"down_block_types": blocks, "up_block_types": blocks}
    )
    assert_equal(n.taken(rules, shapes, lazy(tensors), "file"), lazy(expected))


@pytest.mark.parametrize("name", ["clip_h", "big_g"])
def test_towers_become_what_diffusers_makes_of_them(name, family_shapes, random_tensors):
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    _, shapes = native(name, small=True)
    tensors = random_tensors(foreign_shapes(family_shapes(name, small=True)))
    prefixed = {f"x.{key}": value for key, value in tensors.items()}
    # the converter splits in_proj by the rows of text_projection, which are the tower's width
    expected = convert_open_clip_checkpoint(None, prefixed, "x.")
    given = n.given(n.transformers_text(shapes), lazy(tensors))
    assert_equal(given, lazy(expected))


def clip_of_transformers(name, projection):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    little = TOWERS[name][1]
    config = CLIPTextConfig(
        hidden_size=little["width"],
        intermediate_size=4 * little["width"],
        num_hidden_layers=little["layers"],
        num_attention_heads=little["heads"],
        projection_dim=little["embed_dim"],
        vocab_size=49408,
        hidden_act="gelu",
    )
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", ["clip_l", "big_g"])
def test_towers_of_transformers_compute_the_same_here(name):
    """Its names now, with and without `text_model.`, and the numbers."""
    from open_clip.transformer import TextTransformer

    little, projection = TOWERS[name][1], name == "big_g"
    theirs = clip_of_transformers(name, projection)
    tower = TextTransformer(
        width=little["width"],
        layers=little["layers"],
        heads=little["heads"],
        output_dim=little["embed_dim"] if projection else None,
        output_tokens=True,
        vocab_size=49408,
    ).eval()
    shapes = {key: tuple(value.shape) for key, value in tower.state_dict().items()}
    rules = n.transformers_text(shapes)
    found = lazy(theirs.state_dict())
    taken = n.taken(rules, shapes, found, "text_encoder")
    longer = {name if name.startswith("text") else f"text_model.{name}": found[name] for name in found}
    assert_equal(n.taken(rules, shapes, longer, "text_encoder"), taken)
    assert_equal(n.given(rules, taken), longer)

    tower.load_state_dict({key: value.read() for key, value in taken.items()})
    tokens = torch.tensor([[49406, 320, 736, 49407, *[0] * 73], [49406, 5, *range(9, 83), 49407]])
    with torch.no_grad():
        expected = theirs(tokens)
        pooled, context = tower(tokens)
    torch.testing.assert_close(context, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    if projection:
        torch.testing.assert_close(pooled, expected.text_embeds, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("as_convolution", [False, True])
def test_old_names_of_attention_in_folders(as_convolution):
    """Against diffusers, which reads them, too."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        block_out_channels=[32, 64],
    )
    state = model.state_dict()
    rules = n.diffusers_autoencoder(state)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    old = {}
    for name, value in state.items():
        for leaf, former in {
            "to_q": "query",
            "to_k": "key",
            "to_v": "value",
            "to_out.0": "proj_attn",
        }.items():
            name = name.replace(leaf, former)
        old[name] = value
    assert sum(name not in state for name in old) == 2 * 4 * 5  # 5 attentions
    expected = lazy(model._fix_state_dict_keys_on_load(dict(old)))
    if as_convolution:
        former = ("query.weight", "key.weight", "value.weight", "proj_attn.weight")
        old = {name: v[..., None, None] if name.endswith(former) else v for name, v in old.items()}
    taken = n.taken(rules, shapes, lazy(old), "vae")
    assert_equal(taken, {name: expected[name] for name in taken})
    assert_equal(n.given(rules, taken), lazy(state))


def test_a_native_name_without_counterpart_is_refused():
    for rules_of in (n.original_unet, n.original_autoencoder, n.transformers_text):
        with pytest.raises(InputError, match=r"extra\.weight: .* no such tensor"):
            rules_of(["extra.weight"])


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "upscaler", "ldm_class"])
def test_extras_are_not_the_networks_own(family, family_shapes, sd_names):
    whole = family_shapes(family, ema=True)
    own = family_shapes(family, with_buffers=False)
    optional = ("position_ids", "logit_scale", "cond_stage_model.model.text_projection")
    assert [name for name in own if n.is_extra(name) != name.endswith(optional)] == []
    assert [name for name in whole.keys() - own.keys() if not n.is_extra(name)] == []
    unet = [name for name in own if name.startswith(sd_names.SD)]
    averages = [name for name in whole if name.startswith("model_ema.diffusion_model")]
    assert [n.ema_name(name) for name in unet] == averages


@pytest.mark.parametrize(
    ("name", "is_extra"),
    [
        ("lvlb_weights", True),
        ("logvar", True),
        ("ddim_sqrt_one_minus_alphas", True),
        ("loss.discriminator.main.0.weight", True),
        ("first_stage_model.loss.logvar", True),
        ("model_ema.encoderconv_inweight", True),
        ("depth_model.model.pretrained.model.cls_token", True),
        ("cond_stage_model.transformer.text_model.embeddings.position_ids", True),
        ("cond_stage_model.model.logit_scale", True),
        ("sqrt_betas", False),
        ("v_pred", False),
        ("control_model.input_hint_block.0.weight", False),
        ("conditioner.embedders.1.model.text_projection", False),
    ],
)
def test_extras(name, is_extra):
    assert n.is_extra(name) is is_extra


def refused(rules, shapes, found, known=lambda name: False):
    with pytest.raises(InputError) as caught:
        n.taken(rules, shapes, found, "model.ckpt", known)
    message = str(caught.value)
    assert "\n" not in message
    return message


SD = "model.diffusion_model."


@pytest.fixture(scope="module")
def sd1(family_shapes):
    """(rules, shapes, tensors) of Stable Diffusion 1's U-Net, with prefixes."""
    rules, shapes = native("unet_sd1")
    found = unread({SD + name: shape for name, shape in family_shapes("unet_sd1").items()})
    return n.under(rules, "backbone.", SD), {f"backbone.{k}": v for k, v in shapes.items()}, found


def test_a_misspelt_name_is_told_with_the_nearest_known_one(sd1):
    rules, shapes, found = sd1
    good, wrong = f"{SD}input_blocks.4.1.proj_in.weight", f"{SD}input_blocks.4.1.proj_inn.weight"
    found = {wrong if name == good else name: value for name, value in found.items()}
    assert refused(rules, shapes, found) == (
        f"model.ckpt: 1 of 686 tensors missing ({good}), 1 foreign ({wrong}); did you mean {good}?"
    )
    assert "foreign" not in refused(rules, shapes, found, lambda name: name == wrong)


def test_shapes_are_told_in_theirs_and_needed(sd1, family_shapes):
    rules, shapes, found = sd1
    name = f"{SD}input_blocks.0.0.weight"
    found = found | unread({name: (320, 9, 3, 3)})
    assert refused(rules, shapes, found) == (
        f"model.ckpt: 1 of another shape ({name} is [320, 9, 3, 3] where [320, 4, 3, 3] is needed); "
        "is it another kind of model, or a part of one?"
    )


def test_an_empty_file_and_a_far_longer_one(sd1):
    rules, shapes, found = sd1
    first, second = rules[0].theirs[0], rules[1].theirs[0]
    assert refused(rules, shapes, {}).startswith(
        f"model.ckpt: 686 of 686 tensors missing ({first}, {second}, ...); "
    )
    more = {f"{name}.lora_down": value for name, value in found.items()}
    message = refused(rules, shapes, found | more)
    assert message == f"model.ckpt: 686 foreign ({first}.lora_down, ...); did you mean {first}?"


def test_a_stack_of_other_parts_is_refused():
    rules, shapes = n.transformers_text(["transformer.resblocks.0.attn.in_proj_weight"]), {}
    shapes["transformer.resblocks.0.attn.in_proj_weight"] = (6, 2)
    layer = "text_model.encoder.layers.0.self_attn"
    found = unread(
        {f"{layer}.{part}_proj.weight": (2, 2) for part in "qkv"} | {f"{layer}.q_proj.weight": (4, 2)}
    )
    assert f"{layer}.q_proj.weight is [4, 2] where [2, 2] is needed" in refused(rules, shapes, found)
    del found[f"{layer}.v_proj.weight"]
    assert f"1 of 3 tensors missing ({layer}.v_proj.weight)" in refused(rules, shapes, found)
