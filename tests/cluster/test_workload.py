"""What a config asks for, against sums, against real steps on the CPU and against what recipes say."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from ldm import random
from ldm.cluster import published, workload
from ldm.cluster.forecast import Work
from ldm.cluster.workload import Saved, Workload, loss, sample, side_of, trace, traced
from ldm.config import CONFIG_DIR
from ldm.training.assembly import build_module
from ldm.training.summary import memory, without_weights

SIDE = 32


def diffusion(composed, *more):
    return composed("quickstart_diffusion", f"data.image_size={SIDE}", *more)


def test_fake_bytes_are_the_bytes_of_a_real_step(composed, monkeypatch):
    """The same step with real tensors: equal operations, FLOPs and kept bytes. Noise is torch's in both."""
    monkeypatch.setattr(random, "_arrays", lambda n: (torch, n.to(torch.int64).reshape(-1, 1)))
    cfg = without_weights(diffusion(composed))
    forecast = trace(build_module(cfg, device="meta"), SIDE, 5, None)
    module = build_module(cfg).train()
    real = traced(module, lambda: loss(module, sample(5, SIDE)), None)
    assert (forecast.saved, forecast.flops, forecast.ops) == (real.saved, real.flops, real.ops)


def test_kept_bytes_against_the_allocator(composed):
    """What a real forward pass leaves allocated, by torch's profiler."""
    module = build_module(without_weights(diffusion(composed))).train()
    batch = sample(8, SIDE)
    loss(module, batch)  # masks and tables that are made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        found = loss(module, batch)
    allocated = sum(event.self_cpu_memory_usage for event in seen.events())
    saved = Saved(workload.parameters(module))
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        loss(module, batch)
    assert found.requires_grad
    assert saved.bytes == pytest.approx(allocated, rel=0.1)


@pytest.mark.slow
def test_a_stage_of_an_autoencoder(composed):
    """What is trained and what stays, as counted elsewhere."""
    load = workload.workload(composed("quickstart_autoencoder"))
    assert set(load.tflop) == {"autoencoder"}
    module = build_module(without_weights(composed("quickstart_autoencoder")), device="meta")
    assert load.work.parameters == sum(p.numel() for p in module.parameters())
    assert load.static == {k: v for k, v in memory(module).items() if k != "checkpoint"}


def test_operations_of_a_convolution_by_hand():
    conv = torch.nn.Conv2d(3, 8, 3, padding=1)
    counting, pictures = workload.Counting(), torch.zeros(2, 3, 16, 16)
    with counting:
        conv(pictures)
    assert counting.flops["other"] == 2 * 2 * 16 * 16 * 8 * 3 * 9
    assert counting.ops["other"] == 1


def test_memory_is_a_line_and_fits_is_its_inverse():
    static = {"weights": 1_000_000_000, "gradients": 500_000_000}
    load = Workload(Work(1e12, 600, 10**8), {}, static, 0, 0.0, 1e9, 0.0, 5e4)
    one, two, nine = (load.memory(n, 8) for n in (1, 2, 9))
    assert nine - one == pytest.approx(8 * (two - one)) == pytest.approx(8 * 1.05e9)
    assert load.memory(1, 8) - load.memory(1, 1) == pytest.approx(1.05 * load.static["gradients"])
    for capacity in (5e9, 20e9, 20.3e9):
        most = load.fits(capacity, 8)
        assert load.memory(most, 8) <= capacity < load.memory(most + 1, 8)
    assert load.fits(1e9, 8) == 0


@pytest.mark.slow
def test_checkpointing_trades_memory_for_work(composed):
    plain_, recomputed = (
        workload.workload(diffusion(composed, f"backbone.gradient_checkpointing={on}"))
        for on in ("false", "true")
    )
    assert recomputed.tflop["backbone"] == pytest.approx(4 / 3 * plain_.tflop["backbone"])
    assert recomputed.each + recomputed.block < plain_.each
    assert recomputed.block > 0 == plain_.block
    assert recomputed.static == plain_.static


@pytest.mark.slow
def test_autocast_keeps_less_and_casts_weights(composed):
    whole, half = (
        workload.workload(diffusion(composed, f"trainer.precision={name}"))
        for name in ("32-true", "bf16-mixed")
    )
    assert half.each < whole.each
    assert half.fixed - whole.fixed > 0.4 * whole.static["weights"], "about half of the weights' bytes"
    assert half.static == whole.static


@pytest.mark.slow
def test_cached_latents_are_not_encoded(composed):
    cfg = diffusion(composed)
    cached = {**cfg, "data": {**cfg["data"], "_target_": "ldm.data.cached.CachedDataModule", "text": True}}
    before, after = workload.workload(cfg), workload.workload(cached)
    assert set(before.tflop) - set(after.tflop) == {"autoencoder"}, "and the text tower is trained"
    assert after.picture_bytes < before.picture_bytes == workload.JPEG


@pytest.mark.slow
def test_operations_and_parameters_of_stable_diffusion(composed):
    """Counts of others: U-Net of 1 at 32 and 64: 0.1801 and 0.8033; CLIP 0.0133, H/14 0.0451."""
    for name, network, text in (("sd1_256", 0.1801, 0.0133), ("sd1_512", 0.8033, 0.0133)):
        load = workload.workload(composed(name))
        assert load.tflop["backbone"] / 3 == pytest.approx(network, rel=1e-3)
        assert load.tflop["conditioner"] == pytest.approx(text, rel=1e-2)
        assert load.work.parameters == 859_520_964
    load = workload.workload(composed("sd2_base_512"))
    assert load.tflop["backbone"] * 1e12 == pytest.approx(published.UNET[512], rel=1e-3)
    assert load.tflop["conditioner"] * 1e12 == pytest.approx(published.TEXT, rel=1e-2)
    assert load.work.parameters == published.PARAMETERS
    assert load.work.ops == pytest.approx(published.UNET_OPS, rel=0.01)


GATE = ("sd1_256", "upscaler_x4", "autoencoder_kl_f8", "autoencoder_vq_f4", "ldm_class")
RECIPES = [
    pytest.param(path.stem, marks=pytest.mark.slow if path.stem in GATE else pytest.mark.soak)
    for path in sorted((CONFIG_DIR / "experiment").glob("*.yaml"))
]


@pytest.mark.parametrize("name", RECIPES)
def test_work_is_what_the_recipe_s_header_says(name, composed):
    text = (CONFIG_DIR / f"experiment/{name}.yaml").read_text(encoding="utf-8")
    said = re.search(r"pictures of ([\d.]+) TFLOP", text)
    if said is None:
        pytest.skip("a recipe of several stages, or one that says nothing")
    cfg = composed(name)
    assert workload.workload(cfg).work.flops / 1e12 == pytest.approx(float(said[1]), rel=6e-3)
    assert side_of(cfg) > 0


@pytest.mark.slow
def test_the_text_tower_of_the_published_table(composed):
    """OpenCLIP ViT-H/14 without its last block, which MLPerf 3.1 launched operation by operation."""
    module = build_module(without_weights(composed("sd2_base_512")), device="meta")
    counting = workload.Counting()
    with FakeTensorMode(allow_non_fake_inputs=True):
        workload.imitate(module)
        batch = sample(1, 64)
        with counting, torch.no_grad():
            module.frozen["conditioner"](batch)
    assert counting.ops["other"] == published.TEXT_OPS
    assert counting.flops["other"] == pytest.approx(published.TEXT, rel=1e-3)
