"""What the doctor finds in a config: the size of a checkpoint, weights, shards, workers."""

import shutil

import pytest

from ldm.checkpoints import native
from ldm.cluster.checks import FAIL, OK, WARN
from ldm.cluster.needs import needs_of, tag_file


def lines(found, level):
    return [f"{line.what}: {line.figure}" for line in found.lines if line.level == level]


def test_a_config_whose_things_are_there(recipe, autoencoder_run, laion, tmp_path):
    found = needs_of(recipe(2, "x", "callbacks.checkpoint.keep_last=3"), 1)
    assert (found.accelerator, found.devices, found.num_nodes, found.keep_last) == ("cpu", 1, 1, 3)
    assert (found.run_root, found.run_dir) == (str(tmp_path), str(tmp_path / "x"))
    assert found.weights == [str(autoencoder_run)]
    assert lines(found, OK) == [
        f"weights: autoencoder_from={autoencoder_run}",
        "shards: 40 samples in 2 shards, 1,024 lanes for 1 readers; 10.0 steps an epoch",
    ]
    assert len(found.lines) == 2
    assert found.shards == [(f"{laion}/0000{i}.tar", (laion / f"0000{i}.tar").stat().st_size) for i in (0, 1)]
    assert found.worker_bytes == found.batch_bytes == 0, "no workers"
    first = needs_of(recipe(1, "x"), 1)
    saved = sum(file.stat().st_size for file in native.newest(autoencoder_run / "checkpoints").iterdir())
    assert first.checkpoint_bytes == pytest.approx(saved, rel=0.35), "of a tiny one a third is names and JSON"
    assert first.checkpoint_bytes == 4 * first.gradient_bytes


def test_a_config_whose_things_are_not_there(laion, data, small_diffusion, tmp_path):
    shutil.copy(laion / "00000.tar", tmp_path)  # no index beside it
    small = [text for text in small_diffusion if not text.startswith("conditioner")]
    argv = ["trainer=cpu", "run_name=x", "autoencoder_from=/nowhere/run", *data, *small]
    argv.append(f"data.shards={tmp_path}/00000.tar")
    argv += ["conditioner=open_clip", "conditioner.pretrained=openai"]
    found = needs_of([*argv, "data.num_workers=8", "data.reading.memory_mb=100"], 1)
    assert lines(found, FAIL) == ["weights: autoencoder_from=/nowhere/run: no such file or folder"]
    tag, shards, workers = lines(found, WARN)
    assert shards == "shards: not indexed yet: the first start does it"
    assert not (tmp_path / ".ldm_index").exists(), "looking reads no shard"
    assert tag.startswith("weights: conditioner.pretrained=openai is not on this machine and will be fetched")
    assert workers == "workers: data.num_workers=8, but a device has 4 samples a batch: 4 would be idle"
    assert found.worker_bytes == 8 * (400 + 100) * 10**6
    assert found.batch_bytes == 16 * 4 * 3 * 16 * 16, "two parts a worker of 4 pictures of 16 px"


def test_a_batch_that_the_ranks_cannot_share(recipe):
    (line,) = lines(needs_of(recipe(1, "x"), 3), FAIL)
    assert line.startswith("data: data.global_batch_size=4: not divisible by world_size*accumulate = 3*1 = 3")


def test_where_weights_of_a_tag_lie(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model, tag = "ViT-H-14", "laion2b_s32b_b79k"
    assert tag_file(model, tag) is None
    folder = tmp_path / "models--laion--CLIP-ViT-H-14-laion2B-s32B-b79K"
    file = folder / "snapshots/abc/open_clip_model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc")
    assert tag_file(model, tag) == [str(file)]
    assert tag_file("", str(file)) == tag_file(model, str(file)) == [str(file)]
    assert tag_file("", f"{file},{tmp_path}/none") is None
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    assert tag_file("", "download") is None
