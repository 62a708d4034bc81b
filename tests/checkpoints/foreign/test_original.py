"""The original YAMLs of CompVis and Stability AI: what they say of published sizes, and contradictions."""

from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import save_file

from ldm.checkpoints.foreign import original, single_file
from ldm.checkpoints.foreign.families import CLASS_UNET, SD1_UNET, SD2_UNET, SDXL_UNET, UPSCALER_UNET
from ldm.checkpoints.foreign.shapes import autoencoder_section
from ldm.checkpoints.model import Asked
from ldm.errors import InputError

DDCONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
SD1 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 768,
    "use_checkpoint": True,
    "legacy": False,
}
SD2 = {key: value for key, value in SD1.items() if key != "num_heads"} | {
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "context_dim": 1024,
}
SDXL = SD2 | {
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "attention_resolutions": [4, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [1, 2, 10],
    "context_dim": 2048,
}
UPSCALER = SD2 | {
    "num_head_channels": -1,
    "num_heads": 8,
    "in_channels": 7,
    "model_channels": 256,
    "channel_mult": [1, 2, 2, 4],
    "attention_resolutions": [2, 4, 8],
    "num_classes": 1000,
    "disable_self_attentions": [True, True, True, False],
}
CLASS = SD1 | {
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 192,
    "attention_resolutions": [8, 4, 2],
    "channel_mult": [1, 2, 3, 5],
    "num_heads": 1,
    "context_dim": 512,
}


def compvis(unet: dict, ddconfig: dict | None = None, **params) -> dict:
    """As in v1-inference.yaml."""
    stage = {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {"embed_dim": 4, "ddconfig": ddconfig or DDCONFIG},
    }
    told = {
        "linear_start": 0.00085,
        "linear_end": 0.0120,
        "timesteps": 1000,
        "image_size": 64,
        "channels": 4,
        "scale_factor": 0.18215,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": stage,
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
    }
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": told | params}}


def sgm(unet: dict, scaling: str = "EpsScaling") -> dict:
    """As in sd_xl_base.yaml."""
    modules = "sgm.modules.diffusionmodules"
    denoiser = {
        "num_idx": 1000,
        "scaling_config": {"target": f"{modules}.denoiser_scaling.{scaling}"},
        "discretization_config": {"target": f"{modules}.discretizer.LegacyDDPMDiscretization"},
    }
    params = {
        "scale_factor": 0.13025,
        "disable_first_stage_autocast": True,
        "denoiser_config": {"target": f"{modules}.denoiser.DiscreteDenoiser", "params": denoiser},
        "network_config": {"target": f"{modules}.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {"target": "x", "params": {"embed_dim": 4, "ddconfig": DDCONFIG}},
    }
    return {"model": {"target": "sgm.models.diffusion.DiffusionEngine", "params": params}}


@pytest.fixture
def written(tmp_path):
    def write(document, name="original.yaml"):
        path = tmp_path / name
        path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
        return path

    return write


@pytest.fixture
def facts(written):
    return lambda document: original.read(written(document), "--config original.yaml")


V, TABLE = {"parameterization": "v"}, ("scaled_linear", 0.00085, 0.012)
PIXELS = {"linear_start": 1e-4, "linear_end": 0.02}
OTHER = {"beta_schedule": "sqrt_linear", "parameterization": "x0"}


@pytest.mark.parametrize(
    ("document", "unet", "heads", "prediction", "schedule"),
    [
        (compvis(SD1), SD1_UNET, {"num_heads": 8}, "epsilon", TABLE),
        (compvis(SD2, **V), SD2_UNET, {"head_dim": 64}, "v_prediction", TABLE),
        (sgm(SDXL), SDXL_UNET, {"head_dim": 64}, "epsilon", TABLE),
        (sgm(SDXL, "VScaling"), SDXL_UNET, {"head_dim": 64}, "v_prediction", TABLE),
        (
            compvis(UPSCALER, **V, **PIXELS),
            UPSCALER_UNET,
            {"num_heads": 8},
            "v_prediction",
            ("scaled_linear", 0.0001, 0.02),
        ),
        (compvis(CLASS, **OTHER), CLASS_UNET, {"num_heads": 1}, "sample", ("linear", *TABLE[1:])),
    ],
)
def test_published_yamls(document, unet, heads, prediction, schedule, facts):
    found = facts(document)
    found.agree(found.unet, unet, "U-Net")
    assert found.unet.keys() == unet.keys() - {"self_attention"}
    assert (found.heads, found.prediction_type, found.schedule) == (heads, prediction, schedule)
    assert found.num_train_timesteps == 1000


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("kl_f8", {}),
        ("kl_f16", {"z_channels": 16, "ch_mult": [1, 1, 2, 2, 4], "attn_resolutions": [16]}),
        ("vq_f4", {"double_z": False, "z_channels": 3, "ch_mult": [1, 2, 4]}),
    ],
)
def test_first_stages(name, changes, facts, sd_names):
    params = {"embed_dim": 4, "ddconfig": DDCONFIG | changes, "lossconfig": {"target": "x"}}
    found = facts({"model": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}})
    section = autoencoder_section(sd_names.network(name), "file")
    found.agree(found.autoencoder, section, "autoencoder")
    assert found.autoencoder.items() <= section.items()
    assert (found.unet, found.prediction_type, found.schedule) == ({}, None, None)


SMALL_UNET = SD1 | {"model_channels": 32, "channel_mult": [1, 2, 4, 4], "context_dim": 32, "num_heads": 4}
SMALL = compvis(SMALL_UNET, DDCONFIG | {"ch": 32}, scale_factor=0.3, image_size=24, parameterization="v")


@pytest.fixture
def small_file(tmp_path, sd_names, random_tensors):
    """A small file of SD 1's kind, without a text tower."""
    shapes = sd_names.single_file("sd1", small=True, with_buffers=False)
    tensors = random_tensors({name: shape for name, shape in shapes.items() if "cond_stage" not in name})
    path = tmp_path / "small.safetensors"
    save_file(tensors, path)
    return path


def test_a_yaml_answers_what_tensors_leave_open(small_file, written):
    asked = Asked(config=written(SMALL))
    config = single_file.read(small_file, asked).config
    assert config["backbone"]["num_heads"] == 4
    assert config["autoencoder"]["latent_scale"] == 0.3
    assert config["noise_scheduler"]["prediction_type"] == "v_prediction"
    assert config["data"]["image_size"] == 192
    over = single_file.read(small_file, Asked(asked.config, "epsilon", head_dim=16, latent_scale=2.0)).config
    assert over["backbone"]["head_dim"] == 16
    assert "num_heads" not in over["backbone"]
    assert over["autoencoder"]["latent_scale"] == 2.0
    assert over["noise_scheduler"]["prediction_type"] == "epsilon"


def test_a_yaml_beside_the_file_is_read(small_file, written):
    written(SMALL, "small.yaml")
    model = single_file.read(small_file, Asked())
    assert model.config["noise_scheduler"]["prediction_type"] == "v_prediction"
    assert "small.yaml beside it was read, too" in model.facts["notes"]


@pytest.mark.parametrize(
    ("document", "what"),
    [
        (
            compvis(SD2),
            "block_out_channels of the U-Net is [320, 640, 1280, 1280] here, and [32, 64, 128, 128]",
        ),
        (
            compvis(SMALL_UNET | {"in_channels": 9}),
            "in_channels of the U-Net is 9 here, and 4 in the tensors",
        ),
        (
            compvis(SMALL_UNET),
            "block_out_channels of the autoencoder is [128, 256, 512, 512] here, and [32, 64,",
        ),
    ],
)
def test_contradictions_show_both_numbers(document, what, small_file, written):
    path = written(document)
    with pytest.raises(InputError) as error:
        single_file.read(small_file, Asked(config=path))
    assert str(error.value).startswith(f"--config {path}: {what}")
    assert str(error.value).endswith("; is it the YAML of this file?")


@pytest.mark.parametrize("impossible", [{"timesteps": 0}, {"linear_end": 2.0}])
def test_a_schedule_that_cannot_be_is_refused(impossible, small_file, written):
    path = written(yaml.safe_dump({"model": {"params": SMALL["model"]["params"] | impossible}}))
    with pytest.raises(InputError, match=f"--config {path}: "):
        single_file.read(small_file, Asked(config=path))


def test_a_schedule_that_the_tensors_contradict(small_file, written, random_tensors, tmp_path):
    from safetensors.torch import load_file

    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    save_file(load_file(small_file) | {"betas": betas.float()}, path := tmp_path / "other.safetensors")
    with pytest.raises(
        InputError, match="is scaled_linear 0.00085 0.012 in 1000 steps, and scaled_linear 0.0015 0.0195"
    ):
        single_file.read(path, Asked(config=written(SMALL)))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("model: [", "while parsing"),
        ("- 1", "has no model.params"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("model: {params: {unet_config: {params: {channel_mult: 3}}}}", "is not such a YAML"),
        ("model: {params: {beta_schedule: sqrt, ddconfig: {}}}", "beta_schedule sqrt is none of linear"),
        ("model: {params: {parameterization: u, ddconfig: {}}}", "parameterization u is none of eps"),
    ],
)
def test_what_is_no_such_yaml(text, what, facts):
    with pytest.raises(InputError) as error:
        facts(text)
    assert str(error.value).startswith(f"--config original.yaml: {what}")
    assert "\n" not in str(error.value)


def test_edm_scaling_and_missing_files_are_refused(facts, tmp_path):
    for scaling in ("EDMScaling", "VScalingWithEDMcNoise"):
        with pytest.raises(InputError, match=f"scaling {scaling} is none of"):
            facts(sgm(SDXL, scaling))
    with pytest.raises(InputError, match="No such file"):
        original.read(tmp_path / "none.yaml", "--config none.yaml")
