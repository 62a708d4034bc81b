"""`ldm export`: what is written opens elsewhere with the same numbers, and what differs gets no name."""

import json

import diffusers
import pytest
import torch

from ldm.checkpoints.foreign import folder_in
from ldm.checkpoints.foreign.export import export
from ldm.checkpoints.foreign.loadback import compare
from ldm.checkpoints.lazy import LazyTensor, open_safetensors, write_safetensors
from ldm.checkpoints.model import NETWORKS, Asked, Model
from ldm.checkpoints.opening import open_model
from ldm.cli import main
from ldm.errors import InputError

PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd1_inpaint": "StableDiffusionInpaintPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "upscaler": "StableDiffusionUpscalePipeline",
}
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def values(path):
    return {name: value.read() for name, value in open_safetensors(path)[0].items()}


def with_averages(model):
    model.ema = {
        name: LazyTensor.of(0.5 * value.read())
        for name, value in model.tensors.items()
        if name.startswith("backbone.")
    }
    return model


@pytest.fixture(scope="module")
def both(small, tmp_path_factory):
    """slug -> (folder, file, their reports) of one small model, exported once."""
    made = {}

    def exported(slug):
        if slug not in made:
            root, (model, _) = tmp_path_factory.mktemp("exports"), small(slug)
            folder, file = root / "folder", root / "file.safetensors"
            made[slug] = folder, file, [export(model, folder), export(model, file, "single-file")]
        return made[slug]

    return exported


@pytest.mark.parametrize(
    "slug", ["sd1", *(pytest.param(s, marks=pytest.mark.slow) for s in PIPELINES if s != "sd1")]
)
def test_diffusers_opens_folder_and_file_with_the_same_weights(slug, both):
    folder, file, reports = both(slug)
    for report in reports:
        assert {(c.most, c.relative) for c in report.compared} == {(0.0, 0.0)}
        assert [c.network for c in report.compared] == ["autoencoder", "conditioner", "backbone"]
    kind = getattr(diffusers, PIPELINES[slug])
    whole = kind.from_pretrained(folder, local_files_only=True)
    single = kind.from_single_file(str(file), config=str(folder), local_files_only=True)
    for part in PARTS:
        if not hasattr(whole, part):
            continue
        ours, theirs = getattr(whole, part).state_dict(), getattr(single, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(theirs[name], value) for name, value in ours.items()), part


@pytest.mark.parametrize(
    "slug", ["sd1", *(pytest.param(s, marks=pytest.mark.slow) for s in ("sd2", "sdxl_inpaint"))]
)
def test_single_file_to_folder_to_single_file(slug, both, tmp_path):
    """Bit for bit, but for the last block of SD 2's text tower, which diffusers lacks and nobody runs."""
    folder, file, _ = both(slug)
    export(folder_in.read(folder, Asked()), tmp_path / "again.safetensors", "single-file")
    first, again = values(file), values(tmp_path / "again.safetensors")
    assert first.keys() == again.keys()
    differing = {name for name, value in first.items() if not torch.equal(value, again[name])}
    unused = "cond_stage_model.model.transformer.resblocks.2." if slug == "sd2" else "nothing"
    assert differing == {name for name in first if name.startswith(unused)}
    assert all(not again[name].any() for name in differing)


def test_half_precision_rounds_and_says_how_much(small, tmp_path):
    model, _ = small("sd1")
    report = export(model, tmp_path / "half.safetensors", "single-file", dtype="fp16")
    for compared in report.compared:
        assert 0 < compared.relative < 2**-11
        assert 0 < compared.most < 2**-11
    assert "backbone" in report.lines()[2]
    assert f"model hash {report.files[0][2][:10]}" in report.lines()[3]


def test_a_full_file_holds_weights_and_averages(small, tmp_path):
    report = export(with_averages(small("sd1")[0]), tmp_path / "full.safetensors", "single-file", full=True)
    assert [(c.network, c.tensors) for c in report.compared[2:]] == [("backbone", 686), ("averages", 686)]


def test_numbers_beyond_the_format_are_refused(small, tmp_path):
    model, _ = small("sd1")
    model.tensors["backbone.conv_in.bias"] = LazyTensor.of(torch.full((32,), 1e5))
    with pytest.raises(
        InputError, match="backbone: conv_in.bias reaches 100000, .*float16; use --dtype bf16"
    ):
        export(model, tmp_path / "new" / "er" / "half.safetensors", "single-file", dtype="fp16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("section", "changed", "message"),
    [
        ("backbone", {"head_dim": 32}, "heads="),
        ("conditioner", {"padding": "zero"}, "padding=end"),
        ("conditioner", {"final_norm": False}, "final_norm=True"),
        ("noise_scheduler", {"prediction_type": "v_prediction"}, "noise_scheduler of the export"),
        ("noise_scheduler", {"beta_end": 0.013}, "noise_scheduler of the export"),
        ("autoencoder", None, "it is not in the export"),
    ],
)
def test_what_reads_otherwise_is_found(section, changed, message, small):
    model, _ = small("sd1")
    others = [name for name in NETWORKS if name != section] if section in NETWORKS else NETWORKS
    model.config |= dict.fromkeys(others)  # the less to read
    config = model.config | {section: changed and (model.config[section] | changed)}
    with pytest.raises(InputError, match=message):
        compare(model, Model(config, model.tensors), "raw", None)


def test_a_changed_tensor_is_found(small):
    model, _ = small("sd1")
    model.config |= dict.fromkeys(["autoencoder", "backbone"])
    name = "conditioner.text.ln_final.bias"
    other = model.tensors | {name: LazyTensor.of(model.tensors[name].read() + 1e-6)}
    with pytest.raises(InputError, match="conditioner of the export: 0.ln_final.bias is not what it was"):
        compare(model, Model(model.config, other), "raw", None)
    del other[name]
    with pytest.raises(InputError, match="0.ln_final.bias is missing"):
        compare(model, Model(model.config, other), "raw", None)
    assert {c.most for c in compare(model, model, "raw", None)} == {0.0}


@pytest.mark.parametrize(
    ("name", "form", "full", "message"),
    [
        ("there", "diffusers", False, "is there already"),
        ("there.safetensors", "single-file", False, "there.md: is there already"),
        ("a.ckpt", "single-file", False, "let its name end in .safetensors"),
        ("a", "diffusers", True, "--full: is of single files alone"),
    ],
)
def test_where_an_export_may_go(name, form, full, message, small, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there.md").touch()
    with pytest.raises(InputError, match=message):
        export(small("sd1")[0], tmp_path / name, form, full=full)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there", "there.md"]


OTHERS = {  # networks that are missing: those of the folder, and a word of the refusal of either format
    "conditioner": (None, "try --format single-file", None),
    "autoencoder": ("unet", None, None),
    "autoencoder conditioner": ("unet", None, None),
    "backbone": ("autoencoder_kl", None, "use --format autoencoder"),
    "backbone conditioner": ("autoencoder_kl", None, "use --format autoencoder"),
}


@pytest.mark.parametrize("missing", OTHERS)
def test_a_model_that_lacks_networks(missing, small, tmp_path):
    """A single file has what there is, a folder one network, or nothing is written and the line says why."""
    model, (family, no_folder, no_file) = small("sd1")[0], OTHERS[missing]
    lacks = missing.split()
    model.config |= dict.fromkeys(lacks)
    kept = [name for name in NETWORKS if name not in lacks]
    model.tensors = {name: v for name, v in model.tensors.items() if name.split(".")[0] in kept}
    for out, form, refused in (("out", "diffusers", no_folder), ("a.safetensors", "single-file", no_file)):
        if refused is not None:
            with pytest.raises(InputError, match=refused):
                export(model, tmp_path / "new" / out, form)
            assert not (tmp_path / "new").exists()
            continue
        report = export(model, tmp_path / out, form)
        compared = [c.network for c in report.compared]
        if form == "single-file":
            assert compared == kept
            continue
        assert (len(compared), folder_in.read(tmp_path / out, Asked()).facts["family"]) == (1, family)
        found = diffusers.AutoModel.from_pretrained(f"{tmp_path / out}", local_files_only=True)
        assert "AutoModel.from_pretrained" in (tmp_path / out / "README.md").read_text()
        stored = values(tmp_path / out / "diffusion_pytorch_model.safetensors")
        assert found.state_dict().keys() == stored.keys()
        assert any("one network" in note for note in report.notes) == ("conditioner" not in lacks)


def test_a_class_conditional_model_is_a_single_file(small, tmp_path):
    model, _ = small("ldm_class")
    with pytest.raises(InputError, match="conditioner of ClassToken: .*; try --format single-file"):
        export(model, tmp_path / "out")
    report = export(model, tmp_path / "a.safetensors", "single-file")
    assert [c.network for c in report.compared] == list(NETWORKS)


@pytest.mark.parametrize("name", ["file/foo", "file/foo/bar", "a" * 300, "n" * 250, "new/" + "a" * 300])
def test_a_place_that_cannot_be_written_is_one_line(name, small, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write there"):
        export(small("sd1")[0], tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_autoencoder_to_export(small, tmp_path):
    model, _ = small("sd1")
    model.config["autoencoder"] = None
    with pytest.raises(InputError, match="autoencoder: the checkpoint has none"):
        export(model, tmp_path / "vae.safetensors", "autoencoder")


# ---- a run ---------------------------------------------------------------------------------------------

TOWER = {
    "_target_": "ldm.conditioning.frozen.FrozenOpenCLIP",
    "model": {"width": 16, "layers": 2, "heads": 2, "embed_dim": 16, "quick_gelu": True},
    "pretrained": "random",
    "padding": "end",
}
RUN = {
    "autoencoder": {
        "_target_": "ldm.autoencoder.kl.AutoencoderKL",
        "block_out_channels": [32, 32],
        "layers_per_block": 1,
    },
    "conditioner": TOWER,
    "backbone": {
        "_target_": "ldm.backbones.unet.CrossAttentionUNet",
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "transformer_depth": [1, 0],
        "num_heads": 2,
        "context_dim": 16,
    },
    "noise_scheduler": {"_target_": "ldm.diffusion.noise_scheduler.VariancePreserving", "steps_offset": 1},
}


@pytest.fixture
def run(make_run, tmp_path):
    """A run whose latents have a shift and a scale of their own, and whose conditioner has averages, too."""
    make_run(tmp_path / "runs" / "small", config=RUN)
    return tmp_path / "runs" / "small"


@pytest.mark.parametrize(
    ("form", "name"),
    [("diffusers", "out"), ("single-file", "a.safetensors"), ("autoencoder", "v.safetensors")],
)
def test_the_verb_exports_a_run(form, name, run, tmp_path, capsys):
    out = tmp_path / "exports" / name
    assert main(["export", str(run), str(out), "--format", form]) == 0
    printed = capsys.readouterr().out
    assert "max difference 0, relative 0" in printed
    assert printed.endswith(f"written to {out}, read back and compared\n")
    text = (out / "README.md" if form == "diffusers" else out.with_suffix(".md")).read_text()
    assert "| trained as | tiny |" in text
    assert "| optimizer steps | 12 |" in text
    assert "in quant_conv and post_quant_conv" in text  # shift and scale of the latents
    assert str(tmp_path) not in text
    names = {"diffusers": ["out"], "single-file": ["a.md", name], "autoencoder": ["v.md", name]}
    assert sorted(path.name for path in out.parent.iterdir()) == names[form]


def test_a_full_file_of_a_run(run, tmp_path):
    """The U-Net raw and averaged; the other networks by --weights, which here are the averages."""
    out = tmp_path / "full.safetensors"
    assert main(["export", str(run), str(out), "--format", "single-file", "--full"]) == 0
    model, found = open_model(run), values(out)
    raw = model.tensors["backbone.conv_out.bias"].read()
    assert torch.equal(found["model.diffusion_model.out.2.bias"], raw)
    assert torch.equal(found["model_ema.diffusion_modelout2bias"], 0.9 * raw)
    bias = model.tensors["conditioner.text.ln_final.bias"].read()
    assert torch.equal(found["cond_stage_model.transformer.text_model.final_layer_norm.bias"], 0.9 * bias)


def test_a_frozen_tower_that_the_checkpoint_leaves_out_comes_along(run, tmp_path):
    model = open_model(run)
    own = model.of("conditioner")
    weights, out = tmp_path / "tower.safetensors", tmp_path / "a.safetensors"
    write_safetensors(weights, {name.removeprefix("text."): value for name, value in own.items()})
    for tensors in (model.tensors, model.ema):
        for name in own:
            del tensors[f"conditioner.{name}"]
    model.config["conditioner"]["pretrained"] = str(weights)
    export(model, out, "single-file")
    found = values(out)["cond_stage_model.transformer.text_model.final_layer_norm.bias"]
    assert torch.equal(found, own["text.ln_final.bias"].read())


def test_a_text_transformer_has_no_single_file(tiny_run, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["export", str(tiny_run), str(tmp_path / "a.safetensors"), "--format", "single-file"])
    assert exit.value.code == 2
    assert "use --format diffusers" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(["export", str(tiny_run), str(tmp_path / "folder")]) == 0
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
