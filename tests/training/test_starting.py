"""What a run starts from: any checkpoint, wider inputs, frozen networks that it keeps; what is refused."""

import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm
import train
from ldm.checkpoints import native
from ldm.checkpoints.foreign import folder_out, single_file_out
from ldm.checkpoints.importing import store
from ldm.checkpoints.lazy import LazyTensor
from ldm.checkpoints.model import Model
from ldm.checkpoints.networks import load_network
from ldm.checkpoints.opening import open_model
from ldm.config import build, compose
from ldm.errors import InputError
from ldm.training import starting
from ldm.training.assembly import build_module
from ldm.types import Conditioning

FILE = {"format": "single file", "path": "base.ckpt"}  # what the model is said to come from
SIZES = {"width": 32, "layers": 2, "heads": 4, "embed_dim": 32, "quick_gelu": True}
TOWER = {
    "_target_": "ldm.conditioning.frozen.FrozenOpenCLIP",
    "model": SIZES,
    "pretrained": None,
    "padding": "end",
}
SECTIONS = {  # as of a small Stable Diffusion 1
    "autoencoder": {
        "_target_": "ldm.autoencoder.kl.AutoencoderKL",
        "block_out_channels": [32, 32],
        "layers_per_block": 1,
        "latent_scale": 0.18215,
    },
    "conditioner": TOWER,
    "backbone": {
        "_target_": "ldm.backbones.unet.CrossAttentionUNet",
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "transformer_depth": [1, 1],
        "num_heads": 2,
        "context_dim": 32,
    },
}
RECIPE = [  # the same by the recipe's words; without where the frozen weights come from
    *("autoencoder.block_out_channels=[32,32]", "autoencoder.layers_per_block=1"),
    *("autoencoder.latent_scale=0.5", "backbone.block_out_channels=[32,64]", "backbone.layers_per_block=1"),
    *("backbone.transformer_depth=[1,1]", "backbone.num_heads=2", "conditioner.context_dim=32"),
    *("trainer=cpu", "sampling.num_steps=2", "callbacks.pictures.prompts=[one]", "trainer.max_steps=1"),
    *("optimizer.lr=0.0", "data.image_size=16", "data.global_batch_size=2"),
]
TEXT = "{width: 32, layers: 2, heads: 4, embed_dim: 32, quick_gelu: true}"
FROZEN = [f"conditioner.model={TEXT}", "conditioner.pretrained=null", *RECIPE]
OTHER = ["conditioner.model=" + TEXT.replace("true", "false")]
PAINTED = [
    *("conditioner=inpainting", f"conditioner.parts.text.model={TEXT}"),
    *("conditioner.parts.text.pretrained=null", "backbone.in_channels=9", *RECIPE),
]


@pytest.fixture(scope="module")
def model():
    """A whole model of all its own random numbers."""
    torch.manual_seed(7)
    tensors = {}
    for name, section in SECTIONS.items():
        network = build(section)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        tensors |= {f"{name}.{key}": LazyTensor.of(value) for key, value in network.state_dict().items()}
    cfg = compose("train", ["run_name=x", "data.shards=x", "data.image_size=16"])
    rest = {"noise_scheduler": dict(cfg.noise_scheduler), "data": {"image_size": 16}, "run_name": "base"}
    return Model(SECTIONS | rest, tensors, {}, {"family": "sd1", "step": 3} | FILE)


@pytest.fixture(scope="module")
def base(model, tmp_path_factory):
    """It as a checkpoint directory."""
    out = tmp_path_factory.mktemp("base") / "base"
    store(model, out)
    return out


def cfg_of(*overrides):
    return compose("train", ["run_name=x", "data.shards=x", *overrides])


def filled(*overrides):
    """(module, what it is to store) of a new run under these overrides."""
    cfg = cfg_of(*overrides)
    sources = starting.opened(cfg, None)
    module = build_module(starting.building(cfg, None, sources))
    return module, starting.fill(module, cfg, None, sources)


def read(model, name):
    return {key: value.read() for key, value in model.of(name).items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


FORMATS = {
    "directory": lambda model, out: store(model, out),
    "folder": lambda model, out: folder_out.write(model, out, torch.float32, "ema"),
    "file": lambda model, out: single_file_out.write(model, out, torch.float32),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_all_networks(form, model, tmp_path):
    out = tmp_path / ("x.safetensors" if form == "file" else "x")
    FORMATS[form](model, out)
    told = (
        ["autoencoder.latent_scale=0.18215"] if form == "file" else []
    )  # by heads and this the recipe answers
    module, kept = filled(*FROZEN, *told, f"init_from={out}")
    assert set(kept) == {"autoencoder", "conditioner"}
    for name in SECTIONS:
        network = module.frozen.get(name) or getattr(module, name)
        assert_equal(network.state_dict(), read(model, name))
        if name in kept:
            assert_equal(dict(kept[name].tensors), read(model, name))
    assert module.frozen["autoencoder"].latent_scale.tolist() == pytest.approx([0.18215] * 4)


def test_new_input_channels_change_nothing_at_first(model, base, caplog):
    with caplog.at_level(logging.INFO, "ldm"):
        module, _ = filled(*PAINTED, f"init_from={base}")
    lines = [record.getMessage() for record in caplog.records if "conv_in" in record.getMessage()]
    assert lines == [f"init_from={base}: backbone.conv_in from 4 to 9 channels, the new ones start at 0"]
    narrow = build(SECTIONS["backbone"])
    narrow.load_state_dict(read(model, "backbone"))
    narrow.to(memory_format=torch.channels_last)
    x, time, context = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 800.0]), torch.randn(2, 77, 32)
    with torch.no_grad():
        expected = narrow(x, time, Conditioning(context=context))
        for extra in (torch.zeros(2, 5, 8, 8), 100 * torch.randn(2, 5, 8, 8)):
            wide = module.backbone(x, time, Conditioning(context=context, concat=extra))
            assert torch.equal(wide, expected)
    assert expected.std() > 0.001


def test_text_to_image_then_inpainting_with_all_sources_gone(data, base, model, tmp_path):
    """Frozen networks go from checkpoint to run to run: stored in each, and in each again under one name."""
    run = [*data, f"run_root={tmp_path}"]
    source = shutil.copytree(base, tmp_path / "source")
    assert train.command([*run, *FROZEN, "run_name=first", f"init_from={source}"]) == 0
    shutil.rmtree(source)
    again = [*run, *FROZEN, "run_name=first", f"init_from={source}", "trainer.max_steps=2"]
    assert train.command([*again, f"autoencoder_from={source}"]) == 0
    assert train.command([*run, *PAINTED, "run_name=second", f"init_from={tmp_path}/first"]) == 0
    shutil.rmtree(tmp_path / "first" / "checkpoints")

    newest = native.resolve(tmp_path / "second")
    networks = native.load_document(newest, "state.json")["networks"]
    assert set(networks) == {"autoencoder", "conditioner"}
    assert {path.name for path in (tmp_path / "second/networks").iterdir()} == {
        entry["sha256"] for entry in networks.values()
    }
    first = {path.name for path in (tmp_path / "first/networks").iterdir()}
    assert networks["autoencoder"]["sha256"] in first
    assert len(first) == 2
    tower, _ = load_network(newest, networks["conditioner"])
    assert_equal(tower, {f"parts.text.{key}": v for key, v in read(model, "conditioner").items()})
    for kind in ("model", "ema"):
        weights = native.load_tensors(newest, kind)["backbone.conv_in.weight"]
        assert torch.equal(weights[:, :4], read(model, "backbone")["conv_in.weight"])
        assert not weights[:, 4:].any()
    assert not any(name.startswith("conditioner") for name in native.load_tensors(newest, "model"))
    [picture] = ldm.load(tmp_path / "second", device="cpu")("one", num_steps=2)
    assert picture.size == (16, 16)


def test_a_run_keeps_to_the_network_it_started_with(data, base, model, tmp_path, refused):
    source = shutil.copytree(base, tmp_path / "source")
    argv = [*data, *FROZEN, f"run_root={tmp_path}", "run_name=x", f"init_from={source}"]
    argv += [f"autoencoder_from={source}"]
    assert train.command(argv) == 0
    shutil.rmtree(source)
    other = model.tensors | {
        "autoencoder.encoder.conv_in.bias": LazyTensor.of(torch.ones(32)),
    }
    store(Model(model.config, other, {}, model.facts), source)
    line = refused([*argv, "trainer.max_steps=2"])
    assert line.startswith(f"autoencoder_from={source}: is another network than the one this run was trained")


def test_its_own_source_comes_before_init_from(base, model, tmp_path):
    """A bare autoencoder's file, whose scale is not in it: the recipe's."""
    bare = Model({"autoencoder": dict(SECTIONS["autoencoder"])}, {}, {}, {"family": "autoencoder_kl"} | FILE)
    values = {key: value + 1 for key, value in read(model, "autoencoder").items()}
    shift, _ = values.pop("latent_shift"), values.pop("latent_scale")
    bare.tensors.update({f"autoencoder.{key}": LazyTensor.of(value) for key, value in values.items()})
    del bare.config["autoencoder"]["latent_scale"]
    store(bare, tmp_path / "bare")
    module, kept = filled(*FROZEN, f"init_from={base}", f"autoencoder_from={tmp_path}/bare")
    values |= {"latent_shift": 0 * shift, "latent_scale": torch.full_like(shift, 0.5)}
    assert_equal(dict(kept["autoencoder"].tensors), values)
    assert_equal(module.backbone.state_dict(), read(model, "backbone"))


def test_a_tower_that_brought_its_weights_is_not_stored(base, model, tmp_path, caplog):
    save_file(read(model, "conditioner"), tmp_path / "tower.safetensors")
    own = f"conditioner.pretrained={tmp_path}/tower.safetensors"
    _, kept = filled(*FROZEN, own, f"init_from={base}")
    assert set(kept) == {"autoencoder"}, "the same weights as those of init_from"
    changed = {key: value + 1 for key, value in read(model, "conditioner").items()}
    save_file(changed, tmp_path / "tower.safetensors")
    module, kept = filled(*FROZEN, own, f"init_from={base}")
    assert_equal(dict(kept["conditioner"].tensors), read(model, "conditioner"))
    assert "pretrained: null" in kept["conditioner"].config_yaml
    with caplog.at_level(logging.INFO, "ldm"):
        module, kept = filled(*FROZEN, *OTHER, own, f"init_from={base}")
    assert_equal(module.frozen["conditioner"].state_dict(), changed)
    said = [record for record in caplog.records if "keeps its own weights" in record.getMessage()]
    assert [record.levelname for record in said] == ["WARNING"]


def test_a_tag_is_not_fetched_where_a_checkpoint_brings_the_weights(data, base, model, tmp_path):
    """No tag is known of this tower: to look for it is an error."""
    tag, run = "conditioner.pretrained=openai", [*data, f"run_root={tmp_path}", "run_name=x"]
    argv = [*run, *FROZEN, tag, f"init_from={base}"]
    assert train.command(argv) == 0
    assert train.command([*argv, "trainer.max_steps=2"]) == 0
    newest = native.resolve(tmp_path / "x")
    assert newest.name.endswith("2")
    tower, _ = load_network(newest, native.load_document(newest, "state.json")["networks"]["conditioner"])
    assert_equal(tower, read(model, "conditioner"))
    with pytest.raises(InputError, match="open_clip has no such weights"):
        filled(*FROZEN, *OTHER, tag, f"init_from={base}")


def test_where_the_weights_came_from_is_in_the_log_file(data, base, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert train.command([*data, *FROZEN, f"run_root={tmp_path}", "run_name=x", f"init_from={base}"]) == 0
    lines = (tmp_path / "x/log.txt").read_text().splitlines()
    for name in SECTIONS:
        assert sum(f"init_from={base}: weights of the {name}" in line for line in lines) == 1


def test_a_resumed_run_looks_at_a_tower_that_it_did_not_store(data, base, model, tmp_path, refused):
    save_file(read(model, "conditioner"), tmp_path / "tower.safetensors")
    own = [f"conditioner.pretrained={tmp_path}/tower.safetensors", f"autoencoder_from={base}"]
    argv = [*data, *FROZEN, *own, f"run_root={tmp_path}", "run_name=x"]
    assert train.command(argv) == 0
    other = {key: value for key, value in model.tensors.items()}
    other["conditioner.text.ln_final.bias"] = LazyTensor.of(torch.ones(32))
    store(Model(model.config, other, {}, model.facts), tmp_path / "other")
    line = refused([*argv, "trainer.max_steps=2", f"conditioner_from={tmp_path}/other"])
    assert "is another network than the one this run was trained with; use" in line


def test_a_network_that_is_not_there_is_counted(base, tmp_path):
    _, kept = filled(*FROZEN, f"init_from={base}")
    whole = starting.nbytes(kept, tmp_path)
    assert whole == sum(value.nbytes for one in kept.values() for value in one.tensors.values())
    named = {name: starting.Kept(one.tensors, one.config_yaml, name) for name, one in kept.items()}
    assert starting.nbytes(named, tmp_path) == whole
    (tmp_path / "networks/conditioner").mkdir(parents=True)
    rest = sum(value.nbytes for value in kept["autoencoder"].tensors.values())
    assert starting.nbytes(named, tmp_path) == rest < whole


def test_what_the_file_says_goes_before_the_recipe(model, tmp_path, caplog):
    """A file that is marked as one of v_prediction, and lacks its latent scale alone."""
    single_file_out.write(model, tmp_path / "x.safetensors", torch.float32)
    tensors = load_file(tmp_path / "x.safetensors")
    tensors.pop("scale_factor", None)
    save_file(tensors | {"v_pred": torch.zeros(1)}, tmp_path / "x.safetensors")
    module, _ = filled(*FROZEN, f"init_from={tmp_path}/x.safetensors")
    assert "was trained with prediction_type=v_prediction, this run has epsilon" in caplog.text
    assert module.frozen["autoencoder"].latent_scale.tolist() == [0.5] * 4


def test_a_trained_tower_goes_on_among_others(recipe, autoencoder_run, tmp_path, monkeypatch):
    """Of a run that trained its text tower: the average, into a conditioner made of parts."""
    argv = recipe(2, "first", "trainer.max_steps=1")
    assert train.command(argv) == 0
    text = "ldm.conditioning.text.TextTransformer, width: 16, layers: 1, heads: 2, context_length: 12"
    argv = [value for value in argv if not value.startswith(("conditioner", "autoencoder_from"))]
    argv += ["conditioner=inpainting", "conditioner.context_dim=16", "backbone.in_channels=9"]
    argv += [
        "~conditioner.parts.text",
        f"+conditioner.parts.own={{_target_: {text}}}",
        f"init_from={tmp_path}/first",
    ]
    module, kept = filled(*argv)
    first = open_model(tmp_path / "first")
    ours = {key.removeprefix("parts.own."): v for key, v in module.conditioner.state_dict().items()}
    assert_equal(ours, {key: value.read() for key, value in first.of("conditioner", "ema").items()})
    assert set(kept) == {"autoencoder"}


def test_stage_1_may_start_before_the_end_of_another(recipe, autoencoder_run):
    for stage in (1, 2):
        cfg = compose("train", [*recipe(stage, "x"), f"init_from={autoencoder_run}"])
        sources = starting.opened(cfg, None)
        sources["init_from"].facts["latents_measured"] = 0
        module = build_module(cfg)
        if stage == 1:
            assert starting.fill(module, cfg, None, sources) == {}
            continue
        sources["autoencoder_from"] = sources.pop("init_from")
        with pytest.raises(InputError, match="is not the end of its stage"):
            starting.fill(module, cfg, None, sources)


def test_what_differs_on_purpose_is_said(base, caplog):
    with caplog.at_level(logging.INFO, "ldm"):
        filled(*FROZEN, "noise_scheduler=sd_v", f"init_from={base}")
    with caplog.at_level(logging.INFO, "ldm"):
        filled(*FROZEN, "noise_scheduler.beta_end=0.02", f"init_from={base}")
    said = [record.getMessage() for record in caplog.records]
    assert f"init_from={base} was trained with beta_end=0.012, this run has 0.02" in said
    assert f"init_from={base} was trained with prediction_type=epsilon, this run has v_prediction" in said
    scale = f"its latent_scale {[0.18215] * 4} in the place of autoencoder.latent_scale"
    assert f"init_from={base}: {scale}" in said


@pytest.fixture(scope="module")
def places(base, model, tmp_path_factory):
    """Name of a checkpoint -> where it is: the base, of 11 and 5 channels, an autoencoder alone."""
    folder = tmp_path_factory.mktemp("places")
    wide = torch.nn.functional.pad(read(model, "backbone")["conv_in.weight"], (0, 0, 0, 0, 0, 7))
    wide = model.tensors | {"backbone.conv_in.weight": LazyTensor.of(wide)}
    config = {**model.config, "backbone": {**SECTIONS["backbone"], "in_channels": 11}}
    store(Model(config, wide, {}, model.facts), folder / "wide")
    five = wide["backbone.conv_in.weight"].read()[:, :5]
    config = {**model.config, "backbone": {**SECTIONS["backbone"], "in_channels": 5}}
    five = model.tensors | {"backbone.conv_in.weight": LazyTensor.of(five)}
    store(Model(config, five, {}, model.facts), folder / "depth")
    bare = {key: value for key, value in model.tensors.items() if key.startswith("autoencoder")}
    store(Model({"autoencoder": SECTIONS["autoencoder"]}, bare, {}, model.facts), folder / "bare")
    return {"BASE": base, "WIDE": folder / "wide", "DEPTH": folder / "depth", "BARE": folder / "bare"}


UPSCALER = [
    *("conditioner=upscaling", f"conditioner.parts.text.model={TEXT}", "backbone.in_channels=7"),
    *("conditioner.parts.text.pretrained=null", "backbone.num_classes=1000", *RECIPE),
    *("conditioner.parts.text.layer=last", "++conditioner.parts.text.padding=end"),
]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([*FROZEN], r"autoencoder_from: nothing brings the weights of the autoencoder.*; set it, or init_"),
        ([*FROZEN, "autoencoder_from=BASE"], r"conditioner_from: nothing brings the weights of the cond"),
        ([*FROZEN, "init_from=BASE", "backbone.num_heads=4"], r"attn1 has 2 heads there, 4 heads by this"),
        ([*FROZEN, "init_from=BASE", "++backbone.norm_groups=16"], r"has 32 groups there, 16 groups by"),
        (
            [*FROZEN, "init_from=BASE", *OTHER],
            r"has the activation QuickGELU there, the activation GELU by this config; correct the section",
        ),
        ([*FROZEN, "init_from=BASE", "conditioner.padding=zero"], r"has padding=end there, padding=zero by"),
        ([*FROZEN, "init_from=BASE", "conditioner.layer=1"], r"conditioner has the context after 2 blocks"),
        ([*FROZEN, "init_from=BASE", "conditioner.final_norm=false"], r"has final_norm=True there, final_"),
        ([*FROZEN, "init_from=BASE", "conditioner.zero_null=true"], r"has zero_null=False there, zero_null="),
        (
            [*FROZEN, "init_from=BASE", "++backbone.self_attention=[false,true]"],
            r"backbone.*blocks.0 has self_attention=True there, self_attention=False by this config",
        ),
        ([*PAINTED, "init_from=DEPTH"], r"conv_in has 5 channels, and not all are the latents'; give"),
        ([*FROZEN, "init_from=3"], r"init_from=3: "),
        ([*FROZEN, "init_from=[a,b]"], r"init_from=\['a', 'b'\]: is no path"),
        ([*FROZEN, "init_from=BASE", "backbone.block_out_channels=[32,96]"], r"has shape .*, the config"),
        ([*UPSCALER, "init_from=BASE"], r"1 tensors missing \(\['class_embedding.weight'\]\), 0 unknown"),
        ([*PAINTED, "init_from=WIDE", "backbone.in_channels=9"], r"conv_in.weight has shape \[32, 11, "),
        ([*FROZEN, "init_from=BARE", "conditioner_from=BASE"], r"init_from=.*: it holds no backbone"),
        ([*FROZEN, "init_from=BASE", "conditioner_from=BARE"], r"conditioner_from=.*: it holds no cond"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(overrides, line, places):
    for word, place in places.items():
        overrides = [text.replace(f"from={word}", f"from={place}") for text in overrides]
    with pytest.raises(InputError, match=line) as error:
        filled(*overrides)
    assert "\n" not in str(error.value)


def test_nothing_is_written_if_nothing_brings_weights(data, refused, tmp_path):
    line = refused([*data, *FROZEN, f"run_root={tmp_path}/runs", "run_name=x"])
    assert line.startswith("autoencoder_from: nothing brings the weights of the autoencoder")
    assert list(tmp_path.iterdir()) == []
