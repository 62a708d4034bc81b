"""Single files of each family: the numbers of diffusers and transformers in every layout; what is refused."""

from __future__ import annotations

import functools
import itertools
import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoints.foreign import single_file
from ldm.checkpoints.foreign.betas import _alpha_bar, table_of
from ldm.checkpoints.foreign.names import ema_name
from ldm.checkpoints.lazy import LazyTensor
from ldm.checkpoints.model import Asked, Model
from ldm.config import build
from ldm.diffusion.noise_scheduler import VariancePreserving
from ldm.errors import InputError
from ldm.nn.embeddings import sinusoid
from ldm.types import Batch, Conditioning

pytest.importorskip("diffusers")
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint  # noqa: E402

from .single_files import (  # noqa: E402
    AUTOENCODERS,
    FIRST_STAGES,
    PREDICTIONS,
    UNETS,
    asked,
    autoencoder_peer,
    below,
    redrawn,
    relative,
    schedule,
    tower_peer,
    unet_peer,
    zero_terminal,
)

UNET, FIRST = "model.diffusion_model.", "first_stage_model."
TABLES = {"upscaler": (0.0001, 0.02), "ldm_class": (0.0015, 0.0195)}


@pytest.fixture(scope="session")
def small(sd_names):
    """family -> tensors of its small single file, made once; `tiny` is of SD 1's kind, with two levels."""
    tiny = {
        UNET: sd_names.unet((32, 64), (1, 0), context=32, layers=(1, 1)),
        FIRST: sd_names.autoencoder((32, 32), 4),
        "cond_stage_model.transformer.": sd_names.clip(32, 1, vocab=64),
    }

    @functools.cache
    def tensors(family: str) -> dict:
        if family == "tiny":
            shapes = {prefix + name: size for prefix, part in tiny.items() for name, size in part.items()}
            return redrawn(shapes) | schedule()
        made = redrawn(sd_names.single_file(family, small=True, with_buffers=False))
        return made | ({} if family.startswith("sdxl") else schedule(*TABLES.get(family, (0.00085, 0.012))))

    return tensors


@pytest.fixture(scope="session")
def models(small, tmp_path_factory):
    """family -> the Model of its small single file, read once."""

    @functools.cache
    def model(family: str) -> Model:
        path = tmp_path_factory.mktemp(family) / "model.safetensors"
        save_file({key: value.contiguous() for key, value in small(family).items()}, path)
        return single_file.read(path, asked(family))

    return model


@pytest.fixture
def opened(tmp_path):
    """(tensors, asked, name, metadata) -> the Model of a file that holds them, in a folder of its own."""
    count = itertools.count()

    def read(tensors, given=None, name="model.safetensors", metadata=None, **other) -> Model:
        path = tmp_path / str(next(count)) / name
        path.parent.mkdir()
        if path.suffix == ".safetensors":
            save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
        else:
            torch.save({"state_dict": tensors, **other}, path)
        return single_file.read(path, given or Asked())

    return read


def network(model: Model, name: str) -> torch.nn.Module:
    """Built of its config section, and filled, each tensor."""
    built = build(model.config[name])
    built.load_state_dict({key: value.read() for key, value in model.of(name).items()}, strict=True)
    return built.eval()


def refusal(read, *args, **kwargs) -> str:
    with pytest.raises(InputError) as error:
        read(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- the same numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", UNETS)
@torch.no_grad()
def test_unet_gives_diffusers_numbers(family, small, models):
    model = models(family)
    assert model.facts["family"] == family
    ours, theirs = network(model, "backbone"), unet_peer(family, small(family))
    torch.manual_seed(0)
    x, time = torch.randn(2, ours.in_channels, 16, 16), torch.tensor([3, 801])
    context = torch.randn(2, 77, ours.context_dim)
    told, said = {}, {}
    if ours.pooled_dim:
        text, sizes = torch.randn(2, 48), torch.tensor([[64, 64, 0, 8, 64, 32]] * 2)
        told["pooled"] = torch.cat([text, sinusoid(sizes.flatten(), 16).view(2, -1)], 1)
        said["added_cond_kwargs"] = {"text_embeds": text, "time_ids": sizes}
    if ours.num_classes:
        told["label"] = said["class_labels"] = torch.tensor([20, 999])
    out = ours(x, time.float(), Conditioning(context=context, **told))
    assert relative(out, theirs(x, time, context, **said).sample) <= 1e-5


@pytest.mark.parametrize("name", AUTOENCODERS)
@torch.no_grad()
def test_autoencoder_gives_diffusers_numbers(name, sd_names, opened):
    tensors = redrawn(sd_names.network(name, small=True))
    model = opened(tensors, Asked(latent_scale=0.5))
    assert model.facts["family"] == ("autoencoder_vq" if name.startswith("vq") else "autoencoder_kl")
    assert {key for key, section in model.config.items() if section is None} == {
        "conditioner",
        "backbone",
        "noise_scheduler",
        "sampler",
        "sampling",
    }
    ours, theirs = network(model, "autoencoder"), autoencoder_peer(name, tensors)
    torch.manual_seed(0)
    images, z = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, ours.latent_channels, 4, 4)
    found = theirs.encode(images)
    moments = found.latents if name.startswith("vq") else found.latent_dist.parameters
    if not name.startswith("vq"):
        assert (moments.chunk(2, 1)[1].abs() < 20).all()  # theirs are clamped, ours not yet
    assert relative(ours.moments(images), moments) <= 1e-5
    assert relative(ours.decode(0.5 * z), theirs.decode(z).sample) <= 1e-5


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd1_inpaint", "upscaler"])
@torch.no_grad()
def test_text_towers_give_transformers_numbers(family, small, models):
    conditioner = network(models(family), "conditioner")
    captions = ["a red apple on a blue background", ""]
    batch = Batch(torch.arange(2), torch.ones(2), caption=captions)
    parts = getattr(conditioner, "parts", {"text": conditioner})
    ours = {name: part(batch) for name, part in parts.items() if part.tokenizer}
    tokens = {name: parts[name].tokenizer(captions) for name in ours}
    if "clip_l" in ours:
        tower = tower_peer(below(small(family), "conditioner.embedders.0.transformer."), 32, 2, 32, True)
        hidden = tower(tokens["clip_l"], output_hidden_states=True).hidden_states[1]
        assert relative(ours["clip_l"].context, hidden) <= 1e-5
        tower = tower_peer(below(small(family), "conditioner.embedders.1.model."), 64, 3, 48, False)
        found = tower(tokens["big_g"], output_hidden_states=True)
        assert relative(ours["big_g"].context, found.hidden_states[-2]) <= 1e-5
        assert relative(ours["big_g"].pooled, found.text_embeds) <= 1e-5
        assert (tokens["clip_l"][1, 2:] == 49407).all()
        assert (tokens["big_g"][1, 2:] == 0).all()
    elif family.startswith("sd1"):
        tower = tower_peer(below(small(family), "cond_stage_model.transformer."), 32, 2, 32, True)
        assert relative(ours["text"].context, tower(tokens["text"]).last_hidden_state) <= 1e-5
        assert (tokens["text"][1, 2:] == 49407).all()
    else:
        tower = tower_peer(below(small(family), "cond_stage_model.model."), 48, 3, 48, False)
        hidden = tower(tokens["text"], output_hidden_states=True).hidden_states[-2]
        expected = tower.text_model.final_layer_norm(hidden)
        assert relative(ours["text"].context, expected) <= 1e-5
        assert (tokens["text"][1, 2:] == 0).all()


@pytest.mark.parametrize("family", UNETS)
def test_every_section_builds_and_takes_its_tensors(family, models):
    model = models(family)
    networks = {name: network(model, name) for name in ("autoencoder", "conditioner", "backbone")}
    conditioner, backbone = networks["conditioner"], networks["backbone"]
    conditioner.use_autoencoder(networks["autoencoder"])
    assert (conditioner.context_dim, conditioner.pooled_dim) == (backbone.context_dim, backbone.pooled_dim)
    assert conditioner.num_classes == backbone.num_classes
    assert backbone.out_channels + conditioner.concat_channels == backbone.in_channels
    scheduler = build(model.config["noise_scheduler"])
    assert scheduler.prediction_type == PREDICTIONS.get(family, "epsilon")
    assert (scheduler.beta_start, scheduler.beta_end) == TABLES.get(family, (0.00085, 0.012))
    assert torch.equal(
        networks["autoencoder"].latent_scale, torch.full_like(networks["autoencoder"].latent_scale, 0.5)
    )
    assert scheduler.grid(model.config["sampling"]["num_steps"], model.config["sampling"]["spacing"])
    assert model.config["run_name"] == "model"
    first_stage = FIRST_STAGES.get(family, "kl_f8")
    assert networks["autoencoder"].factor == 2 ** (len(AUTOENCODERS[first_stage]["channels"]) - 1)


# ---- layouts -------------------------------------------------------------------------------------------


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].read(), b[name].read()) for name in a)


def averaged(tensors, factor=0.5) -> dict:
    """Averages as LitEma keeps them."""
    own = {ema_name(name): factor * value for name, value in tensors.items() if name.startswith(UNET)}
    return own | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(12)}


def test_averages_are_read_beside_the_weights(small, models, opened):
    family = "tiny"
    plain = models(family)
    full = opened(small(family) | averaged(small(family)), asked(family), "full.ckpt", global_step=470000)
    assert same(full.tensors, plain.tensors)
    backbone = {name: value for name, value in plain.tensors.items() if name.startswith("backbone.")}
    assert full.ema.keys() == backbone.keys()
    assert all(torch.equal(2 * full.ema[name].read(), value.read()) for name, value in backbone.items())
    assert (full.facts["step"], full.facts["weights"], plain.ema) == (470000, "raw, ema", {})


def test_averages_alone_become_the_weights(small, models, opened):
    tensors = small("tiny")
    rest = {name: value for name, value in tensors.items() if not name.startswith(UNET)}
    alone = opened(rest | averaged(tensors, 1.0), asked("tiny"))
    assert same(alone.tensors, models("tiny").tensors)
    assert (alone.ema, alone.facts["weights"]) == ({}, "ema")
    assert any("averages" in note for note in alone.facts["notes"])


def test_averages_renamed_into_the_weights(small, models, opened):
    decay = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(12)}
    renamed = opened(small("tiny") | decay, asked("tiny"))
    assert same(renamed.tensors, models("tiny").tensors)
    assert (renamed.ema, renamed.facts["weights"]) == ({}, "ema")


@pytest.mark.parametrize("name", ["kl_f4", "vq_f8"])
def test_averages_of_an_autoencoder(name, small, sd_names, opened):
    own = redrawn(sd_names.network(name, small=True))
    counts = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(12)}
    averages = {f"model_ema.{key.replace('.', '')}": 0.5 * value for key, value in own.items()}
    more = counts | averages | {"model_ema.losslogvar": torch.zeros(())}
    given, plain = Asked(latent_scale=0.5), opened(own, Asked(latent_scale=0.5))
    for prefix in ("", FIRST):
        found = opened({prefix + key: value for key, value in (own | more).items()}, given)
        assert same(found.tensors, plain.tensors)
        assert found.ema.keys() == {key for key in plain.tensors if "latent_s" not in key}
        assert all(torch.equal(2 * v.read(), plain.tensors[key].read()) for key, v in found.ema.items())
        assert found.facts["weights"] == "raw, ema"
    assert opened(own | counts, given).facts["weights"] == "raw"
    if name == "vq_f8":
        del more["model_ema.quantizeembeddingweight"]
        assert len(opened(own | more, given).ema) == len(own) - 1
    del more["model_ema.encoderconv_inweight"]
    assert "its averages: 1 of " in refusal(opened, own | more, given)
    whole = small("tiny") | {f"{FIRST}model_ema.encoderconv_inweight": torch.zeros(1)}
    model = opened(whole, asked("tiny"))
    assert (model.ema, model.facts["weights"]) == ({}, "raw")
    assert any(note.startswith("averages of its autoencoder are left out") for note in model.facts["notes"])


@pytest.mark.parametrize("family", ["tiny", "sdxl"])
def test_a_unet_alone_in_each_layout(family, small, models, opened):
    whole = models(family)
    expected = {name: value for name, value in whole.tensors.items() if name.startswith("backbone.")}
    own = below(small(family), UNET)
    config = {
        "tiny": {"layers_per_block": 1},
        "sdxl": {"layers_per_block": 2, "addition_embed_type": "text_time"},
    }
    peer = convert_ldm_unet_checkpoint(small(family), config[family])
    homes = ((UNET, own), ("", own), ("", peer), ("unet.", peer), (UNET, peer), ("diffusion_model.", own))
    for prefix, tensors in homes:
        alone = opened({prefix + name: value for name, value in tensors.items()}, asked(family))
        assert same(alone.tensors, expected)
        assert alone.config["backbone"] == whole.config["backbone"]
        assert (alone.config["autoencoder"], alone.config["conditioner"]) == (None, None)
        assert {"it has no autoencoder", "it has no text tower"} <= set(alone.facts["notes"])


@pytest.mark.parametrize("name", ["kl_f8", "vq_f8"])
def test_an_autoencoder_alone_in_each_layout(name, sd_names, opened):
    tensors = redrawn(sd_names.network(name, small=True))
    peer = autoencoder_peer(name, tensors).state_dict()
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in peer.items():
        for new, before in renamed.items() if ".attentions." in key else ():
            key = key.replace(f".{new}.", f".{before}.")
        old[key] = value
    training = tensors | {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(1)}
    given = Asked(latent_scale=0.5)
    expected = opened(tensors, given)
    for prefix, found in (
        ("", training),
        (FIRST, tensors),
        ("", peer),
        (FIRST, peer),
        ("", old),
        ("vae.", peer),
    ):
        alone = opened({prefix + key: value for key, value in found.items()}, given)
        assert same(alone.tensors, expected.tensors)
        assert alone.config["autoencoder"] == expected.config["autoencoder"]


def test_what_a_codebook_of_running_means_keeps_is_left_out(sd_names, opened):
    tensors = redrawn(sd_names.network("vq_f4", small=True))
    more = {
        "quantize.embedding.cluster_size": torch.ones(64),
        "quantize.embedding.embed_avg": torch.ones(64, 3),
    }
    given = Asked(latent_scale=0.5)
    assert same(opened(tensors | more, given).tensors, opened(tensors, given).tensors)


def test_half_precision_torch_files_and_older_names(small, models, opened):
    family = "tiny"
    plain = models(family)
    half = {
        name: value.half() if value.is_floating_point() else value for name, value in small(family).items()
    }
    halved = opened(half, asked(family), "model.pt")
    assert halved.config | {"run_name": ""} == plain.config | {"run_name": ""}
    assert all(
        torch.equal(halved.tensors[n].read(), v.to(halved.tensors[n].dtype).read())
        for n, v in plain.tensors.items()
    )
    assert halved.tensors["backbone.conv_in.weight"].dtype == torch.float16
    older = {name.replace(".text_model.", "."): value for name, value in small(family).items()}
    assert same(opened(older, asked(family)).tensors, plain.tensors)


# ---- facts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (schedule(0.0015, 0.0155), ("scaled_linear", 0.0015, 0.0155, False)),
        (schedule(0.0001, 0.02, "linear"), ("linear", 0.0001, 0.02, False)),
        ({"betas": schedule()["betas"]}, ("scaled_linear", 0.00085, 0.012, False)),
        ({"betas": schedule()["betas"].half()}, ("scaled_linear", 0.00085, 0.012, False)),
        (
            {"alphas_cumprod": schedule(0.0015, 0.0205)["alphas_cumprod"]},
            ("scaled_linear", 0.0015, 0.0205, False),
        ),
        (zero_terminal(), ("scaled_linear", 0.00085, 0.012, True)),
    ],
)
def test_the_table_of_a_file_is_recovered(table, expected):
    found = table_of({name: LazyTensor.of(value) for name, value in table.items()}, "file")
    assert found == (expected[:3], 1000, expected[3])


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_tables_without_torch_are_those_of_the_noise_scheduler(name, ends):
    process = VariancePreserving(37, name, 0.002, 0.3, zero_terminal_snr=ends, prediction_type="v_prediction")
    squared = process.alpha(torch.arange(37, dtype=torch.float64)) ** 2
    ours = torch.tensor(_alpha_bar((name, 0.002, 0.3), 37, ends), dtype=torch.float64)
    torch.testing.assert_close(ours, squared, rtol=1e-12, atol=1e-15)


def test_a_strange_table_is_refused():
    strange = {"betas": LazyTensor.of(torch.linspace(0.3, 0.001, 1000))}
    assert "is none that this house has" in refusal(table_of, strange, "file")
    short = {"betas": LazyTensor.of(torch.tensor([0.1, 0.2]))}
    assert "its noise schedule has 2 steps" in refusal(table_of, short, "file")
    flat = {"alphas_cumprod": LazyTensor.of(torch.zeros(4))}
    assert "is none that this house has" in refusal(table_of, flat, "file")


@pytest.mark.parametrize("mark", [zero_terminal(), {"ztsnr": torch.zeros(0)}])
def test_zero_terminal_snr_is_sampled_as_it_must_be(mark, small, opened):
    rest = {name: value for name, value in small("tiny").items() if name not in ("betas", "alphas_cumprod")}
    model = opened(rest | mark, asked("tiny", prediction_type="v_prediction"))
    section = model.config["noise_scheduler"]
    assert (section["zero_terminal_snr"], section["steps_offset"]) == (True, 0)
    assert model.config["sampling"]["spacing"] == "trailing"
    assert build(section).first.alpha == 0
    line = refusal(opened, rest | mark, asked("tiny"))
    assert (
        "its noise schedule ends in pure noise, of which prediction type epsilon says nothing; give" in line
    )


def test_marks_and_metadata_tell_what_shapes_cannot(small, opened):
    open_type = asked("tiny", prediction_type=None)
    marked = opened(small("tiny") | {"v_pred": torch.zeros(0)}, open_type)
    assert marked.config["noise_scheduler"]["prediction_type"] == "v_prediction"
    spec = {
        "modelspec.prediction_type": "v",
        "modelspec.title": "Apples",
        "modelspec.author": "me",
        "modelspec.license": "CC0",
        "format": "pt",
    }
    model = opened(small("tiny"), open_type, metadata=spec)
    assert model.config["noise_scheduler"]["prediction_type"] == "v_prediction"
    facts = {name: model.facts[name] for name in ("title", "author", "licence", "step", "format")}
    assert facts == {
        "title": "Apples",
        "author": "me",
        "licence": "CC0",
        "step": None,
        "format": "single file",
    }
    assert model.facts["metadata"]["modelspec.title"] == "Apples"


@pytest.mark.parametrize(
    ("word", "expected"), [("v-prediction", "v_prediction"), ("sample", "sample"), ("epsilon", "epsilon")]
)
def test_words_of_modelspec(word, expected, small, opened):
    spec = {"modelspec.prediction_type": word}
    model = opened(small("tiny"), asked("tiny", prediction_type=None), metadata=spec)
    assert model.config["noise_scheduler"]["prediction_type"] == expected


def test_the_scale_in_the_file_goes_before_all(small, opened):
    model = opened(small("tiny") | {"scale_factor": torch.tensor(0.25)}, asked("tiny"))
    assert model.config["autoencoder"]["latent_scale"] == 0.25


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_latent_scale_that_destroys_the_autoencoder_is_refused(scale, small, opened):
    line = f"the latent scale {scale} is no finite number above 0"
    assert refusal(opened, small("tiny"), asked("tiny", latent_scale=scale)).startswith(
        f"--latent-scale: {line}"
    )
    own = small("tiny") | {"scale_factor": torch.tensor(scale)}
    assert f"scale_factor: {line}" in refusal(opened, own, asked("tiny"))


def test_the_scale_in_the_file_is_one_number(small, opened):
    two = small("tiny") | {"scale_factor": torch.ones(2)}
    assert "its scale_factor has 2 numbers, not one" in refusal(opened, two, asked("tiny"))
    one = opened(small("tiny") | {"scale_factor": torch.tensor([0.25])}, asked("tiny"))
    note = "latent scale 0.25 is the file's own, and not --latent-scale 0.5"
    assert note in one.facts["notes"]


def test_tensors_of_towers_that_are_left_out_are_named(small, opened):
    assert not any("left out" in note for note in opened(small("tiny"), asked("tiny")).facts["notes"])
    for family, tower, names in (
        ("sd2", "cond_stage_model.model.", ("logit_scale", "text_projection")),
        ("sdxl", "conditioner.embedders.1.model.", ("logit_scale",)),
    ):
        own = {tower + name: torch.zeros(48, 48) for name in names}
        tensors = {name: value for name, value in small(family).items() if name not in own}
        if family == "sdxl":
            own = {name: torch.zeros(()) for name in own}
        notes = opened(tensors | own, asked(family)).facts["notes"]
        assert f"no part of what is computed here, and left out: {', '.join(own)}" in notes


def test_depth_and_missing_parts_are_noted(small, opened):
    model = opened(small("sd2_depth") | {"depth_model.model.x.weight": torch.zeros(1)}, asked("sd2_depth"))
    assert "its network that makes depth maps is left out: give maps" in model.facts["notes"]
    rest = {name: value for name, value in small("tiny").items() if not name.startswith(FIRST)}
    assert opened(rest, asked("tiny")).config["autoencoder"] is None


# ---- asked for -----------------------------------------------------------------------------------------


def test_what_nothing_tells_is_asked_for_in_one_line(small, opened, tmp_path):
    assert refusal(opened, small("tiny"), Asked()) == (
        f"{tmp_path / '0/model.safetensors'}: its tensors do not tell the latent scale nor the heads of "
        "a text tower of width 32 nor the heads of the U-Net nor the prediction type; give --latent-scale S "
        "(0.18215 in Stable Diffusion 1 and 2, 0.13025 in XL) and --text-heads N and --num-heads N or "
        "--head-dim N and --prediction-type epsilon|v_prediction|sample"
    )


def test_answers_that_cannot_be(small, opened):
    assert refusal(opened, small("tiny"), asked("tiny", head_dim=8)) == (
        "--num-heads and --head-dim: both are given; give one of them"
    )
    assert refusal(opened, small("tiny"), asked("tiny", prediction_type="v")) == (
        "--prediction-type v: no such type; have: epsilon, v_prediction, sample"
    )
    assert "multiple of num_heads 5" in refusal(opened, small("tiny"), asked("tiny", num_heads=5))
    assert refusal(opened, small("tiny"), asked("tiny", text_heads=5)) == (
        "--text-heads 5: does not divide the width 32 of its text tower; give another"
    )
    for option, value in itertools.product(("num_heads", "head_dim", "text_heads"), (0, -1)):
        given = asked("tiny", **{"num_heads": None, option: value})
        words = f"--{option.replace('_', '-')} {value}: is no number above 0"
        assert refusal(opened, small("tiny"), given).startswith(words)
    narrow = asked("tiny", num_heads=None, head_dim=24)
    assert "head_dim 24" in refusal(opened, small("tiny"), narrow)
    width = opened(small("tiny"), asked("tiny", num_heads=None, head_dim=8))
    assert width.config["backbone"]["head_dim"] == 8


# ---- refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "holds a LoRA, which"),
        ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "holds a LoRA, which"),
        ("control_model.input_hint_block.0.weight", "holds a ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "holds a ControlNet"),
        ("state.0.exp_avg", "holds the state of an optimizer"),
        ("emb_params", "holds a textual inversion"),
        ("backbone.conv_in.weight", "holds tensors of one of this house's own"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "holds a Stable Diffusion 3 model"),
        ("double_blocks.0.img_attn.qkv.weight", "holds a Flux model"),
        ("noise_augmentor.betas", "holds an unCLIP model"),
        ("cond_stage_model.transformer.token_emb.weight", "holds latent diffusion conditioned on BERT"),
        ("model.diffusion_model.input_blocks.7.1.qkv.weight", "without cross-attention"),
        ("some.thing", "has neither a U-Net nor an autoencoder; it has 1 tensors (some.thing, ...)"),
    ],
)
def test_files_of_another_kind(name, what, opened):
    assert what in refusal(opened, {name: torch.zeros(2, 2)})


def test_the_refiner_is_told(opened, sd_names):
    sizes = {"ins": 4, "context": 1280, "linear": True, "pooled": 2560}
    shapes = sd_names.unet((32, 64), (0, 1), 1, **sizes)
    tensors = {UNET + name: value for name, value in redrawn(shapes).items()}
    assert "the refiner of Stable Diffusion XL; this house has no network" in refusal(opened, tensors)


def test_mixed_files(small, opened):
    tensors = small("tiny")
    peer = convert_ldm_unet_checkpoint(tensors, {"layers_per_block": 1})
    other = opened, tensors | {f"unet.{name}": value.clone() for name, value in peer.items()}, asked("tiny")
    assert "more than one U-Net: under model.diffusion_model. and unet." in refusal(*other)
    both = tensors | {UNET + name: value.clone() for name, value in peer.items()}
    assert "holds the U-Net twice, in CompVis' names and in diffusers'" in refusal(
        opened, both, asked("tiny")
    )
    wide = {name: value for name, value in small("sd2").items() if not name.startswith("cond_stage_model.")}
    swapped = wide | {name: v for name, v in tensors.items() if name.startswith("cond_stage_model.")}
    assert "text towers have width 32, its U-Net takes a context of width 48" in refusal(
        opened, swapped, asked("sd2")
    )
    three = small("ldm_class")
    stages = {name: v for name, v in tensors.items() if not name.startswith(FIRST)}
    stages |= {name: v for name, v in three.items() if name.startswith(FIRST)}
    assert "its U-Net gives 4 channels, its autoencoder has 3" in refusal(opened, stages, asked("tiny"))


def test_missing_and_foreign_tensors_are_named(small, opened):
    tensors = dict(small("tiny"))
    del tensors[f"{UNET}middle_block.2.out_layers.3.bias"]
    tensors[f"{UNET}middle_block.2.out_layer.3.bias"] = torch.zeros(128)
    line = refusal(opened, tensors, asked("tiny"))
    assert "1 of 380 tensors missing (model.diffusion_model.middle_block.2.out_layers.3.bias)" in line
    assert "did you mean model.diffusion_model.middle_block.2.out_layers.3.bias" in line
    assert "1 foreign (junk)" in refusal(opened, small("tiny") | {"junk": torch.zeros(1)}, asked("tiny"))


def test_a_text_tower_that_is_not_whole_is_not_dropped(small, opened):
    tower, given = "cond_stage_model.transformer.text_model.", asked("tiny")
    token = f"{tower}embeddings.token_embedding.weight"
    damaged = {name: value for name, value in small("tiny").items() if name != token}
    assert f"has {tower}" in refusal(opened, damaged, given)
    bare = {name: value for name, value in damaged.items() if not name.startswith("cond_stage_model.")}
    mystery = bare | {"cond_stage_model.mystery.weight": torch.zeros(1)}
    assert "has cond_stage_model.mystery.weight, but no whole text tower" in refusal(opened, mystery, given)
    left = bare | {f"{tower}embeddings.position_ids": torch.arange(77)}
    assert "it has no text tower" in opened(left, given).facts["notes"]
    towers = {name: value for name, value in small("tiny").items() if not name.startswith(UNET)}
    assert "its text towers are left out: it has no U-Net" in opened(towers, given).facts["notes"]


def test_damaged_files(small, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    assert refusal(single_file.read, path, Asked()).startswith(f"{path}: is empty (0 bytes)")
    save_file(small("tiny"), path)
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(single_file.read, path, Asked()).startswith(f"{path}: is cut off")
    torch.save({"state_dict": small("tiny")}, path := tmp_path / "model.ckpt")
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(single_file.read, path, Asked()).startswith(f"{path}: ")
    assert "not found" in refusal(single_file.read, tmp_path / "none.ckpt", Asked())


# ---- published sizes -----------------------------------------------------------------------------------

PUBLISHED = {
    "sd1": ({"num_heads": 8}, "epsilon", 0.18215, 512, 859_520_964),
    "sd1_inpaint": ({"num_heads": 8}, "epsilon", 0.18215, 512, 859_535_364),
    "sd2": ({"head_dim": 64}, None, 0.18215, 768, 865_910_724),
    "sd2_inpaint": ({"head_dim": 64}, "epsilon", 0.18215, 512, 865_925_124),
    "sd2_depth": ({"head_dim": 64}, "epsilon", 0.18215, 512, 865_913_604),
    "sdxl": ({"head_dim": 64}, "epsilon", 0.13025, 1024, 2_567_463_684),
    "sdxl_inpaint": ({"head_dim": 64}, "epsilon", 0.13025, 1024, 2_567_478_084),
    "upscaler": ({"num_heads": 8}, "v_prediction", 0.08333, 512, 473_398_020),
    "ldm_class": ({"num_heads": 1}, "epsilon", 1.0, 256, 400_920_579),
}


def hollow(path: Path, shapes: dict, metadata: dict | None = None) -> Path:
    """A safetensors file of these shapes whose values take no space."""
    header, end = {"__metadata__": metadata or {}}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_sizes_are_recognised(family, sd_names, tmp_path):
    heads, prediction, scale, size, parameters = PUBLISHED[family]
    path = hollow(tmp_path / f"{family}.safetensors", sd_names.single_file(family, with_buffers=False))
    given = Asked()
    if prediction is None:
        line = (
            "its tensors do not tell the prediction type; give --prediction-type epsilon|v_prediction|sample"
        )
        assert refusal(single_file.read, path, given) == f"{path}: {line}"
        given, prediction = replace(given, prediction_type="v_prediction"), "v_prediction"
    model = single_file.read(path, given)
    section = model.config["backbone"]
    assert model.facts["family"] == family
    assert {key: section[key] for key in ("num_heads", "head_dim") if key in section} == heads
    assert model.config["noise_scheduler"]["prediction_type"] == prediction
    assert model.config["autoencoder"]["latent_scale"] == scale
    assert model.config["data"]["image_size"] == size
    found = {name: torch.Size(value.shape).numel() for name, value in model.tensors.items()}
    assert sum(n for name, n in found.items() if name.startswith("backbone.")) == parameters
    if family not in FIRST_STAGES:
        stage = {n: v for n, v in found.items() if n.startswith("autoencoder.") and "latent_" not in n}
        assert sum(stage.values()) == 83_653_863
    assert "licence" not in model.facts  # whose file it is, is not known
    assert any(note.startswith("the published ") and " is under " in note for note in model.facts["notes"])
    assert any(note.startswith("as published with ") for note in model.facts["notes"])
    names = json.dumps(model.config["conditioner"])
    towers = {"sd1": ["ViT-L-14-quickgelu"], "sdxl": ["ViT-L-14-quickgelu", "ViT-bigG-14"], "ldm": []}
    assert all(name in names for name in towers.get(family.split("_")[0], ["ViT-H-14"]))


def test_what_a_file_says_goes_before_what_was_published(sd_names, tmp_path):
    shapes = sd_names.single_file("sd1", with_buffers=False)
    said = {"modelspec.prediction_type": "flow", "modelspec.license": "CC0"}
    path = hollow(tmp_path / "flow.safetensors", shapes, said)
    assert refusal(single_file.read, path, Asked()) == (
        f"{path}: its tensors do not tell the prediction type (modelspec.prediction_type is flow); "
        "give --prediction-type epsilon|v_prediction|sample"
    )
    model = single_file.read(path, Asked(prediction_type="v_prediction"))
    assert model.config["noise_scheduler"]["prediction_type"] == "v_prediction"
    assert model.facts["licence"] == "CC0"


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("kl_f4", 1.0),
        ("kl_f4_4", 0.08333),
        ("kl_f8", None),
        ("kl_f16", 0.22765929),
        ("kl_f32", 1.0),
        ("vq_f4", 1.0),
        ("vq_f8", 1.0),
        ("vq_f16", 1.0),
    ],
)
def test_published_first_stages(name, scale, sd_names, tmp_path):
    path = hollow(tmp_path / "first.safetensors", sd_names.network(name))
    if scale is None:
        line = refusal(single_file.read, path, Asked())
        assert line == (
            f"{path}: its tensors do not tell the latent scale; "
            "give --latent-scale S (0.18215 in Stable Diffusion 1 and 2, 0.13025 in XL)"
        )
    else:
        assert single_file.read(path, Asked()).config["autoencoder"]["latent_scale"] == scale
