"""What `speed` in the config switches on: the same training, by other means."""

import csv
import json
import re

import pytest
import torch
from torch._dynamo.utils import counters

import train
from ldm.checkpoints import native
from ldm.nn import compiling, norm


def losses(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row[2]) for row in csv.reader(file) if row[1] in ("train/loss", "validation/loss")]


@pytest.fixture
def limits():
    """Dynamo's are after a test as before; monkeypatch would leave them deleted."""
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_compiled_blocks_train_alike_and_are_compiled_once(backend, recipe, monkeypatch, caplog, tmp_path):
    caplog.set_level("INFO", "ldm.training.assembly")
    monkeypatch.setattr(compiling, "BACKEND", backend)
    torch._dynamo.reset()
    counters.clear()
    assert train.command(recipe(2, "plain")) == 0
    assert not counters["stats"]
    traced = []  # by now, after each step
    monkeypatch.setattr(
        "ldm.training.module.TrainingModule.on_train_batch_end",
        lambda self, *a: traced.append((counters["stats"]["unique_graphs"], counters["frames"]["total"])),
    )
    assert train.command(recipe(2, "compiled", "speed.compile=true", "trainer.max_steps=11")) == 0
    found = losses(tmp_path / "compiled")
    assert found[: len(plain := losses(tmp_path / "plain"))] == pytest.approx(plain, rel=1e-4)
    assert traced[0][0] > 0
    assert traced[1] == traced[2], "after step 2 a step traces nothing"
    assert traced[2] < traced[4], "validation at step 4 and pictures at step 5 have graphs of their own"
    assert traced[4] == traced[-1], "and trace nothing at steps 8 and 10, nor do the steps between"
    assert re.search(r"speed.compile: [1-9]\d* blocks.* kept in /.+ \(TORCHINDUCTOR_CACHE_DIR\)", caplog.text)
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


@pytest.mark.parametrize("stage", [1, 2])
def test_one_product_for_queries_keys_and_values_trains_alike(stage, recipe, monkeypatch, tmp_path):
    from ldm.nn import attention

    more = ["autoencoder.mid_attention=true"] if stage == 1 else []
    argv = [recipe(stage, name, *more, "trainer.max_steps=3") for name in ("plain", "fused")]
    assert train.command(argv[0]) == 0
    used, original = [], attention._project
    monkeypatch.setattr(attention, "_project", lambda x, layers: used.append(layers) or original(x, layers))
    assert train.command([*argv[1], "speed.fused_qkv=true"]) == 0
    assert {len(layers) for layers in used} == ({3} if stage == 1 else {2, 3})
    assert not attention._fused_qkv, "it is of one run"
    found, expected = (losses(tmp_path / name) for name in ("fused", "plain"))
    assert found == pytest.approx(expected, rel=1e-4)
    assert found


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_run_chooses_its_kernels_of_attention_once(compiled, recipe, monkeypatch, tmp_path):
    """As on a GPU, with the two kernels that a CPU has."""
    from ldm.nn import attention_choice, compiling

    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(attention_choice, "DEVICES", ("cpu",))
    monkeypatch.setattr(
        attention_choice, "seconds_of", lambda *a, original=attention_choice.seconds_of: original(*a, "cpu")
    )
    torch._dynamo.reset()
    few = ["trainer.max_steps=2", "callbacks.validation.every=2"]
    assert train.command(recipe(2, "plain", *few)) == 0
    chosen = ["speed.attention=auto", f"speed.compile={compiled}"]
    assert train.command(recipe(2, "chosen", *few, *chosen)) == 0
    assert attention_choice._name == "default", "it is of one run"
    assert losses(tmp_path / "chosen") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    (entries,) = json.loads((tmp_path / "ldm" / "attention.json").read_text()).values()
    assert {entry["chosen"] for entry in entries.values()} <= {"flash", "math"}
    assert {"with gradient" in key for key in entries} == {True, False}, "training and validation"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["speed.attention=fast"], r"speed.attention: fast is none of default, auto, flash, .*math"),
        (
            ["speed.attention=auto", "deterministic=true"],
            r"speed.attention: auto chooses by the clock.*flash",
        ),
    ],
)
def test_attention_that_cannot_be_chosen_so_is_refused(overrides, line, recipe, refused):
    assert re.search(line, refused(recipe(1, "run", *overrides)))
