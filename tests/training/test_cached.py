"""Latents and text made beforehand: the same training without pictures; what is killed, shared, refused."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm
import train
from ldm.checkpoints import native
from ldm.cli import main
from ldm.config import build, compose
from ldm.data import cache as cache_module
from ldm.data.cache import CacheFolder
from ldm.data.cached import read_facts
from ldm.data.image import decode
from ldm.data.index import build_index
from ldm.data.reader import ShardReader
from ldm.data.tasks import task_of
from ldm.errors import InputError
from ldm.training import precompute
from ldm.training.module import TrainingModule

ROOT = Path(train.__file__).parent
TEXT = "{width: 16, layers: 2, heads: 2, embed_dim: 8}"
FROZEN = [
    *("conditioner=open_clip", f"conditioner.model={TEXT}", "conditioner.pretrained=random"),
    *("conditioner.context_dim=16", "conditioner.context_length=12"),
]
SIZED = [  # two towers and the sizes, as Stable Diffusion XL
    "conditioner=sdxl",
    *(f"conditioner.parts.{name}.model={TEXT}" for name in ("clip_l", "big_g")),
    *(f"conditioner.parts.{name}.pretrained=random" for name in ("clip_l", "big_g")),
    *("conditioner.parts.clip_l.layer=1", "conditioner.parts.sizes.width=4"),
    *("conditioner.context_dim=32", "conditioner.pooled_dim=32", "+backbone.pooled_dim=32"),
]
TOWERS = ("conditioner.", "conditioner=")

INPAINTING = [
    *("conditioner=inpainting", f"conditioner.parts.text.model={TEXT}", "conditioner.context_dim=16"),
    *("conditioner.parts.text.pretrained=random", "backbone.in_channels=9"),
]


def pictures_of(recipe, conditioner=FROZEN, *more):
    """The command line of a run on pictures with another conditioner."""
    argv = recipe(2, "pictures")
    argv = without(argv, *TOWERS) if conditioner else argv
    return [*argv, *conditioner, "++module.drop=0.3", *more]


def from_cache(argv, out, *more):
    """The same on a cache."""
    kept = without(argv, "data=", "data.shards=", "run_name=")
    return [*kept, "data=cached", f"data.shards={out}", "run_name=cached", *more]


def without(argv, *beginnings):
    return [text for text in argv if not text.startswith(beginnings)]


def cache(out, argv, *flags):
    return main(["data", "cache", str(out), *argv, *flags])


@pytest.fixture
def shutdown(capsys):
    """(function) -> the one line of error that it ends with."""

    def line_of(do):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            do()
        assert stop.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ldm: error: ")]
        return line.removeprefix("ldm: error: ")

    return line_of


@pytest.fixture
def losses(monkeypatch):
    """The loss of every training step, of the runs one after another."""
    found = []
    original = TrainingModule.optimizer_step

    def optimizer_step(self, epoch, batch_idx, optimizer, closure=None):
        original(self, epoch, batch_idx, optimizer, lambda: found.append(float(loss := closure())) or loss)

    monkeypatch.setattr(TrainingModule, "optimizer_step", optimizer_step)
    return found


@pytest.mark.parametrize(
    ("conditioner", "width"),
    [
        (FROZEN, 16),
        pytest.param(SIZED, 32, marks=pytest.mark.slow),
        pytest.param([], 0, marks=pytest.mark.slow),
    ],
)
def test_training_on_a_cache_is_training_on_its_pictures(
    conditioner, width, recipe, losses, tmp_path, capsys
):
    argv = pictures_of(recipe, conditioner, "trainer.max_steps=12", "optimizer.lr=0.02")
    losses.clear()  # of stage 1
    assert train.command(argv) == 0
    expected, losses[:] = losses[:], []
    out = tmp_path / "cache"
    flags = ["--dtype", "fp32", "--samples-per-shard", "16", "--batch-size", "4"]  # 4: as training rounds
    assert cache(out, argv, *flags) == 0
    assert "complete" in capsys.readouterr().out
    assert train.command(from_cache(argv, out)) == 0
    assert len(losses) == len(expected) == 12
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    facts = json.loads((out / "dataset.json").read_bytes())
    assert facts["shapes"].get("context") == {16: [12, 16], 32: [77, 32], 0: None}[width]
    assert (out / "null.safetensors").is_file() == bool(conditioner)
    images = ldm.load(tmp_path / "cached")(["one"], num_steps=2)
    assert images[0].size == (16, 16)


@pytest.fixture(scope="module")
def made(stage2, tmp_path_factory):
    """A cache of the pictures in fp16, two variants, three shards, and the command line that made it."""
    root = tmp_path_factory.mktemp("made")
    argv = without(stage2, *TOWERS)
    argv += [*FROZEN, "data.crop=random", "data.flip=0.5", "run_name=pictures"]
    flags = ["--variants", "2", "--samples-per-shard", "16", "--batch-size", "5", "--device", "cpu"]
    assert cache(root / "cache", argv, *flags) == 0
    return root / "cache", argv, flags


def shards_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}


def test_variants_are_crops_of_their_own(made):
    out, argv, _ = made
    index = build_index(str(out))
    assert set(index.kinds()) - {"image"} == {"caption", "json", "context", "moments"}
    assert len(index) == 40
    facts = read_facts(out, "x")
    raws = ShardReader(index, ("moments", "json", "caption"))(np.arange(40))
    crops = [json.loads(raw.parts["json"])["crop"] for raw in raws]
    assert {top for pair in crops for top, _ in pair} == {0}  # 24 x 20 becomes 19 x 16
    assert {left for pair in crops for _, left in pair} == {0, 1, 2, 3}
    assert sum(pair[0] != pair[1] for pair in crops) > 20
    assert raws[7].parts["caption"] == b"picture number 7"
    assert json.loads(raws[7].parts["json"])["similarity"] == 0.31
    assert index["original_width"].tolist() == [640] * 40
    moments = [facts.layouts()["moments"].unpack(raw.parts["moments"]) for raw in raws]
    cfg = compose("train", argv)
    module, data = precompute.opened(cfg, text=False), build(cfg.data)
    data.setup()
    made_anew = ShardReader(data.sources[0].index)(np.array([7]))[0]
    pixels = data.transform.resize(decode(made_anew.parts["image"], 16))
    places, mirror = data.transform.draws(np.array([14, 15]))
    for k in range(2):
        square, crop = data.transform.cut(pixels, places[k], bool(mirror[k]))
        expected = module.moments([torch.from_numpy(square.copy())[None]])[0, 0]
        assert list(crop) == crops[7][k]
        np.testing.assert_allclose(moments[7][k], expected, rtol=2e-3, atol=1e-3)


@pytest.mark.slow
def test_two_processes_share_the_work_and_give_the_same_bytes(made, tmp_path, capsys, shutdown):
    out, argv, flags = made
    parts = tmp_path / "parts"
    assert cache(parts, argv, *flags, "--task", "1/2") == 0
    assert "2 shards are left to other tasks" in capsys.readouterr().out
    assert sorted(path.name for path in parts.glob("*.tar")) == ["00001.tar"]
    line = shutdown(lambda: train.command(from_cache(argv, parts, f"run_root={tmp_path}", "data.flip=null")))
    assert "is not complete (1 of 3 shards); run the same ldm data cache again" in line
    assert cache(parts, argv, *flags, "data.num_workers=2", "--task", "0/2") == 0
    assert shards_of(parts) == shards_of(out)
    before = {path: path.stat().st_mtime_ns for path in parts.glob("*.tar")}
    assert cache(parts, argv, *flags) == 0
    assert {path: path.stat().st_mtime_ns for path in parts.glob("*.tar")} == before


def test_two_processes_at_one_shard_are_refused(made, tmp_path):
    out, *_ = made
    folder = CacheFolder(tmp_path, read_facts(out, "x"))
    again = pytest.raises(InputError, match="being written by another process")
    with folder.writing(0), again, folder.writing(0):
        pass
    with pytest.raises(InputError, match="being written"), folder.writing(0):  # finished in between
        pass


@pytest.mark.slow
def test_sigkill_at_random_moments_loses_and_repeats_nothing(made, tmp_path):
    """Processes that are forked when all is opened, so that they spend their lives in writing."""
    _, argv, _ = made
    cfg, draw = compose("train", argv), random.Random(0)
    options = precompute.CacheOptions(variants=2, samples_per_shard=2, batch_size=1, device="cpu")
    module, data = precompute.opened(cfg, text=True), build(cfg.data)
    data.setup()
    facts = precompute.settle(data, module, options)

    def run(path):
        folder = CacheFolder(path, facts)
        folder.claim()
        precompute.encode(folder, data, module, options)
        assert folder.finish() is not None

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    begun = time.monotonic()
    run(whole)
    seconds, kills, there = time.monotonic() - begun, 0, set()
    start = multiprocessing.get_context("fork").Process
    while kills < 20:
        one = start(target=run, args=(parts,))
        one.start()
        one.join(draw.uniform(0, seconds / 4))
        if one.is_alive():
            os.kill(one.pid, signal.SIGKILL)
            kills += 1
        one.join()
        there.add(len(list(parts.glob("*.tar"))))
        if one.exitcode == 0:  # complete before all kills were done: take some of it away
            for path in sorted(parts.glob("*.tar"))[draw.randrange(10) :]:
                path.unlink()
    assert len(there) > 5  # at many a place
    run(parts)
    assert shards_of(parts) == shards_of(whole)


@pytest.mark.slow
def test_a_cached_run_is_resumed_bit_by_bit(made, tmp_path, assert_same_run, monkeypatch, capsys):
    out, argv, _ = made
    argv = from_cache(argv, out, "data.num_workers=1", "++module.drop=0.3")
    assert train.command([*argv, f"run_root={tmp_path / 'whole'}"]) == 0
    original = TrainingModule.optimizer_step

    def optimizer_step(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "optimizer_step", optimizer_step)
        assert train.command([*argv, f"run_root={tmp_path / 'parts'}"]) == 130
    assert train.command([*argv, f"run_root={tmp_path / 'parts'}"]) == 0
    assert_same_run(tmp_path / "parts/cached", tmp_path / "whole/cached")
    assert list((tmp_path / "whole/cached/samples").glob("*.png"))


def test_another_network_size_or_crop_is_refused_before_anything_is_written(made, recipe, tmp_path, shutdown):
    out, argv, _ = made
    argv = from_cache(argv, out, f"run_root={tmp_path / 'runs'}")
    facts = json.loads((out / "dataset.json").read_bytes())
    assert train.command(recipe(1, "second", "seed=5", "trainer.max_steps=1")) == 0

    def line(*more):
        return shutdown(lambda: train.command([*argv, *more]))

    said = line(f"autoencoder_from={tmp_path / 'second'}")
    assert said.startswith(f"data.shards: the cache is of autoencoder {facts['autoencoder'][:12]}, and this")
    assert said.endswith("; give that autoencoder, or run ldm data cache with this one")
    said = line("seed=5")  # draws other random weights of the tower
    assert said.startswith(
        f"data.shards: the cache is of text tower {facts['conditioner'][:12]}, and this run"
    )
    assert "data.text=false reads the captions" in said
    assert "text tower" in line("conditioner.layer=1")
    trained = ["conditioner=text_transformer", "conditioner.width=16", "conditioner.heads=2"]
    assert "None" in shutdown(lambda: train.command([*without(argv, *TOWERS), *trained]))
    said = line("data.image_size=32")
    assert said.startswith(f"data.image_size: 32, but {out} was made with image_size=16; set it so, or run")
    assert line("data.crop=center").startswith("data.crop: center, but")
    assert "was not made by ldm data cache" in line(f"data.shards={tmp_path}")
    assert "holds no pictures to train an autoencoder on" in shutdown(
        lambda: train.command(from_cache(recipe(1, "x"), out))
    )
    painting = [*without(argv, *TOWERS), *INPAINTING]
    assert "is shown the pictures" in shutdown(lambda: train.command(painting))
    assert not (tmp_path / "runs").exists()


def test_a_tower_that_answers_otherwise_is_refused(made, tmp_path, shutdown):
    """As another release of open_clip might, by the same weights."""
    out, argv, _ = made
    copy = shutil.copytree(out, tmp_path / "copy")
    null = load_file(copy / "null.safetensors")
    save_file({"context": null["context"] + 1}, copy / "null.safetensors")
    said = shutdown(lambda: train.command(from_cache(argv, copy, f"run_root={tmp_path}")))
    assert "give another context for a dropped caption than in" in said


@pytest.mark.slow
def test_what_is_not_as_the_cache_was_begun_is_refused(made, tmp_path, shutdown):
    out, argv, flags = made
    before = shards_of(out)
    line = shutdown(lambda: cache(out, argv, *flags, "--dtype", "fp32"))
    assert line.startswith(f"OUT: {out} was begun with dtype fp16, this command has fp32; restore it")
    assert "with selection" in shutdown(lambda: cache(out, argv, *flags, "data.limit=7"))
    (tmp_path / "notes.txt").touch()
    assert "is not empty" in shutdown(lambda: cache(tmp_path, argv, *flags))
    assert "is a file" in shutdown(lambda: cache(tmp_path / "notes.txt", argv, *flags))
    for wrong in (["--variants", "0"], ["--task", "2/2"], ["--task", "a"], ["--batch-size", "0"]):
        assert wrong[0] in shutdown(lambda wrong=wrong: cache(tmp_path / "x", argv, *wrong))
    nothing = without(argv, "autoencoder_from")
    assert "nothing brings the weights" in shutdown(lambda: cache(tmp_path / "x", nothing))
    painting = [*without(argv, *TOWERS), *INPAINTING]
    assert "is shown the pictures" in shutdown(lambda: cache(tmp_path / "x", painting))
    assert shards_of(out) == before
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_captions_are_read_where_their_outputs_are_not(made, tmp_path, losses):
    """Without text in the cache, and with `data.text=false`: to the bit the same run."""
    out, argv, flags = made
    assert cache(tmp_path / "bare", argv, *flags, "--no-text") == 0
    assert json.loads((tmp_path / "bare/dataset.json").read_bytes())["conditioner"] is None
    assert not (tmp_path / "bare/null.safetensors").exists()
    runs = {"bare": (tmp_path / "bare",), "off": (out, "data.text=false"), "on": (out,)}
    found = {}
    for name, (folder, *more) in runs.items():
        more.append("optimizer.lr=0.02")  # text plays no part in a fresh network
        losses.clear()
        assert train.command([*from_cache(argv, folder, *more), f"run_root={tmp_path / name}"]) == 0
        found[name] = losses[:]
    assert found["bare"] == found["off"] != found["on"]
    np.testing.assert_allclose(found["on"], found["off"], rtol=0, atol=1e-3)  # fp16


@pytest.mark.slow
def test_held_out_caches_and_columns_of_the_source(made, laion, tmp_path, rows):
    out, argv, flags = made
    pictures = without(argv, "data.shards=")
    held_out = [*pictures, f"data.shards={laion}/held_out.tar", "data.validation_shards=null"]
    assert cache(tmp_path / "held_out", held_out, *flags) == 0
    above = "{_target_: ldm.data.filters.MinValue, column: aesthetic, value: 5.0}"
    more = [
        f"data.validation_shards={tmp_path / 'held_out'}",
        f"data.filters=[{above}]",
        "data.memory_cache_mb=1",
    ]
    assert train.command([*from_cache(argv, out, *more), f"run_root={tmp_path}"]) == 0
    assert "validation/loss" in {name for _, name, _ in rows(tmp_path / "cached")}
    cfg = compose("train", from_cache(argv, out, *more))
    data = build(cfg.data)
    data.setup()
    assert len(data.sources[0].selection) == 26  # of 40
    batch = next(iter(data.validation_stream()))
    assert batch.moments.dtype == batch.context.dtype == torch.float16
    assert batch.weight.tolist() == [1.0] * len(batch)
    assert batch.target_size.tolist() == [[16, 16]] * len(batch)
    assert batch.original_size.tolist() == [[533, 640]] * len(batch)


@pytest.mark.slow
def test_damaged_pictures_are_left_out_and_counted(made, laion, tmp_path, capsys):
    _, argv, flags = made
    damaged = shutil.copytree(laion, tmp_path / "damaged")
    index = build_index(str(damaged / "00001.tar"))
    row = index.samples[3]
    with open(damaged / "00001.tar", "r+b") as file:
        file.seek(int(row["image_offset"]) + 400)
        file.write(bytes(int(row["image_size"]) - 400))
    words = without(argv, "data.shards=")
    assert cache(tmp_path / "out", [*words, f"data.shards={damaged}/00001.tar"], *flags) == 0
    assert "left out: corrupt_image 1" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out/dataset.json").read_bytes())
    assert facts["left_out"] == {"corrupt_image": 1}
    keys = [key.split("/")[1] for key in build_index(str(tmp_path / "out")).keys(np.arange(15))]
    assert keys == [f"0000000{i:02d}" for i in range(16) if i != 3]


@pytest.mark.slow
def test_storage_that_fails_stops_it(made, laion, tmp_path, shutdown, monkeypatch):
    """Nothing is left out for a reason that may pass, and the same command goes on."""
    _, argv, flags = made
    away = shutil.copytree(laion, tmp_path / "away")
    words = [*without(argv, "data.shards="), f"data.shards={away}/0000*.tar", "data.reading.retries=1"]
    original = cache_module.pictures

    def pictures(*args):
        (away / "00001.tar").rename(away / "00001")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(precompute, "pictures", pictures)
        line = shutdown(lambda: cache(tmp_path / "out", words, *flags))
    assert "cannot be read (missing); the same command goes on from here" in line
    (away / "00001").rename(away / "00001.tar")
    assert cache(tmp_path / "out", words, *flags) == 0
    assert len(build_index(str(tmp_path / "out"))) == 40


@pytest.mark.slow
def test_numbers_that_do_not_fit_are_refused(made, autoencoder_run, tmp_path, shutdown):
    _, argv, flags = made
    large = shutil.copytree(autoencoder_run, tmp_path / "large")
    found = native.resolve(large)
    tensors = {name: native.load_tensors(found, name) for name in ("model", "ema")}
    for own in tensors.values():
        own["autoencoder.quant_conv.weight"] *= 1e7
    documents = {name: native.load_document(found, name) for name in ("state.json", "config.yaml")}
    native.save(large / "checkpoints", 8, tensors, documents)
    line = shutdown(lambda: cache(tmp_path / "out", [*argv, f"autoencoder_from={large}"], *flags))
    assert "has numbers that fp16 cannot hold; pass --dtype fp32" in line


@pytest.mark.slow
def test_a_recipe_of_stages_is_cached_for_its_last(two_stages, tmp_path):
    """With the autoencoder that the run itself trained; the text transformer is trained on, so not cached."""
    argv = two_stages(tmp_path / "runs")
    assert train.command(argv) == 0
    assert cache(tmp_path / "cache", argv) == 0
    facts = read_facts(tmp_path / "cache", "x")
    assert (facts.conditioner, list(facts.shapes), facts.complete) == (None, ["moments"], True)


def test_commands_of_the_page_compose():
    page = (ROOT / "docs/cache.md").read_text(encoding="utf-8")
    lines, buckets = (block.splitlines() for block in re.findall(r"```bash\n(.*?)```", page, re.S))
    assert [line.split()[:3] for line in lines[:2]] == [["ldm", "data", "index"], ["ldm", "data", "cache"]]
    for line in (*lines[1:4], *buckets):
        words = [word for word in line.split() if "=" in word]
        cfg = compose("train", words)
        kind = "CachedDataModule" if "data=cached" in words else "ShardDataModule"
        assert cfg.data["_target_"].endswith(kind)
    script = (ROOT / "slurm/data_cache.sbatch").read_text(encoding="utf-8")
    assert '-m ldm.cli data cache "$@"' in script


def test_arguments_of_processes():
    assert task_of(None, {}) == (0, 1)
    assert task_of(None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == (0, 1)
    assert task_of(None, {"RANK": "2", "WORLD_SIZE": "4", "SLURM_PROCID": "1"}) == (2, 4)
    srun = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}
    assert task_of(None, srun) == (3, 4)
    array = {
        f"SLURM_ARRAY_TASK_{k}": v for k, v in (("COUNT", "3"), ("MIN", "2"), ("STEP", "2"), ("ID", "6"))
    }
    assert task_of(None, array) == (2, 3)
    assert task_of(None, srun | array) == (11, 12)
