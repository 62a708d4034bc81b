"""Whatever lies at a path: a model, or one line that says why not; no option is ignored without a word."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch

from ldm import cli
from ldm.checkpoints.importing import store
from ldm.checkpoints.lazy import LazyTensor, write_safetensors
from ldm.checkpoints.model import Asked
from ldm.checkpoints.opening import open_model
from ldm.errors import InputError

UNET, FIRST, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."


def refusal(*args) -> str:
    with pytest.raises(InputError) as error:
        open_model(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def written(small, tmp_path):
    """(changes) -> a small file of SD 1's kind with other tensors in the place of some."""

    def write(changes):
        path = tmp_path / "model.safetensors"
        tensors = small("sd1")[1] | changes
        write_safetensors(path, {name: LazyTensor.of(value) for name, value in tensors.items()})
        return path

    return write


@pytest.mark.parametrize(
    "name",
    [
        f"{UNET}input_blocks.0.0.weight",
        f"{UNET}out.2.weight",
        f"{UNET}input_blocks.1.0.in_layers.2.weight",
        f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight",
        f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        f"{FIRST}encoder.conv_in.weight",
        f"{FIRST}decoder.conv_in.weight",
        f"{FIRST}encoder.conv_out.weight",
        f"{FIRST}encoder.down.0.block.1.conv1.weight",
        f"{FIRST}post_quant_conv.weight",
        f"{TEXT}embeddings.token_embedding.weight",
        f"{TEXT}embeddings.position_embedding.weight",
        f"{TEXT}encoder.layers.0.mlp.fc1.weight",
        "betas",
        "alphas_cumprod",
    ],
)
def test_a_deciding_tensor_without_dimensions(name, written, asked):
    path = written({name: torch.tensor(0.5)})
    assert refusal(path, asked("sd1")).startswith(f"{path}: ")


@pytest.mark.parametrize("shape", [(0,), (1000, 1)])
@pytest.mark.parametrize("name", ["betas", "alphas_cumprod"])
def test_a_table_of_another_shape(name, shape, written, asked):
    path = written({name: torch.full(shape, 0.01)})
    assert refusal(path, asked("sd1")).startswith(f"{path}: ")


@pytest.mark.parametrize("metadata", [["a"], "text"])
def test_metadata_that_is_no_mapping(metadata, tmp_path):
    header = {"__metadata__": metadata, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    assert refusal(path).startswith(f"{path}: is damaged")


def test_documents_that_are_too_deep(written, saved, asked, tmp_path):
    path = written({})
    path.with_suffix(".yaml").write_text("[" * 5000)
    assert refusal(path, asked("sd1")).startswith(f"{path}: is damaged")
    shutil.copytree(saved("sd1")[1], tmp_path / "folder")
    (tmp_path / "folder/unet/config.json").write_text("[" * 100000)
    refusal(tmp_path / "folder")


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("unet/config.json", {"block_out_channels": None}),
        ("unet/config.json", {"attention_head_dim": None}),
        ("text_encoder/config.json", {"vocab_size": None}),
        ("model_index.json", {"text_encoder": "x"}),
    ],
)
def test_fields_of_another_type(file, fields, saved, tmp_path):
    path = tmp_path / "folder"
    shutil.copytree(saved("sd1")[1], path)
    found = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(found | fields))
    refusal(path)


def test_weights_that_are_whole_numbers_are_refused(written, asked):
    name = f"{UNET}time_embed.0.weight"
    assert open_model(written({}), asked("sd1")).of("backbone")
    path = written({name: torch.zeros(128, 32, dtype=torch.int8)})
    assert refusal(path, asked("sd1")) == (
        f"{path}: backbone.time_embedding.linear_1.weight is of int8, and no floating-point numbers; "
        "give the file that it was made from"
    )


@pytest.mark.parametrize("verb", ["info", "import", "export"])
def test_paths_that_are_too_long(verb, tmp_path, capsys):
    words = [verb, f"{tmp_path}/{'a' * 5000}", *([f"{tmp_path}/new"] if verb != "info" else [])]
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert "cannot be opened (File name too long)" in capsys.readouterr().err


def test_a_new_folder_whose_name_is_too_long(small, tmp_path):
    with pytest.raises(InputError, match="cannot write there .File name too long"):
        store(small("sd1")[0], tmp_path / ("a" * 5000))


OPTIONS = {"config": "x.yaml", "num_heads": 3, "head_dim": 8, "text_heads": 5, "latent_scale": 9.0}


@pytest.mark.parametrize("name", [*OPTIONS, "prediction_type"])
def test_an_option_that_would_change_nothing_is_refused(name, small, saved, peers, tmp_path):
    given = Asked(**{name: (OPTIONS | {"prediction_type": "v_prediction"})[name]})
    line = "says that itself, and the option would change nothing; leave it out"
    words = f"--{name.replace('_', '-')} {getattr(given, name)}: "
    own = store(small("sd1")[0], tmp_path / "own")
    assert refusal(own, given) == f"{words}{own} {line}"
    peers.autoencoder().save_pretrained(tmp_path / "vae")
    assert refusal(tmp_path / "vae", given) == f"{words}{tmp_path / 'vae'} {line}"
    folder = saved("sd1")[1]
    if name == "prediction_type":
        assert open_model(folder, given).config["noise_scheduler"][name] == "v_prediction"
    else:
        assert refusal(folder, given) == f"{words}{folder} {line}"
