"""Folders that diffusers opens: the same tensors, the same computation, or one line and no folder."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from ldm.checkpoints.foreign import folder_in, folder_out, schedulers
from ldm.checkpoints.lazy import LazyTensor
from ldm.checkpoints.model import Asked, Model
from ldm.config import build
from ldm.errors import InputError
from ldm.types import Batch, Conditioning

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

FAMILIES = ["sd1", "sd2", "sd1_inpaint", "sd2_depth", "upscaler", "sdxl", "sdxl_inpaint"]
ABSENT = {"depth_estimator": None, "feature_extractor": None}
COMPLAINTS = ("missing", "unexpected", "not used", "newly initialized", "not expected", "ignored")
BATCH = Batch(torch.arange(2), torch.ones(2), caption=["a red apple", ""])


def close(ours, theirs, bound=1e-5):
    assert theirs.abs().max() > 1e-4
    assert ((ours - theirs).norm() / theirs.norm()).item() <= bound


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value.read(), theirs[name].read()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_opens_it_and_so_do_we(saved, opened, tmp_path, family, capfd):
    pipe, _ = saved(family)
    model, out = opened(family), tmp_path / "out"
    notes = folder_out.write(model, out, None, "raw")
    assert len(notes) == (family not in ("sd1", "sd1_inpaint")) + (family == "sd2_depth")
    capfd.readouterr()
    again = type(pipe).from_pretrained(out, local_files_only=True, **ABSENT if family == "sd2_depth" else {})
    said = "".join(capfd.readouterr()).lower()
    assert [word for word in COMPLAINTS if word in said] == []
    assert type(again.scheduler) is type(pipe.scheduler)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(pipe, part, None) is None:
            continue
        theirs, ours = getattr(pipe, part).state_dict(), getattr(again, part).state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    back = folder_in.read(out, Asked())
    same(model.tensors, back.tensors)
    assert {**back.config, "run_name": 0} == {**model.config, "run_name": 0}


def test_number_formats_and_metadata(opened, tmp_path):
    model = opened("sd1")
    folder_out.write(model, tmp_path / "half", torch.float16, "raw")
    for file in (tmp_path / "half").rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert all(opened.get_tensor(name).dtype == torch.float16 for name in opened.keys())  # noqa: SIM118
    back = folder_in.read(tmp_path / "half", Asked())
    assert torch.equal(back.tensors[BIAS].read(), model.tensors[BIAS].read().half())


BIAS = "backbone.conv_in.bias"


def test_averages_are_written_where_they_are_asked_for(opened, tmp_path):
    model = opened("sd1")
    bias = model.tensors[BIAS].read()
    model.ema = {BIAS: LazyTensor.of(bias + 1)}
    for weights, plus in (("raw", 0), ("ema", 1)):
        folder_out.write(model, tmp_path / weights, None, weights)
        back = folder_in.read(tmp_path / weights, Asked())
        assert torch.equal(back.tensors[BIAS].read(), bias + plus)


def replaced(model, peers, section):
    """The model with a conditioner made here, redrawn, and that."""
    network = peers.redrawn(build(section), 9)
    rest = {name: value for name, value in model.tensors.items() if not name.startswith("conditioner.")}
    own = {f"conditioner.{name}": LazyTensor.of(value) for name, value in network.state_dict().items()}
    return Model({**model.config, "conditioner": section}, rest | own, facts=model.facts), network


TRAINED = {
    "_target_": "ldm.conditioning.text.TextTransformer",
    "width": 16,
    "layers": 2,
    "heads": 2,
    "context_length": 24,
}
SIZES = {"width": 16, "layers": 4, "heads": 2, "embed_dim": 16, "quick_gelu": False, "vocab_size": 49408}
FROZEN = {"_target_": "ldm.conditioning.frozen.FrozenOpenCLIP", "model": SIZES, "pretrained": None}


@pytest.mark.parametrize(
    ("section", "layers"),
    [
        (TRAINED, 2),
        (FROZEN | {"layer": "penultimate", "padding": "zero"}, 3),
        (FROZEN | {"layer": 2, "padding": "end"}, 2),
        (FROZEN | {"model": SIZES | {"quick_gelu": True}, "padding": "end"}, 4),
    ],
)
def test_towers_of_any_kind_become_clip_text_models(opened, peers, tmp_path, section, layers):
    """As many blocks as are read: transformers puts the last norm after the last of them."""
    model, network = replaced(opened("sd1"), peers, section)
    folder_out.write(model, tmp_path / "out", None, "raw")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert pipe.text_encoder.config.num_hidden_layers == layers
    theirs = pipe.encode_prompt(BATCH.caption, "cpu", 1, False)[0]
    with torch.no_grad():
        context = network(BATCH).context
    close(context, theirs)
    back = folder_in.read(tmp_path / "out", Asked())
    again = build(back.config["conditioner"])
    again.load_state_dict({name: value.read() for name, value in back.of("conditioner").items()})
    close(again(BATCH).context, context)


def test_an_earlier_layer_of_xls_first_tower(opened, peers, tmp_path):
    model = opened("sdxl")
    section = json.loads(json.dumps(model.config["conditioner"]))
    section["parts"]["clip_l"]["layer"] = 1
    model.config["conditioner"] = section
    folder_out.write(model, tmp_path / "out", None, "raw")
    config = json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    tower = build(section["parts"]["clip_l"])
    prefix = "parts.clip_l."
    own = {
        k.removeprefix(prefix): v.read() for k, v in model.of("conditioner").items() if k.startswith(prefix)
    }
    tower.load_state_dict(own)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    theirs = pipe.encode_prompt(BATCH.caption, device="cpu", do_classifier_free_guidance=False)[0]
    close(tower(BATCH).context, theirs[..., :16])


SHIFTED = {"latent_shift": [0.1, -0.2, 0.3, 0.0], "latent_scale": [0.5, 1.5, 0.7, 1.0]}


@pytest.mark.parametrize(
    ("family", "statistics", "factor"),
    [
        ("sd1", SHIFTED, 1.0),
        ("sd1", {"latent_scale": 0.25}, 0.25),
        ("upscaler", {"latent_scale": 0.25}, 0.08333),  # their pipeline takes no other
        ("upscaler", SHIFTED, 0.08333),
    ],
)
def test_latent_shift_and_scale(saved, opened, tmp_path, family, statistics, factor):
    pipe, _ = saved(family)
    model = opened(family)
    model.config["autoencoder"] = model.config["autoencoder"] | statistics
    notes = folder_out.write(model, tmp_path / "out", None, "raw")
    assert any("quant_conv" in note for note in notes) == (statistics is SHIFTED or family == "upscaler")
    again = type(pipe).from_pretrained(tmp_path / "out", local_files_only=True)
    assert again.vae.config.scaling_factor == factor
    ours = build(model.config["autoencoder"])
    ours.load_state_dict({name: value.read() for name, value in model.of("autoencoder").items()})
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        posterior = again.vae.encode(images).latent_dist
        close(ours.encode(images), posterior.mean * factor)
        close(ours.encode(images, noise), (posterior.mean + posterior.std * noise) * factor)
        close(ours.decode(noise), again.vae.decode(noise / factor).sample)


@pytest.mark.parametrize("options", [{}, {"use_quant_conv": False, "use_post_quant_conv": False}])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_an_autoencoder_alone(peers, tmp_path, options, shift):
    peers.autoencoder(**options).save_pretrained(tmp_path / "theirs")
    model = folder_in.read(tmp_path / "theirs", Asked())
    model.config["autoencoder"]["latent_shift"] = shift
    folder_out.write(model, tmp_path / "out", None, "raw")
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out", local_files_only=True)
    assert theirs.config.use_quant_conv == (not options or shift != 0)
    ours = build(model.config["autoencoder"])
    ours.load_state_dict({name: value.read() for name, value in model.of("autoencoder").items()})
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(ours.decode(latents), theirs.decode(latents / theirs.config.scaling_factor).sample)
    if not shift:
        same(model.tensors, folder_in.read(tmp_path / "out", Asked()).tensors)


def test_a_codebook_of_running_means_alone(peers, tmp_path):
    section = {
        "_target_": "ldm.autoencoder.vq.AutoencoderVQ",
        "quantizer": {
            "_target_": "ldm.autoencoder.vq.EMAVectorQuantizer",
            "_partial_": True,
            "num_codes": 32,
        },
        "latent_channels": 3,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_groups": 4,
        "attention_levels": [False, True],
        "latent_shift": 0.2,
        "latent_scale": 0.5,
    }
    network = peers.redrawn(build(section), 4)
    tensors = {f"autoencoder.{name}": LazyTensor.of(value) for name, value in network.state_dict().items()}
    folder_out.write(Model({"autoencoder": section}, tensors), tmp_path / "out", None, "raw")
    theirs = diffusers.VQModel.from_pretrained(tmp_path / "out", local_files_only=True)
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        found = theirs.encode(images).latents
        close(network.encode(images), found * theirs.config.scaling_factor)
        close(network.decode(network.encode(images)), theirs.decode(found).sample)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "upscaler"])
def test_a_unet_alone(peers, tmp_path, family):
    peers.unet(family).save_pretrained(tmp_path / "theirs")
    model = folder_in.read(tmp_path / "theirs", Asked())
    folder_out.write(model, tmp_path / "out", None, "raw")
    same(model.tensors, folder_in.read(tmp_path / "out", Asked()).tensors)
    found = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out", local_files_only=True)
    assert found.state_dict().keys() == peers.unet(family).state_dict().keys()


@pytest.mark.parametrize("split", [{"head_dim": 8}, {"head_dim": [4, 8]}, {"num_heads": [2, 4]}])
@pytest.mark.parametrize("mid_depth", [0, 2])
def test_unets_made_here(peers, tmp_path, split, mid_depth):
    section = {
        "_target_": "ldm.backbones.unet.CrossAttentionUNet",
        "block_out_channels": [16, 32],
        "norm_groups": 8,
        "layers_per_block": [1, 2],
        "transformer_depth": [1, 0],
        "mid_depth": mid_depth,
        "context_dim": 12,
        **split,
    }
    network = peers.redrawn(build(section), 4)
    tensors = {f"backbone.{name}": LazyTensor.of(value) for name, value in network.state_dict().items()}
    folder_out.write(Model({"backbone": section}, tensors), tmp_path / "out", None, "raw")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out", local_files_only=True)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    time = torch.tensor([900.0, 5.0])
    with torch.no_grad():
        close(network(x, time, Conditioning(context)), theirs(x, time, context).sample)


def changed(model, **sections):
    return Model({**model.config, **sections}, model.tensors, facts=model.facts)


def combined(**parts):
    return {"_target_": "ldm.conditioning.combined.Combined", "parts": parts}


POOLED = FROZEN | {"pooled": True}
CASES = {
    "EDM": ({"noise_scheduler": {"_target_": "ldm.diffusion.noise_scheduler.EDM"}}, "EDM"),
    "flow on a table": (
        {"noise_scheduler": {"_target_": schedulers.VP, "prediction_type": "flow"}},
        "prediction_type=flow",
    ),
    "classes": (
        {
            "conditioner": {
                "_target_": "ldm.conditioning.label.ClassToken",
                "num_classes": 3,
                "context_dim": 16,
            }
        },
        "conditioner of ClassToken",
    ),
    "nothing": ({"conditioner": None}, "conditioner"),
    "pooled": ({"conditioner": POOLED}, "pooled"),
    "no final norm": ({"conditioner": FROZEN | {"final_norm": False}}, "final_norm"),
    "a null of zeros": ({"conditioner": FROZEN | {"zero_null": True}}, "zero_null"),
    "three towers": ({"conditioner": combined(a=FROZEN, b=FROZEN, c=FROZEN)}, "FrozenOpenCLIP"),
    "first tower pooled": (
        {
            "conditioner": combined(
                a=POOLED | {"final_norm": False, "layer": "penultimate"},
                b=FROZEN | {"final_norm": False, "layer": "penultimate"},
                sizes={"_target_": "ldm.conditioning.combined.Sizes"},
            )
        },
        "pooled",
    ),
    "the last layer of XL's": (
        {
            "conditioner": combined(
                a=FROZEN | {"final_norm": False},
                b=POOLED | {"final_norm": False, "layer": "penultimate"},
                sizes={"_target_": "ldm.conditioning.combined.Sizes"},
            )
        },
        "layer",
    ),
    "a residual autoencoder": (
        {
            "autoencoder": {
                "_target_": "ldm.autoencoder.residual.ResidualAutoencoderKL",
                "block_out_channels": [32, 32],
            }
        },
        "ResidualAutoencoderKL",
    ),
    "a codebook": (
        {
            "autoencoder": {
                "_target_": "ldm.autoencoder.vq.AutoencoderVQ",
                "quantizer": {
                    "_target_": "ldm.autoencoder.vq.VectorQuantizer",
                    "_partial_": True,
                    "num_codes": 4,
                },
            }
        },
        "codebook",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_diffusers_lacks_is_refused_and_nothing_is_written(opened, tmp_path, case):
    sections, word = CASES[case]
    model = changed(opened("sd1"), **sections)
    with pytest.raises(InputError, match=word) as error:
        folder_out.write(model, tmp_path / "out", None, "raw")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_missing_tensors_and_a_place_that_is_taken(opened, tmp_path):
    model = opened("sd1")
    del model.tensors["backbone.conv_in.bias"]
    with pytest.raises(InputError, match=r"1 of \d+ tensors.*conv_in.bias"):
        folder_out.write(model, tmp_path / "out", None, "raw")
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="there already"):
        folder_out.write(model, tmp_path / "taken", None, "raw")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_inpainting_needs_four_channels(opened, tmp_path):
    model = opened("sd1_inpaint")
    model.config["autoencoder"] = model.config["autoencoder"] | {"latent_channels": 3}
    with pytest.raises(InputError, match="4 channels, these have 3"):
        folder_out.write(model, tmp_path / "out", None, "raw")
    assert list(tmp_path.iterdir()) == []
