"""What happens beside the step: log, pictures, validation, retention; and that no step waits."""

import contextlib
import csv
import io
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

import train
from ldm.checkpoints import native
from ldm.config import build, compose
from ldm.diffusion.samplers import ddim
from ldm.training import starting
from ldm.training.assembly import build_module
from ldm.training.callbacks.base import StepCallback
from ldm.training.callbacks.metrics import MetricsLog
from ldm.training.callbacks.pictures import TextPictures
from ldm.training.callbacks.progress import ProgressBar
from ldm.training.ema import EMA
from ldm.training.module import TrainingModule


def table(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [(int(row["step"]), row["name"], float(row["value"])) for row in csv.DictReader(file)]


@pytest.fixture
def plain_trainer():
    return SimpleNamespace(
        precision_plugin=SimpleNamespace(forward_context=contextlib.nullcontext),
        is_global_zero=True,
        global_step=0,
        max_steps=3,
    )


# ---- log


@pytest.mark.parametrize("stage", [1, 2])
def test_the_log_of_a_run(stage, recipe, tmp_path):
    assert train.command(recipe(stage, "run")) == 0
    rows = table(tmp_path / "run")
    names = {name for _, name, _ in rows}
    expected = {
        "train/loss",
        "train/loss_spikes",
        "train/lr",
        "perf/images_per_sec",
        "perf/data_wait_percent",
    }
    expected |= {"train/skipped", *(f"train/{name}_norm" for name in ("grad", "param", "update"))}
    expected |= {f"perf/{name}" for name in ("images_per_sec_per_gpu", "memory_gb", "hours_left")}
    if stage == 1:
        assert names == expected | {"train/l1", "train/kl", "validation/psnr", "validation/ssim"}
    else:
        levels = {f"train/loss_t{k}" for k in range(4)}
        assert expected | {"validation/loss"} < names <= expected | levels | {"validation/loss"}
    assert [step for step, name, _ in rows if name == "train/loss"] == [2, 4, 6]
    assert {step for step, name, _ in rows if name.startswith("validation/")} == {4}
    assert [value for _, name, value in rows if name == "train/lr"] == pytest.approx([2e-3 / 3, 1e-3, 1e-3])
    assert all(value > 0 for _, name, value in rows if name == "perf/images_per_sec")
    assert len(rows) == len(set(rows))


def test_a_row_is_the_mean_since_the_row_before(recipe, tmp_path):
    assert train.command(recipe(2, "one", "callbacks.metrics.every=1")) == 0
    assert train.command(recipe(2, "three", "callbacks.metrics.every=3")) == 0
    one, three = (
        {step: value for step, name, value in table(tmp_path / run) if name == "train/loss"}
        for run in ("one", "three")
    )
    assert set(three) == {3, 6}
    assert three[6] == pytest.approx((one[4] + one[5] + one[6]) / 3, rel=1e-5)


def test_rows_ahead_of_the_checkpoint_and_torn_rows_go_on_resume(recipe, rows, tmp_path):
    assert train.command(recipe(1, "run", "trainer.max_steps=5")) == 0
    assert train.command(recipe(1, "whole")) == 0
    log = tmp_path / "run/metrics.csv"
    log.write_text(log.read_text() + "6,train/loss,123\n8,train/loss,124\n4,train/l")
    assert train.command(recipe(1, "run")) == 0
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


# ---- validation, pictures


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_validation_is_that_of_the_averaged_weights(stage, recipe, tmp_path):
    argv = recipe(stage, "run", "trainer.max_steps=4", "module.ema_decay=0.9")
    assert train.command(argv) == 0
    cfg = compose("train", argv)
    found = native.newest(tmp_path / "run/checkpoints")
    terms = {}
    for weights in ("ema", "raw"):
        module = build_module(cfg).eval()
        start = compose("train", [*argv, f"init_from={found}"])
        starting.fill(module, start, None, starting.opened(start, None))
        module.ema = EMA(module)
        if weights == "raw":
            module.load_state_dict(native.load_tensors(found, "model"))
        total, count = 0.0, 0.0
        for batch in build(cfg.data, tokenize=module.tokenizer).val_dataloader():
            with torch.no_grad():
                name, (part, number) = next(iter(module.validation_terms(batch).items()))
            total, count = total + float(part), count + float(number)
        assert count == 8, "all that is held out"
        terms[weights] = total / count
    logged = [value for _, row, value in table(tmp_path / "run") if row == name]
    assert logged == [pytest.approx(terms["ema"], rel=1e-5)]
    assert abs(terms["raw"] - terms["ema"]) > 1e-5 * abs(terms["ema"]), "else the test says nothing"


@pytest.fixture
def sampled(networks, plain_trainer):
    """A module with weights of its own, and the function that samples two prompts from it."""
    from ldm.diffusion.denoiser import Simple, Uniform
    from ldm.diffusion.noise_scheduler import VariancePreserving
    from ldm.training.diffusion_module import LatentDiffusionModule
    from ldm.training.optim import Constant

    parts = [*networks(), VariancePreserving(), Simple(), Uniform(), torch.optim.SGD, Constant()]
    module = LatentDiffusionModule(*parts).train()
    module.ema = EMA(module)
    pictures = TextPictures("x", 1, ["one", "two"], image_size=16, sampler=ddim, num_steps=2)
    return module, lambda: [image.tobytes() for image in pictures.sample(plain_trainer, module)]


def test_pictures_come_from_the_averaged_weights(sampled):
    module, sample = sampled
    first = sample()
    assert len(set(first)) == 2
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
    own = {name: value.clone() for name, value in module.state_dict().items()}
    assert sample() == first, "only the raw weights changed"
    assert module.training
    assert all(torch.equal(value, own[name]) for name, value in module.state_dict().items())
    for average in module.ema.average:
        average.mul_(0.5)
    assert sample() != first


@pytest.mark.parametrize(("stage", "cells"), [(1, (4, 3)), (2, (2, 1))])
def test_sheets_of_pictures(stage, cells, recipe, tmp_path):
    argv = recipe(stage, "run", "trainer.max_steps=5")
    assert train.command([*argv, "callbacks.pictures.num_images=4"] if stage == 1 else argv) == 0
    (sheet,) = (tmp_path / "run/samples").iterdir()
    assert sheet.name == "step-000000005.png"
    with Image.open(sheet) as image:
        assert image.width >= 16 * cells[0]
        assert image.height >= 16 * cells[1]
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20, "pictures, not an empty page"


def test_no_validation_data_is_no_validation(recipe, tmp_path):
    argv = recipe(1, "run", "trainer.max_steps=5", "data.validation_shards=null")
    assert train.command(argv) == 0
    assert not any(name.startswith("validation/") for _, name, _ in table(tmp_path / "run"))
    assert not (tmp_path / "run/samples").exists(), "stage 1 draws held-out pictures"


# ---- checkpoints


@pytest.mark.parametrize(("every", "keep", "kept"), [(1, 2, [6, 7]), (3, 3, [3, 6, 7]), (100, 1, [7])])
def test_the_newest_checkpoints_and_the_last_step_are_kept(every, keep, kept, recipe, tmp_path):
    numbers = [f"callbacks.checkpoint.every={every}", f"callbacks.checkpoint.keep_last={keep}"]
    assert train.command(recipe(1, "run", *numbers)) == 0
    found = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert found == [f"step-{step:09d}" for step in kept]
    assert all(native.problem(tmp_path / "run/checkpoints" / name) is None for name in found)


def test_what_a_checkpoint_says(recipe, tmp_path):
    assert train.command(recipe(2, "run")) == 0
    newest = native.newest(tmp_path / "run/checkpoints")
    state = native.load_document(newest, "state.json")
    assert (state["step"], state["images"]) == (7, 28)
    assert state["seconds"] > 0
    tensors, _ = native.load_network(newest, state["networks"]["autoencoder"])
    assert "latent_shift" in tensors
    model, ema = (native.load_tensors(newest, kind) for kind in ("model", "ema"))
    assert {name.split(".")[0] for name in model} == {"backbone", "conditioner"}
    assert set(ema) <= set(model)
    assert all(value.dtype == torch.float32 for value in ema.values())


# ---- when callbacks act


def test_callbacks_act_once_an_optimizer_step():
    seen = []
    callback = StepCallback()
    callback.on_step = lambda trainer, module, step: seen.append(step)
    trainer = SimpleNamespace(global_step=4)
    callback.on_train_start(trainer, None)
    for step in (4, 5, 5, 6):  # micro-batches
        trainer.global_step = step
        callback.on_train_batch_end(trainer, None, None, None, 0)
    assert seen == [5, 6]
    with pytest.raises(ValueError, match="every=0"):
        StepCallback(0)


class Watch(TorchDispatchMode):
    """Notes the steps in which a number is fetched from the device: there the host waits."""

    def __init__(self):
        super().__init__()
        self.step, self.fetched = None, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = func._overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        if waits and self.step is not None:
            self.fetched.append(self.step)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", [1, 2])
def test_only_steps_that_log_wait_for_the_device(stage, recipe, monkeypatch):
    watch = Watch()

    seeds = TrainingModule.on_train_batch_start  # a generator on the host

    def start(self, batch, batch_idx):
        seeds(self, batch, batch_idx)
        watch.step = self.trainer.global_step + 1

    def end(self, outputs, batch, batch_idx):
        watch.step = None

    monkeypatch.setattr(TrainingModule, "on_train_batch_start", start)
    monkeypatch.setattr(TrainingModule, "on_train_batch_end", end)
    monkeypatch.setattr(TrainingModule, "on_host", False)  # as on a GPU
    often = ["trainer.max_steps=11", "callbacks.metrics.every=4", "trainer.accumulate_grad_batches=2"]
    rare = [f"callbacks.{name}.every=100" for name in ("checkpoint", "validation", "pictures")]
    argv = recipe(stage, "run", *often, *rare)
    with watch:
        assert train.command(argv) == 0
    assert set(watch.fetched) <= {4, 8, 11}, "11 is the last: latents are measured and a checkpoint is saved"
    with watch:
        watch.step = 0
        torch.ones(()).item()
    assert 0 in watch.fetched


# ---- progress


def test_the_bar_of_a_terminal(plain_trainer, tmp_path):
    metrics = MetricsLog(tmp_path / "metrics.csv")
    metrics.latest = {"perf/images_per_sec": 12.3, "train/loss": 0.5, "validation/psnr": 25.0}
    bar = ProgressBar("autoencoder", metrics)
    bar.console = Console(file=io.StringIO(), force_terminal=True, width=160)
    bar.on_train_start(plain_trainer, None)
    bar.on_step(plain_trainer, None, 2)
    bar._bar.refresh()
    bar.on_exception(plain_trainer, None, RuntimeError())
    assert bar._bar is None
    text = bar.console.file.getvalue()
    for word in ("autoencoder", "2/3", "12 images/s  loss 0.5000  PSNR 25.0 dB"):
        assert word in text


def test_a_line_in_a_file_and_nothing_from_other_ranks(plain_trainer, tmp_path):
    bar = ProgressBar("diffusion", MetricsLog(tmp_path / "metrics.csv"), every=2)
    bar.console = Console(file=io.StringIO(), width=160)
    bar.on_train_start(plain_trainer, None)
    for step in (1, 2, 3):
        bar.on_step(plain_trainer, None, step)
    plain_trainer.is_global_zero = False
    bar.on_step(plain_trainer, None, 2)
    lines = bar.console.file.getvalue().splitlines()
    assert [line.split("  ")[:2] for line in lines] == [["diffusion", f"step {step}/3"] for step in (2, 3)]


def test_pictures_that_cannot_be_drawn_are_refused_before_the_first_step(recipe, refused, tmp_path):
    argv = recipe(2, "x", "sampler=plms", "sampling.spacing=karras", "sampling.num_steps=6")
    assert refused(argv).startswith("callbacks.pictures: ")
    assert not (tmp_path / "x/checkpoints").exists()
