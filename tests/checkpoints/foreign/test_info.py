"""`ldm info`: the table, of what is known and what is not; hashes; headers alone are read."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ldm import cli
from ldm.checkpoints import native
from ldm.checkpoints.info import describe
from ldm.checkpoints.lazy import LazyTensor
from ldm.checkpoints.model import Model
from ldm.checkpoints.networks import network_entry, store_network
from ldm.checkpoints.opening import open_model
from ldm.config import build
from ldm.errors import InputError

ROOT = Path(__file__).parents[3]


def unread(shape, dtype=torch.float32):
    def read():
        raise AssertionError("a value was read")

    return LazyTensor(shape, dtype, read)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"0123456789")
    config = {
        "autoencoder": {"_target_": "ldm.autoencoder.kl.AutoencoderKL"},
        "conditioner": {"_target_": "ldm.conditioning.frozen.FrozenOpenCLIP"},
        "backbone": {"_target_": "ldm.backbones.unet.CrossAttentionUNet"},
        "noise_scheduler": {"_target_": "a.Linear", "beta_start": 0.1, "prediction_type": "v_prediction"},
        "data": {"image_size": 64},
    }
    tensors = {
        "autoencoder.w": unread((2, 3)),
        "autoencoder.latent_scale": unread((4,)),
        "backbone.w": unread((1000, 1000), torch.float16),
        "backbone.b": unread((7,), torch.float32),
    }
    facts = {
        "licence": "MIT",
        "format": "single file",
        "path": tmp_path / "x.ckpt",
        "family": "sd1",
        "step": 1234,
        "images": 5678,
        "author": None,
        "notes": ["one thing " * 12, "another"],
        "metadata": {"title": "bell\x07\nand\x1b[31mred", "thumbnail": "A" * 9000},
    }
    return Model(config, tensors, {"backbone.w": unread((1000, 1000))}, facts)


def test_the_table(model, tmp_path):
    lines = describe(model, tmp_path)
    place = lines.pop(0)
    assert place.split() == ["path", str(tmp_path / "x.ckpt"), "(0.00", "GB)"]
    assert "\n".join(lines) == "\n".join(
        [
            "format      single file",
            "family      sd1",
            "licence     MIT",
            "trained     1,234 steps, 5,678 images",
            "image size  64",
            "predicts    v_prediction",
            "noise       Linear, beta_start 0.1",
            "note        " + "one thing " * 9 + "one",
            "            thing one thing one thing",
            "            another",
            "metadata    title: bell  and [31mred",
            "            thumbnail: " + "A" * 87,
            "            " + "A" * 63,
            "",
            "network      class               parameters   averages  numbers",
            "autoencoder  AutoencoderKL                6          -  float32",
            "conditioner  FrozenOpenCLIP      not stored          -",
            "backbone     CrossAttentionUNet   1,000,007  1,000,000  float16, float32",
            "total                             1,000,013",
        ]
    )


def test_the_recipe_of_a_run(tmp_path):
    config = {
        "run_name": "birds",
        "init_from": "/somewhere/before",
        "module": {"drop": 0.1},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-4},
        "data": {"_target_": "ldm.data.datamodule.ShardDataModule", "shards": "/x/birds-{00..09}.tar"}
        | {"global_batch_size": 2048, "image_size": 256},
    }
    lines = describe(Model(config, {}, {}, {"format": "ldm", "path": tmp_path, "step": 12}), tmp_path)
    assert [line.split("  ")[0] for line in lines[1:11]] == [
        *("format", "trained", "trained as", "trained on", "captions dropped in training", "optimizer"),
        *("learning rate", "global batch", "started from", "image size"),
    ]
    assert [line.split("  ")[-1].strip() for line in lines[3:10]] == [
        *("birds", "ShardDataModule; shards birds-{00..09}.tar", "10%", "AdamW", "0.0001", "2,048", "before"),
    ]


def test_nothing_is_known(tmp_path):
    lines = describe(Model({}, {}), tmp_path)
    assert lines[1:] == [
        "trained  unknown",
        "",
        "network  class  parameters  averages  numbers",
        "total                    0",
    ]


def test_hashes_of_a_file_and_of_a_folder(model, tmp_path):
    sha256 = hashlib.sha256(b"0123456789").hexdigest()
    lines = describe(model, tmp_path, hash=True)
    assert f"sha256      {sha256}" in lines
    assert f"short hash  {sha256[:10]} (of AUTOMATIC1111)" in lines
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "y.safetensors").write_bytes(b"1")
    (tmp_path / "notes.txt").write_bytes(b"2")
    model.facts["path"] = tmp_path
    found = [line.split()[-2:] for line in describe(model, tmp_path, hash=True) if len(line) > 64]
    other = hashlib.sha256(b"1").hexdigest()
    assert [pair for pair in found if len(pair[0]) == 64] == [
        [other, "unet/y.safetensors"],
        [sha256, "x.ckpt"],
    ]


@pytest.mark.parametrize("name", ["kl_f8", "vq_f4", "vq_f8"])
def test_parameters_are_those_of_the_network(tmp_path, name):
    """Buffers that are stored with them do not count."""
    section = yaml.safe_load((ROOT / f"configs/autoencoder/{name}.yaml").read_text())
    with torch.device("meta"):
        network = build(section)
    state = network.state_dict()
    tensors = {f"autoencoder.{key}": unread(tuple(value.shape), value.dtype) for key, value in state.items()}
    assert len(state) > len(list(network.parameters()))
    row = describe(Model({"autoencoder": section}, tensors), tmp_path)[-2].split()
    assert row[2:] == [f"{sum(p.numel() for p in network.parameters()):,}", "-", "float32"]


def test_the_verb_says_what_a_checkpoint_directory_is(tmp_path, capsys):
    config = "backbone:\n  _target_: ldm.backbones.unet.CrossAttentionUNet\n"
    tensors = {"model": {"backbone.w": torch.ones(2, 3)}, "ema": {"backbone.w": torch.ones(2, 3)}}
    state = {"step": 12, "images": 96, "networks": {}}
    native.save_at(tmp_path / "mine", 12, tensors, {"state.json": state, "config.yaml": config})
    assert cli.main(["info", str(tmp_path / "mine"), "--hash"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["format", "ldm"] in rows
    assert ["trained", "12", "steps,", "96", "images"] in rows
    assert ["backbone", "CrossAttentionUNet", "6", "6", "float32"] in rows
    assert (
        native.load_document(tmp_path / "mine", "MANIFEST.json")["files"]["ema.safetensors"]["sha256"] in out
    )


ALONE = """
import sys, time
from ldm.cli import main
assert main(["info", *sys.argv[1:]]) == 0
assert not {"torch", "open_clip", "transformers", "diffusers", "lightning"} & set(sys.modules)
print(time.process_time())
"""


def described(*arguments):
    """(rows of the table as words, CPU seconds) of a process of its own, in which torch is not imported."""
    words = [sys.executable, "-c", ALONE, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *table, seconds = done.stdout.splitlines()
    return [row.split() for row in table], float(seconds)


def test_a_file_of_sd1_is_described_at_once(tmp_path, family_shapes):
    """7.7 GB with averages, of which only the header is on the disk."""
    header, end = {}, 0
    for name, shape in family_shapes("sd1", with_buffers=False, ema=True).items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path = tmp_path / "sd1.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    rows, seconds = described(path)
    assert rows[0][-2:] == ["(7.70", "GB)"]
    assert ["family", "sd1"] in rows
    assert ["predicts", "epsilon"] in rows
    assert ["backbone", "CrossAttentionUNet", "859,520,964", "859,520,964", "float32"] in rows
    assert ["total", "1,066,235,307"] in rows
    assert seconds < 2.0


OPTIONS = ("--num-heads", 4, "--prediction-type", "epsilon", "--text-heads", 4, "--latent-scale", 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_saved_by_torch_is_described_without_torch(tmp_path, family_shapes, random_tensors, dtype):
    """With the table of its noise schedule, of which the values are read."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    tables = {"betas": betas.to(dtype), "scale_factor": torch.tensor(0.25)}
    tensors = random_tensors(family_shapes("sd1", True, with_buffers=False), dtype=dtype) | tables
    torch.save({"state_dict": tensors, "global_step": 7}, tmp_path / "x.ckpt")
    rows, seconds = described(tmp_path / "x.ckpt", *OPTIONS)
    assert ["family", "sd1"] in rows
    assert ["trained", "7", "steps"] in rows
    noise = next(" ".join(row) for row in rows if row[:1] == ["noise"])
    assert "schedule scaled_linear, beta_start 0.00085, beta_end" in noise
    assert rows[-2][4:] == [str(dtype).removeprefix("torch.")]
    assert seconds < 2.0


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd2_depth", "upscaler"])
def test_a_folder_and_what_is_stored_of_it_are_described_without_torch(saved, tmp_path, family):
    """The hashes of our own directory are not computed: a damaged file of the right size is described."""
    pipe, folder = saved(family)
    rows, seconds = described(folder)
    count = f"{sum(p.numel() for p in pipe.unet.parameters()):,}"
    assert ["backbone", "CrossAttentionUNet", count, "-", "float32"] in rows
    stored = tmp_path / "stored"
    assert cli.main(["import", str(folder), str(stored)]) == 0
    with open(stored / "model.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"abcd")
    again, more = described(stored)
    assert again[-4:] == rows[-4:]
    assert max(seconds, more) < 2.0
    with pytest.raises(InputError, match=r"model\.safetensors: sha256 differs"):
        open_model(stored)
    with open(stored / "model.safetensors", "ab") as file:
        file.write(b"e")
    with pytest.raises(InputError, match=r"model\.safetensors: has .* bytes, MANIFEST.json says"):
        open_model(stored, hashed=False)


def test_a_run_with_a_frozen_network_is_described_without_torch(tmp_path):
    """The network lies in the run's networks/, under the hash of its content."""
    section = "_target_: ldm.autoencoder.kl.AutoencoderKL\n"
    sha256 = store_network(tmp_path, {"a": torch.ones(5)}, section)
    folder = tmp_path / "checkpoints" / "step-000000003"
    state = {"step": 3, "networks": {"autoencoder": network_entry(tmp_path, sha256, folder)}}
    native.save(
        folder.parent, 3, {"model": {"backbone.w": torch.ones(2)}}, {"state.json": state, "config.yaml": "{}"}
    )
    rows, _ = described(tmp_path)
    assert ["autoencoder", "AutoencoderKL", "5", "-", "float32"] in rows
    with open(tmp_path / "networks" / sha256 / "config.yaml", "a") as file:
        file.write("# another\n")
    assert described(tmp_path)[0] == rows
    with pytest.raises(InputError, match="the network's sha256 is not the one"):
        open_model(tmp_path)
