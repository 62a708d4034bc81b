"""What `speed` in the config switches on: the same training, by other means."""

import csv

import pytest
import torch
from torch._dynamo.utils import counters

import train
from ldm.checkpoints import native
from ldm.nn import compiling, norm


def losses(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row[2]) for row in csv.reader(file) if row[1] in ("train/loss", "validation/loss")]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled_blocks_train_alike_and_are_compiled_once(backend, recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "BACKEND", backend)
    monkeypatch.setattr("torch._dynamo.config.recompile_limit", 8)
    monkeypatch.setattr("torch._dynamo.config.fail_on_recompile_limit_hit", False)
    torch._dynamo.reset()
    counters.clear()
    assert train.command(recipe(2, "plain")) == 0
    assert not counters["stats"]
    graphs = []
    monkeypatch.setattr(
        "ldm.training.module.TrainingModule.on_train_batch_end",
        lambda self, *a: graphs.append(counters["stats"]["unique_graphs"]),
    )
    assert train.command(recipe(2, "compiled", "speed.compile=true")) == 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    assert graphs[0] > 0
    assert graphs[-1] == graphs[4], "pictures and validation after steps 4 and 5 have graphs of their own"
    names = [native.newest(tmp_path / run / "checkpoints") for run in ("plain", "compiled")]
    states = [native.load_tensors(path, "model") for path in names]
    assert states[0].keys() == states[1].keys()


@pytest.mark.parametrize("stage", [1, 2])
def test_the_fused_norm_trains_alike(stage, recipe, monkeypatch, tmp_path):
    assert train.command(recipe(stage, "plain")) == 0
    used = []
    from ldm.nn.kernels import group_norm as kernels

    original = kernels.group_norm
    monkeypatch.setattr(kernels, "group_norm", lambda *a: used.append(len(a)) or original(*a))
    assert train.command(recipe(stage, "fused", "speed.fused_norm=true", "trainer.max_steps=2")) == 0
    assert used
    assert not norm._fused, "it is of one run"
    count = len(losses(tmp_path / "fused"))
    assert losses(tmp_path / "fused")[:1] == pytest.approx(losses(tmp_path / "plain")[:1], rel=1e-5)
    assert count


def test_fused_noise_is_the_same_noise(recipe, monkeypatch, tmp_path):
    from ldm import random
    from ldm.nn.kernels import normal as kernels

    short = "trainer.max_steps=2"
    assert train.command(recipe(2, "plain", short)) == 0
    used, original = [], kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda *a: used.append(a) or original(*a))
    assert train.command(recipe(2, "fused", short, "speed.fused_noise=true")) == 0
    assert used
    assert random._fused is None, "it is of one run"
    assert losses(tmp_path / "fused") == losses(tmp_path / "plain")
