"""Folders of diffusers in: our forwards are theirs, whatever the files are called; the rest is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from ldm.checkpoints.foreign import folder_in
from ldm.checkpoints.foreign.components import autoencoder_section, text_section, unet_section
from ldm.checkpoints.importing import store
from ldm.checkpoints.model import Asked
from ldm.config import build
from ldm.errors import InputError
from ldm.types import Batch, Conditioning

diffusers = pytest.importorskip("diffusers")

FAMILIES = ["sd1", "sd2", "sd1_inpaint", "sd2_depth", "upscaler", "sdxl", "sdxl_inpaint"]
PROMPTS = ["a red apple", "", "Caf\u00e9, #1 (really)"]


def filled(model, name):
    network = build(model.config[name])
    network.load_state_dict({key: value.read() for key, value in model.of(name).items()})
    return network.eval().requires_grad_(False)


def close(ours, theirs):
    assert theirs.abs().max() > 1e-4
    assert ((ours - theirs).norm() / theirs.norm()).item() <= 1e-5


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_networks_of_a_pipeline_compute_the_same(saved, family):
    pipe, folder = saved(family)
    model = folder_in.read(folder, Asked())
    assert model.facts["family"] == family
    with torch.no_grad():
        unet, network = pipe.unet, filled(model, "backbone")
        x, time = normal(2, unet.config.in_channels, 16, 16), torch.tensor([981.0, 3.0])
        context = normal(2, 7, unet.config.cross_attention_dim, seed=1)
        given, label, pooled = {}, None, None
        if unet.config.addition_embed_type:
            sizes = torch.tensor([[64, 64, 0, 8, 64, 32]]).expand(2, -1)
            given = {"added_cond_kwargs": {"text_embeds": normal(2, 20, seed=2), "time_ids": sizes}}
            parts = build(model.config["conditioner"]["parts"]["sizes"])
            batch = Batch(torch.arange(2), torch.ones(2), original_size=sizes[:, :2], crop=sizes[:, 2:4])
            batch = Batch(**vars(batch) | {"target_size": sizes[:, 4:]})
            pooled = torch.cat([normal(2, 20, seed=2), parts(batch).pooled], 1)
        if unet.config.num_class_embeds:
            label = torch.tensor([20, 350])
        theirs = unet(x, time, context, class_labels=label, **given).sample
        close(network(x, time, Conditioning(context, pooled=pooled, label=label)), theirs)

        images = normal(2, 3, 32, 64).clamp(-1, 1)
        autoencoder = filled(model, "autoencoder")
        posterior = pipe.vae.encode(images).latent_dist
        close(autoencoder.moments(images), posterior.parameters)
        close(autoencoder.encode(images), posterior.mean * pipe.vae.config.scaling_factor)
        latents = normal(2, 4, 8, 8)
        close(autoencoder.decode(latents), pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample)


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_become_the_same_context(saved, family):
    pipe, folder = saved(family)
    model = folder_in.read(folder, Asked())
    conditioner = filled(model, "conditioner")
    names = [
        name for name in getattr(conditioner, "parts", {"": 0}) if name in ("", "text", "clip_l", "big_g")
    ]
    texts = [conditioner.parts[name] if name else conditioner for name in names]
    batch = Batch(torch.arange(3), torch.ones(3), caption=PROMPTS)
    found = [part(batch) for part in texts]
    nothing = [part.null(given) for part, given in zip(texts, found, strict=True)]
    theirs = pipe.encode_prompt(
        PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    close(torch.cat([one.context for one in found], -1), theirs[0])
    null = torch.cat([one.context for one in nothing], -1)
    torch.testing.assert_close(null, theirs[1], rtol=1e-5, atol=1e-6)
    if len(theirs) == 4:
        close(found[1].pooled, theirs[2])
        assert torch.equal(nothing[1].pooled, theirs[3])


VARIANTS = {
    "fp16": {"variant": "fp16"},
    "shards": {"max_shard_size": "150KB"},
    "bin": {"safe_serialization": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_files(peers, tmp_path, variant, saved):
    pipe, folder = saved("sd1")
    whole = folder_in.read(folder, Asked())
    there = tmp_path / variant
    pipe.save_pretrained(there, **VARIANTS[variant])
    for file in [*there.rglob("*.fp16.*")]:  # as published: it is half precision that has this name
        half(file)
    if variant == "bin":  # transformers 5 does not write it any more
        torch.save(pipe.text_encoder.state_dict(), there / "text_encoder" / "pytorch_model.bin")
        (there / "text_encoder" / "model.safetensors").unlink()
    model = folder_in.read(there, Asked())
    assert model.tensors.keys() == whole.tensors.keys()
    for name, value in model.tensors.items():
        expected = whole.tensors[name].read()
        assert torch.equal(value.read(), expected.half() if variant == "fp16" else expected), name
    noted = [note for note in model.facts["notes"] if note.startswith("weights of")]
    assert len(noted) == (0 if variant == "shards" else 3)
    assert (len(list(there.rglob("*index*"))) > 1) == (variant == "shards")


def half(file):
    from safetensors.torch import load_file, save_file

    save_file({name: value.half() for name, value in load_file(file).items()}, file)


def test_full_precision_goes_before_half(saved, tmp_path):
    pipe, folder = saved("sd1")
    shutil.copytree(folder, tmp_path / "both")
    file = tmp_path / "both" / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    half(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    model = folder_in.read(tmp_path / "both", Asked())
    assert model.tensors["backbone.conv_in.weight"].dtype == torch.float32
    torch.save(pipe.unet.state_dict(), file.with_suffix(".bin"))
    file.unlink()
    model = folder_in.read(tmp_path / "both", Asked())
    assert model.tensors["backbone.conv_in.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [
        {"mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False},
        {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 3.0, 4.0]},
        {"shift_factor": 0.3},
        {
            "down_block_types": ["DownEncoderBlock2D"] * 2 + ["AttnDownEncoderBlock2D"],
            "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 2,
        },
    ],
)
def test_an_autoencoder_alone(peers, tmp_path, options):
    vae = peers.autoencoder(**options)
    vae.save_pretrained(tmp_path)
    model = folder_in.read(tmp_path, Asked())
    assert (model.facts["family"], model.config["noise_scheduler"]) == ("autoencoder_kl", None)
    ours, images = filled(model, "autoencoder"), normal(1, 3, 32, 32)
    c, scale = vae.config, vae.config.scaling_factor
    with torch.no_grad():
        mean = vae.encode(images).latent_dist.mean
        close(ours.moments(images)[:, :4], mean)
        expected = (mean - (c.shift_factor or 0)) * scale
        if c.latents_mean:
            shift, std = (torch.tensor(v).view(1, 4, 1, 1) for v in (c.latents_mean, c.latents_std))
            expected = (mean - shift) * scale / std
        latents = ours.encode(images)
        close(latents, expected)
        close(ours.decode(latents), vae.decode(mean).sample)


def test_a_codebook_alone(peers, tmp_path):
    vae = peers.autoencoder("vq", scale=0.5)
    vae.save_pretrained(tmp_path)
    model = folder_in.read(tmp_path, Asked())
    ours, images = filled(model, "autoencoder"), normal(1, 3, 32, 32)
    with torch.no_grad():
        close(ours.encode(images), vae.encode(images).latents * 0.5)
        close(ours.decode(normal(1, 4, 8, 8) * 0.5), vae.decode(normal(1, 4, 8, 8)).sample)
    assert model.facts["family"] == "autoencoder_vq"


def test_a_unet_alone(peers, tmp_path):
    peers.unet("sdxl").save_pretrained(tmp_path)
    model = folder_in.read(tmp_path, Asked())
    assert model.facts["family"] == "unet"
    assert all(name.startswith("backbone.") for name in model.tensors)
    assert torch.equal(
        model.tensors["backbone.conv_in.weight"].read(), peers.unet("sdxl").conv_in.weight.detach()
    )


def change(folder, file, **fields):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 16]}
REFUSED = [
    (unet_section, {"class_embed_type": "projection"}),
    (unet_section, {"encoder_hid_dim": 5}),
    (unet_section, {"encoder_hid_dim_type": "text_proj"}),
    (unet_section, {"resnet_time_scale_shift": "scale_shift"}),
    (unet_section, {"dual_cross_attention": True}),
    (unet_section, {"time_cond_proj_dim": 256}),
    (unet_section, {"act_fn": "gelu"}),
    (unet_section, {"freq_shift": 1}),
    (unet_section, {"flip_sin_to_cos": False}),
    (unet_section, {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}),
    (unet_section, {"addition_embed_type": "text"}),
    (unet_section, {"center_input_sample": True}),
    (unet_section, {"only_cross_attention": True}),
    (unet_section, {"norm_eps": 1e-6}),
    (unet_section, {"down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]}),
    (unet_section, {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}),
    (unet_section, {"transformer_layers_per_block": [[1, 1], 1]}),
    (unet_section, {"cross_attention_dim": [16, 24]}),
    (autoencoder_section, {"act_fn": "relu"}),
    (autoencoder_section, {"use_post_quant_conv": False}),
    (autoencoder_section, {"norm_type": "spatial"}),
    (autoencoder_section, {"vq_embed_dim": 7}),
    (autoencoder_section, {"scaling_factor": 0}),
    (autoencoder_section, {"scaling_factor": -1.0}),
    (autoencoder_section, {"scaling_factor": float("nan")}),
    (autoencoder_section, {"scaling_factor": "x"}),
    (autoencoder_section, {"shift_factor": float("inf")}),
    (autoencoder_section, {"latents_std": [1.0, 0, 1.0, 1.0]}),
    (text_section, {"hidden_act": "relu"}),
    (text_section, {"intermediate_size": 48}),
    (text_section, {"layer_norm_eps": 1e-6}),
    (text_section, {"vocab_size": 1000}),
]


@pytest.mark.parametrize(("section", "fields"), REFUSED)
def test_what_is_not_here_is_refused_by_field_and_value(peers, section, fields):
    usual = {unet_section: json.loads(peers.unet("sd1").to_json_string()), autoencoder_section: VAE}.get(
        section, {}
    )
    options = (False,) if section is text_section else ()
    section(usual, "config.json", *options)
    with pytest.raises(InputError) as error:
        section(usual | fields, "config.json", *options)
    (name, value), text = next(iter(fields.items())), str(error.value)
    assert text.startswith("config.json")
    assert name in text
    for word in value if isinstance(value, list) else [value]:
        assert str(word) in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("file", "fields", "word"),
    [
        ("unet/config.json", {"act_fn": "gelu"}, "unet/config.json: act_fn='gelu'"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "_class_name=AutoencoderTiny"),
        ("tokenizer/tokenizer_config.json", {"pad_token": "<pad>"}, "pad_token='<pad>'"),
        ("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}, "_class_name=LCMScheduler"),
        (
            "model_index.json",
            {"_class_name": "StableDiffusion3Pipeline"},
            "_class_name=StableDiffusion3Pipeline",
        ),
        (
            "model_index.json",
            {"text_encoder": ["transformers", "T5EncoderModel"]},
            "text_encoder=T5EncoderModel",
        ),
    ],
)
def test_what_is_not_here_is_refused_by_file(saved, tmp_path, file, fields, word):
    shutil.copytree(saved("sd1")[1], tmp_path / "changed")
    change(tmp_path / "changed", file, **fields)
    with pytest.raises(InputError, match=word):
        folder_in.read(tmp_path / "changed", Asked())


UNET, VAE_FILE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"
NONSENSE = [
    ("sd1", SCHEDULER, {"num_train_timesteps": "x"}, "num_train_timesteps='x'"),
    ("sd1", SCHEDULER, {"steps_offset": "x"}, "steps_offset='x'"),
    ("sd1", SCHEDULER, {"timestep_spacing": []}, ""),
    ("sd1", SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": "x"}, "'x'"),
    ("sd1", UNET, {"sample_size": "64"}, "sample_size='64'"),
    ("sd1", UNET, {"sample_size": -8}, "sample_size=-8"),
    ("sd1", UNET, {"sample_size": [None]}, "sample_size="),
    ("sd1", UNET, {"attention_head_dim": -1}, "attention_head_dim=-1"),
    ("sd1", UNET, {"attention_head_dim": None}, ""),
    ("sd1", UNET, {"block_out_channels": None}, ""),
    ("sd1", UNET, {"down_block_types": None}, ""),
    ("sd1", UNET, {"norm_num_groups": 0}, "norm_groups 0"),
    ("sd1", UNET, {"mid_block_type": None}, "mid_block_type=None"),
    ("sd1", UNET, {"cross_attention_dim": []}, ""),
    ("sd1", VAE_FILE, {"block_out_channels": 8}, ""),
    ("sd1", VAE_FILE, {"norm_num_groups": 0}, ""),
    ("sd1", TEXT, {"num_attention_heads": 7}, "num_attention_heads=7 do not divide hidden_size"),
    ("sd1", TEXT, {"num_attention_heads": 0}, "num_attention_heads=0"),
    ("sd1", TEXT, {"num_attention_heads": None}, ""),
    ("sd1", TEXT, {"hidden_size": "x"}, ""),
    ("sd1", TEXT, {"num_hidden_layers": None}, ""),
    ("sd1", TEXT, {"vocab_size": None}, ""),
    ("sd1", TEXT, {"text_config": [1]}, ""),
    ("sd1", "tokenizer/tokenizer.json", {"model": None}, ""),
    ("sd1", "tokenizer/tokenizer_config.json", {"pad_token": {"a": 1}}, ""),
    ("sd1", INDEX, {"text_encoder": "x"}, "text_encoder=x"),
    ("sd1", INDEX, {"text_encoder": [{}, {}]}, "text_encoder="),
    ("sdxl", UNET, {"addition_time_embed_dim": 7}, "addition_time_embed_dim=7"),
    ("sdxl", UNET, {"addition_time_embed_dim": "x"}, "addition_time_embed_dim='x'"),
    ("upscaler", INDEX, {"max_noise_level": "x"}, "max_noise_level='x'"),
]


@pytest.mark.parametrize(("family", "file", "fields", "word"), NONSENSE)
def test_values_that_make_no_sense_are_refused_by_file(saved, tmp_path, family, file, fields, word):
    shutil.copytree(saved(family)[1], tmp_path / "changed")
    change(tmp_path / "changed", file, **fields)
    with pytest.raises(InputError) as error:
        folder_in.read(tmp_path / "changed", Asked())
    assert file.split("/")[0] in str(error.value)
    assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "file", "fields", "word"),
    [
        ("sd1", SCHEDULER, {"num_train_timesteps": 0}, "num_train_timesteps=0 is below 3"),
        ("sd1", SCHEDULER, {"beta_start": "x"}, "'str'"),
        ("sd1", SCHEDULER, {"rescale_betas_zero_snr": True}, "prediction_type=epsilon is mute"),
        ("upscaler", "low_res_scheduler/scheduler_config.json", {"beta_end": 2}, "beta_end=2"),
    ],
)
def test_noise_schedulers_that_cannot_be_are_not_imported(saved, tmp_path, family, file, fields, word):
    shutil.copytree(saved(family)[1], tmp_path / "changed")
    change(tmp_path / "changed", file, **fields)
    with pytest.raises(InputError, match=f"changed: noise_scheduler: .*{word}"):
        store(folder_in.read(tmp_path / "changed", Asked()), tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_document_too_deep_for_its_reader_is_one_line(saved, tmp_path):
    (tmp_path / "model_index.json").write_text('{"a":' + 100_000 * "[" + 100_000 * "]" + "}")
    with pytest.raises(InputError, match="model_index.json: cannot be read as JSON"):
        folder_in.read(tmp_path, Asked())


def test_attention_in_full_precision_is_noted(saved, tmp_path):
    shutil.copytree(saved("sd1")[1], tmp_path / "changed")
    change(tmp_path / "changed", UNET, upcast_attention=True)
    notes = folder_in.read(tmp_path / "changed", Asked()).facts["notes"]
    assert "attention of unet is to be computed in float32 (upcast_attention)" in notes


@pytest.mark.parametrize(
    ("lost", "word"),
    [
        ("unet", "unet"),
        ("scheduler", "scheduler"),
        ("text_encoder", "text_encoder/config.json"),
        ("vae/config.json", "vae/config.json"),
        ("unet/diffusion_pytorch_model.safetensors", "no weights"),
        ("tokenizer/tokenizer.json", "tokenizer/tokenizer.json"),
        ("model_index.json", "no diffusers folder"),
    ],
)
def test_a_missing_file_is_named(saved, tmp_path, lost, word):
    there = tmp_path / "folder"
    shutil.copytree(saved("sd1")[1], there)
    shutil.rmtree(there / lost) if (there / lost).is_dir() else (there / lost).unlink()
    with pytest.raises(InputError, match=word):
        folder_in.read(there, Asked())


def test_a_missing_shard_and_a_path_out_of_the_folder_are_refused(peers, tmp_path):
    peers.autoencoder().save_pretrained(tmp_path, max_shard_size="50KB")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    (tmp_path / shards[1]).rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(InputError, match=shards[1]):
        folder_in.read(tmp_path, Asked())
    for listed in ({"a": "../x.safetensors"}, {"a": 1}, {}, ["a"], None):
        index.write_text(json.dumps({"weight_map": listed}))
        with pytest.raises(InputError, match="is no index of files beside it"):
            folder_in.read(tmp_path, Asked())


def test_another_vocabulary_is_refused(saved, tmp_path):
    there = tmp_path / "folder"
    shutil.copytree(saved("sd1")[1], there)
    file = there / "tokenizer" / "tokenizer.json"
    found = json.loads(file.read_text())
    words = found["model"]["vocab"]
    words["apple</w>"], words["red</w>"] = words["red</w>"], words["apple</w>"]
    file.write_text(json.dumps(found))
    with pytest.raises(InputError, match="vocabulary"):
        folder_in.read(there, Asked())


def test_the_user_knows_the_prediction_type_better(saved):
    model = folder_in.read(saved("sd1")[1], Asked(prediction_type="v_prediction"))
    assert model.config["noise_scheduler"]["prediction_type"] == "v_prediction"
    assert any("epsilon" in note for note in model.facts["notes"])


def test_channels_that_a_pipeline_does_not_give_are_refused(saved, tmp_path):
    shutil.copytree(saved("sd1_inpaint")[1], tmp_path / "folder")
    change(tmp_path / "folder", "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(InputError, match="in_channels=9, but a StableDiffusionPipeline tells it 4"):
        folder_in.read(tmp_path / "folder", Asked())


def test_inpainting_pipelines_may_hold_ordinary_networks(saved, tmp_path):
    shutil.copytree(saved("sd1")[1], tmp_path / "folder")
    change(tmp_path / "folder", "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    assert folder_in.read(tmp_path / "folder", Asked()).facts["family"] == "sd1"
