"""How fast, how far, who is slow: against counts from elsewhere, closed forms, and a rank that is slow."""

import csv
import logging
import os
import re
import resource
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from ldm.config import build, compose, plain
from ldm.training import flops
from ldm.training.callbacks.metrics import MetricsLog
from ldm.training.callbacks.stragglers import Laps, own_seconds, slow_ranks
from ldm.training.callbacks.throughput import Throughput, clock, story
from ldm.training.module import TrainingModule
from ldm.types import Batch


def values(run, name):
    with (run / "metrics.csv").open(newline="") as file:
        return {int(row[0]): float(row[2]) for row in csv.reader(file) if row[1] == name}


# ---- FLOPs and MFU


def pictures(count, side, **more):
    n = torch.arange(count)
    image = torch.zeros(count, 3, side, side, dtype=torch.uint8)
    return Batch(n, torch.ones(count), image=image, caption=[""] * count, **more)


@pytest.mark.slow
def test_flops_of_stable_diffusion_1_from_cached_latents():
    """0.540 TFLOP a picture at 256 px: three times the 0.1801 that the U-Net's forward pass takes.

    The figure is that of an independent count (diffusers' U-Net of the same 859 M parameters). The first
    convolution and time embedding need no gradient of their input: a little less than three times.
    """
    argv = ["experiment=laion_subset", "data.shards=x", "autoencoder_from=x", "module.drop=0"]
    cfg = plain(compose("train", [*argv, "backbone.gradient_checkpointing=true"]))
    batch = pictures(2, 256, context=torch.zeros(2, 77, 768), moments=torch.zeros(2, 8, 32, 32))
    assert flops.flops_per_image(cfg, batch) == pytest.approx(0.540e12, rel=0.005)


def test_a_frozen_autoencoder_counts_forward_alone(data, small_diffusion):
    argv = ["trainer=cpu", "run_name=x", "autoencoder_from=x", *data, *small_diffusion]
    cfg = plain(compose("train", [*argv, "module.drop=0"]))  # a dropped caption is encoded once a batch
    tokens = torch.zeros(3, 12, dtype=torch.int64)
    whole = flops.flops_per_image(cfg, pictures(3, 16, tokens=tokens))
    assert whole == flops.flops_per_image(cfg, pictures(1, 16, tokens=tokens[:1])), "of a picture"
    cached = flops.flops_per_image(cfg, pictures(3, 16, tokens=tokens, moments=torch.zeros(3, 8, 4, 4)))
    encoder = whole - cached
    with torch.device("meta"):
        autoencoder = build(cfg["autoencoder"])
    with FlopCounterMode(display=False) as counter:
        autoencoder.moments(torch.zeros(1, 3, 16, 16, device="meta"))
    assert encoder == counter.get_total_flops(), "frozen: no backward pass"


@pytest.mark.slow
def test_a_discriminator_counts_from_its_start(recipe):
    given = ["module=autoencoder_gan", "discriminator=patchgan", "module.start=5", "data.image_size=64"]
    cfg = plain(compose("train", recipe(1, "x", *given)))
    before, after = (flops.flops_per_image(cfg, pictures(2, 64), step) for step in (4, 5))
    with torch.device("meta"):
        judge, image = build(cfg["discriminator"]), torch.zeros(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        judge(image)
    forward = counter.get_total_flops()
    # Three passes forward (of a real picture, and twice of a drawn one) and their way back: to the weights of
    # the first two, to the picture of the third, and to what lies between, of all.
    assert 3 * forward < after - before <= 9 * forward


def test_counting_leaves_the_random_numbers_alone(recipe):
    cfg = plain(compose("train", recipe(1, "x")))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    flops.flops_per_image(cfg, pictures(1, 16))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA A1000", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_the_peak_of_a_device_by_its_name(name, peak):
    assert flops.peak_of(name) == peak
    assert flops.peak_flops(torch.device("cpu")) is None


def test_mfu_is_work_over_peak_and_changes_nothing_else(recipe, monkeypatch, tmp_path):
    assert train.command(recipe(1, "plain", "trainer.max_steps=3")) == 0
    assert not values(tmp_path / "plain", "perf/mfu"), "what a CPU can do is not known"
    counted, original = [], flops.flops_per_image

    def count(*args):
        time.sleep(1.0)  # is no training: the rate must not see it
        counted.append(original(*args))
        return counted[-1]

    monkeypatch.setattr(flops, "peak_flops", lambda device: 1e12)
    monkeypatch.setattr(flops, "flops_per_image", count)
    assert train.command(recipe(1, "run", "callbacks.metrics.every=1", "trainer.max_steps=3")) == 0
    run = tmp_path / "run"
    (cost,) = counted
    each = values(run, "perf/images_per_sec_per_gpu")
    assert each == values(run, "perf/images_per_sec"), "one device"
    assert values(run, "perf/mfu") == pytest.approx({k: v * cost / 1e12 for k, v in each.items()}, rel=1e-5)
    assert each[1] > 4 / 1.0, "the first row leaves the counting out"
    for name in ("model", "ema", "optimizer"):
        file = f"checkpoints/step-000000003/{name}.safetensors"
        assert (run / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_what_cannot_be_counted_is_left_out_with_a_word(monkeypatch, caplog, tmp_path):
    def fail(*args):
        raise NotImplementedError("no such kernel on meta")

    monkeypatch.setattr(flops, "flops_per_image", fail)
    callback = Throughput(MetricsLog(tmp_path / "metrics.csv"), {}, "run")
    assert callback._count(None, 0) == 0.0
    (said,) = caplog.records
    assert said.getMessage().endswith("FLOPs not counted (NotImplementedError: no such kernel on meta)")


# ---- rows and the story


def test_the_rows_and_the_story_of_a_run(recipe, monkeypatch, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    original = TrainingModule.optimizer_step

    def optimizer_step(self, *args, **kwargs):
        time.sleep(0.05)
        original(self, *args, **kwargs)

    monkeypatch.setattr(TrainingModule, "optimizer_step", optimizer_step)
    began, run = time.perf_counter(), tmp_path / "run"
    assert train.command(recipe(1, "run", "callbacks.metrics.every=1", "trainer.max_steps=13")) == 0
    took = time.perf_counter() - began
    left = {step: 3600 * hours for step, hours in values(run, "perf/hours_left").items()}
    assert list(left) == list(range(2, 14)), "the first step alone says nothing"
    assert left[13] == 0
    assert all(0.05 * (13 - step) <= seconds < took for step, seconds in left.items() if step < 13)
    last = values(run, "perf/memory_gb")[13]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    assert last == pytest.approx(peak, rel=0.1)
    lines = [line for line in (run / "log.txt").read_text().splitlines() if " run: " in line]
    assert "run: after step 0 of 13, 1 x cpu, rank 0 on " in lines[0]
    words = r"run: step (\d+) of 13  loss [\d.]+  [\d.,]+ images/s  data wait \d+ %"
    told = [re.search(words, line) for line in lines[1:]]
    assert [int(found[1]) for found in told] == [1, 11, 13], "the first row, each tenth, the last"
    assert "left 0:00:00" in lines[-1]
    quiet = [record for record in caplog.records if " images/s" in record.getMessage()]
    assert len(quiet) == 3
    assert all(record.file_only for record in quiet), "the terminal has a bar"


def test_words_of_a_line():
    row = {"train/loss": 0.25, "perf/images_per_sec": 1234.5, "perf/mfu": 0.331}
    row |= {"perf/data_wait_percent": 2.4, "perf/hours_left": 30.5}
    words = "loss 0.2500  1,234.5 images/s  MFU 33.1%  data wait 2 %  left 30:30:00"
    assert story("diffusion", 5000, 237000, row) == f"diffusion: step 5,000 of 237,000  {words}"
    assert clock(59.6) == "0:01:00"


# ---- slow ranks


@pytest.mark.parametrize(
    ("compute", "wait"),
    [
        ([1, 1, 1, 2], [0, 0, 0, 0]),
        ([1, 1, 1, 1], [0, 0, 1, 0]),
        ([3, 1, 2, 1.5], [0.1, 0.5, 0.2, 2]),
        ([2, 2], [0, 0]),
    ],
)
def test_own_work_is_found_behind_steps_that_end_together(compute, wait):
    """A forward pass is a third of a step's work; all wait for the slowest."""
    own = [c + w for c, w in zip(compute, wait, strict=True)]
    ranks = [(max(own), c / 3, w) for c, w in zip(compute, wait, strict=True)]
    assert own_seconds(ranks) == pytest.approx(own)
    assert slow_ranks(own) == {r for r, s in enumerate(own) if min(own) / s < 0.75}


def test_laps_of_micro_batches(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 6.0, 6.5, 8.5, 11.5, 12.0, 15.0, 18.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    laps = Laps(torch.device("cpu"))
    for ends in (False, True):  # a step of two: starts at 1 and 6.5, forward passes end at 3 and 8.5
        laps.batch_starts()
        laps.forward_ends()
        laps.forward_ends()  # a second loss
        laps.batch_ends(ends)
    assert laps.take() == pytest.approx((11.5, 4.0, 1.5))
    laps.batch_starts()
    laps.forward_ends()
    laps.batch_ends(True)
    assert laps.take() == pytest.approx((6.5, 3.0, 0.5))


SLOW = """
import os, sys, time
import train
from ldm.training.autoencoder_module import AutoencoderModule

original = AutoencoderModule.training_step


def training_step(self, batch, batch_idx):
    time.sleep(0.05 if self.global_rank == 1 else 0.01)
    return original(self, batch, batch_idx)


AutoencoderModule.training_step = training_step
if __name__ == "__main__":
    sys.exit(train.command(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_slow_rank_is_named_with_its_host(recipe, process, tmp_path):
    argv = [
        "trainer.max_steps=24",
        "callbacks.metrics.every=12",
        "data.global_batch_size=4",
        "trainer.strategy=ddp",
    ]
    two = process(recipe(1, "two", *argv, "trainer.devices=2"), source=SLOW)
    output, _ = two.communicate(timeout=300)
    assert two.returncode == 0, output
    run = tmp_path / "two"
    ratio = values(run, "perf/slowest_rank_ratio")
    assert list(ratio) == [12, 24]
    assert 0.1 < ratio[24] < 0.75, "both rest in the forward pass: 0.2, and what the layers take"
    each, together = (values(run, f"perf/images_per_sec{end}") for end in ("_per_gpu", ""))
    assert each == pytest.approx({step: rate / 2 for step, rate in together.items()}, rel=1e-5)
    named = [line for line in (run / "log.txt").read_text().splitlines() if "slow: rank" in line]
    assert len(named) == 1, "once, until it is another, or after minutes"
    assert f"slow: rank 1 on {os.uname().nodename} works " in named[0]
