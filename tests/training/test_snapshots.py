"""Averages of several lengths in a run: resumed bit for bit, kept in snapshots, others made of those."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm
import train
from ldm import cli
from ldm.checkpoints import native
from ldm.checkpoints.posthoc import combine, snapshots
from ldm.training.callbacks.snapshots import EMASnapshots

LENGTHS = "module.ema_lengths=[0.05,0.1]"
OFTEN = [LENGTHS, "callbacks.snapshots.every=1", "callbacks.snapshots.keep=4"]


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def averages(checkpoint):
    return {p.name: p.read_bytes() for p in checkpoint.glob("ema*.safetensors")}


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_averages_and_snapshots_of_a_whole_one(stage, recipe, tmp_path):
    """Killed at step 5, after the checkpoint of step 3: what came between belongs to no run any more."""
    assert train.command(recipe(stage, "whole", *OFTEN)) == 0
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert list(snapshots(whole / "ema")) == [2, 4, 6]
    expected = averages(native.newest(whole / "checkpoints"))
    assert set(expected) == {"ema.safetensors", "ema-0.05.safetensors", "ema-0.1.safetensors"}
    assert len(set(expected.values())) == 3

    assert train.command(recipe(stage, "parts", *OFTEN, "trainer.max_steps=5")) == 0
    shutil.rmtree(parts / "checkpoints/step-000000005")
    (parts / f"ema/step-000000006.tmp-{os.getpid()}").mkdir()
    shutil.copytree(parts / "ema/step-000000004", parts / "ema/step-000000005")
    save_file({"odd": torch.zeros(1)}, parts / "ema/step-000000004/ema-0.05.safetensors")
    first = (parts / "ema/step-000000002").stat().st_mtime_ns
    assert train.command(recipe(stage, "parts", *OFTEN)) == 0
    assert files(parts / "ema") == files(whole / "ema")
    assert averages(native.newest(parts / "checkpoints")) == expected
    assert (parts / "ema/step-000000002").stat().st_mtime_ns == first, "written once"
    assert len(list((parts / "ema").iterdir())) == 3, "nothing half-written is left"


@pytest.mark.parametrize("keep", [2, 5, 32])
def test_the_run_stays_covered_evenly_by_no_more_than_keep(keep, tmp_path):
    callback = EMASnapshots(tmp_path, every=10, keep=keep)
    for step in range(10, 2000, 10):
        spacing = callback.spacing(step)
        assert spacing % 10 == 0
        assert keep / 2 - 1 <= step // spacing <= keep or spacing == 10
        assert callback.spacing(step - 1) <= spacing
    assert callback.spacing(10 * keep) == 10
    assert callback.spacing(10 * keep + 10) == 20


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ("module.ema_lengths=[0.05,0.5]", "module: length 0.5 must be above 0 and below 0.2887"),
        ("module.ema_lengths=[0.05,0.050]", "module: ema_lengths=[0.05, 0.05] has a length twice"),
        ("callbacks.snapshots.keep=1", "callbacks.snapshots: keep=1 must be a number of snapshots from 2"),
        (
            "callbacks.snapshots.dtype=int8",
            "callbacks.snapshots: dtype=int8 must be one of float16, bfloat16",
        ),
    ],
)
def test_wrong_input_is_one_line(wrong, line, recipe, refused, tmp_path, autoencoder_run):
    assert refused(recipe(2, "x", wrong)).startswith(line)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_resumed_with_other_lengths(recipe, refused, tmp_path):
    assert train.command(recipe(1, "run")) == 0
    assert set(averages(native.newest(tmp_path / "run/checkpoints"))) == {"ema.safetensors"}
    assert not (tmp_path / "run/ema").exists(), "none are made unasked"
    more = [LENGTHS, "trainer.max_steps=9"]
    assert "module.ema_lengths=[], the config says [0.05, 0.1]" in refused(recipe(1, "run", *more))
    line = refused(recipe(1, "other", *more, f"resume={tmp_path}/run"))
    assert "ema-0.05.safetensors: not found" in line


@pytest.mark.slow
def test_another_length_samples_and_is_stored_as_a_checkpoint(recipe, refused, capsys, tmp_path):
    assert train.command(recipe(2, "run", *OFTEN)) == 0
    run, out = tmp_path / "run", tmp_path / "out"
    assert cli.main(["ema", str(run), str(out), "--length", "0.07"]) == 0
    said = capsys.readouterr().out.splitlines()[-2:]
    assert said[0] == f"{out}/step-000000007: weights averaged over length 0.07 up to step 7"
    assert said[1].startswith("8 snapshots meet that profile to 1.")
    pipes = [ldm.load(run, weights="ema:0.07"), ldm.load(out), ldm.load(run), ldm.load(out, weights="raw")]
    for name, value in pipes[0].backbone.state_dict().items():
        assert torch.equal(value, pipes[1].backbone.state_dict()[name])
        assert torch.equal(pipes[1].autoencoder.latent_scale, pipes[2].autoencoder.latent_scale)
    made, stored, main, raw = (pipe("one", num_steps=2)[0] for pipe in pipes)
    assert made.tobytes() == stored.tobytes()
    assert len({picture.tobytes() for picture in (made, main, raw)}) == 3
    assert 'Model: run step-000000007, Weights: "ema:0.07"' in made.info["parameters"]
    assert "Model hash" in made.info["parameters"], "another than that of the weights it was made beside"
    shutil.rmtree(run)  # the stored one needs nothing of it
    assert ldm.load(out)("one", num_steps=2)[0].tobytes() == stored.tobytes()
    again = recipe(2, "again", f"init_from={out}", "trainer.max_steps=1", "optimizer.lr=0.0")
    assert train.command(again) == 0
    start = native.load_tensors(native.resolve(tmp_path / "again"), "model")
    for name, value in native.load_tensors(native.resolve(out), "ema").items():
        torch.testing.assert_close(start[name], value, rtol=1e-6, atol=1e-7)
    assert "optimizer.safetensors: not found" in refused(recipe(2, "more", f"resume={out}"))


# ---- a run of some hundred steps: averages made afterwards against tracked ones ------------------------

STEPS = 256
BOUNDS = {  # dtype of 16 snapshots: {length: largest error as a share of the distance from raw weights}
    "float32": {0.04: 0.005, 0.08: 0.001, 0.15: 0.001, 0.2: 0.003},
    "float16": {0.04: 0.015, 0.08: 0.003, 0.15: 0.003, 0.2: 0.004},
    "bfloat16": {0.04: 0.12, 0.08: 0.02, 0.15: 0.02, 0.2: 0.03},
}


def joined(tensors, names):
    return torch.cat([tensors[name].double().flatten() for name in sorted(names)])


@pytest.mark.slow
def test_averages_made_afterwards_are_those_tracked(recipe, tmp_path):
    lengths = list(BOUNDS["float32"])
    rare = [f"callbacks.{name}.every={STEPS}" for name in ("metrics", "checkpoint", "validation", "pictures")]
    asked = [f"module.ema_lengths={[0.05, 0.1, *lengths]}", "callbacks.snapshots.dtype=float32"]
    every = [f"trainer.max_steps={STEPS}", f"callbacks.snapshots.every={STEPS // 16}"]
    assert train.command([*recipe(2, "run", *asked), *rare, *every]) == 0
    run, direct = tmp_path / "run", {}
    checkpoint = native.newest(run / "checkpoints")
    for length in lengths:  # from here on only the checkpoint's own two and their snapshots are there
        direct[length] = native.load_tensors(checkpoint, f"ema-{length}")
        for path in run.rglob(f"ema-{length}.safetensors"):
            path.unlink()
    taken = {path: load_file(path) for path in run.rglob("ema/step-*/*.safetensors")}
    assert len(taken) == 2 * 16
    raw = native.load_tensors(checkpoint, "model")
    for dtype, bounds in BOUNDS.items():
        for path, tensors in taken.items():
            save_file({name: value.to(getattr(torch, dtype)) for name, value in tensors.items()}, path)
        for length, bound in bounds.items():
            names = direct[length].keys()
            made, tracked, last = (
                joined(t, names) for t in (dict(combine(checkpoint, length).tensors()), direct[length], raw)
            )
            error, distance = (made - tracked).norm().item(), (tracked - last).norm().item()
            print(f"{dtype} {length}: {error / tracked.norm().item():.1e}, {error / distance:.1e} of the way")
            assert error < 0.01 * tracked.norm().item()
            assert error < bound * distance
            assert distance > 1e-3 * tracked.norm().item(), "or there would be nothing to reconstruct"
