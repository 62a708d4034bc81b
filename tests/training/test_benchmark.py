"""experiment=bench and debug=bench: what is measured, what is advised, and that nothing is kept."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

import train
from ldm.data import makers
from ldm.training.callbacks import benchmark
from ldm.training.callbacks.benchmark import Benchmark, Facts, advice

SHORT = [f"callbacks.benchmark.{option}" for option in ("seconds=0.01", "every=1", "warm_up=1")]
OPTIONS = dict.fromkeys(("compile", "fused_norm", "gradient_checkpointing", "deterministic", "cached"), False)


def facts(device="NVIDIA H100 80GB HBM3", options=(), **changed):
    """Of a GPU with nothing to advise, and what is `changed` of it."""
    said = {"compile": True, "fused_norm": True, **dict(options)}
    given = {"device": device, "devices": 1, "precision": "bf16-mixed", "batch": 64, "steps": 100}
    given |= {"images_per_s": 500.0, "quartiles": (490.0, 510.0), "data_wait": 0.01, "encoders": None}
    given |= {"flop_per_image": 0.54e12, "peak": 989.5e12, "peak_is": "the maker's figure", "memory": 60e9}
    given |= {"memory_total": 80e9, "host_memory": 9e9, "start": 10.0, "first_step": 60.0, "workers": 12}
    given |= {"cores": 16, "threads": 1, "options": OPTIONS | said}
    return Facts(**(given | changed))


def test_a_run_with_nothing_to_change_is_told_so():
    assert advice(facts()) == []
    assert "nothing to say" in facts().lines()[-1]
    assert "MFU 27.3%" in "\n".join(facts().lines())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data_wait": 0.4, "workers": 2}, "data.num_workers=15 (now 2): 40% of the time"),
        ({"data_wait": 0.4, "workers": 15}, "`ldm data cache`"),
        ({"data_wait": 0.4, "workers": 15, "options": {"cached": True}}, "faster storage"),
        ({"encoders": 0.3}, "encoders that are not trained take 30% of a step"),
        ({"precision": "32-true"}, "trainer.precision=bf16-mixed"),
        ({"options": {"compile": False}}, "speed.compile=true"),
        ({"options": {"fused_norm": False}}, "speed.fused_norm=true"),
        ({"memory": 20e9}, "a larger batch (now 64 a device): 25% of the memory"),
        ({"memory": 20e9, "options": {"gradient_checkpointing": True}}, "gradient_checkpointing=false"),
        ({"options": {"deterministic": True}}, "deterministic=false"),
        ({"device": "cpu", "workers": 1, "cores": 8}, "OMP_NUM_THREADS=7 (now 1)"),
    ],
)
def test_each_cause_is_named_with_the_option_that_helps(changed, words):
    assert words in advice(facts(**changed))[0]


def test_the_most_promising_comes_first():
    said = advice(facts(data_wait=0.05, workers=2, encoders=0.6, precision="32-true", memory=10e9))
    options = ["encoders", "precision", "a larger batch", "num_workers"]
    assert [next(o for o in options if o in text) for text in said] == options


def test_windows_hold_what_the_clock_says(monkeypatch, tmp_path):
    now = [100.0]
    monkeypatch.setattr(benchmark, "settled", lambda device: now[0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    measured = Benchmark(None, tmp_path / "bench.json", {}, seconds=20.0, every=2, warm_up=2)
    trainer = SimpleNamespace(global_step=0, world_size=1, should_stop=False)
    module = SimpleNamespace(device=torch.device("cpu"), batch_ended=100.0)
    measured.on_train_start(trainer, module)
    for step in range(1, 9):
        now[0] += 1.0  # the loop waits for data
        measured.on_train_batch_start(trainer, module, "batch", 0)
        now[0] += 10.0 if step <= 2 else 2.0
        trainer.global_step = step
        assert not trainer.should_stop
        measured.on_train_batch_end(trainer, module, None, "batch", 0)
        module.batch_ended = now[0]
    assert measured._first == 11.0
    assert measured.windows == [(6.0, 2.0)] * 3
    assert trainer.should_stop


@pytest.fixture
def bench(tmp_path):
    """Overrides -> the command line of experiment=bench in tmp_path."""
    size = ["data.num_samples=32", "data.image_size=16", "data.global_batch_size=4", "data.num_workers=0"]
    folders = [f"run_root={tmp_path}/runs", f"data.cache_dir={tmp_path}/data"]
    return lambda *more: ["experiment=bench", *folders, *size, *SHORT, *more]


def read(tmp_path):
    return json.loads((tmp_path / "runs/bench/bench.json").read_text())


def test_the_experiment_measures_again_and_keeps_nothing(bench, tmp_path, capsys):
    assert train.command(bench()) == 0
    first, said = read(tmp_path), capsys.readouterr().out
    assert 0 < first["images_per_s"] < 1e5
    assert first["quartiles"][0] <= first["images_per_s"] <= first["quartiles"][1]
    assert 0 < first["encoders"] <= 1
    assert first["mfu"] == pytest.approx(first["images_per_s"] * first["flop_per_image"] / first["peak"])
    assert f"{first['images_per_s']:,.4g}" in said
    for word in ("images/s", "MFU", "data ", "memory", "first step", "faster"):
        assert word in said
    assert train.command(bench("data.global_batch_size=8", "backbone.block_out_channels=[16,32]")) == 0
    assert read(tmp_path)["batch"] == 8
    assert not list((tmp_path / "runs/bench/checkpoints").glob("*"))


def test_a_slow_loader_is_seen(bench, tmp_path, monkeypatch):
    original = makers.Pictures.prepare
    monkeypatch.setattr(makers.Pictures, "prepare", lambda *a, **k: time.sleep(0.05) or original(*a, **k))
    assert train.command(bench()) == 0
    found = read(tmp_path)
    assert found["data_wait"] > 0.3
    assert "data" in found["advice"][0]


@pytest.mark.parametrize("stage", [1, 2])
def test_any_recipe_can_be_measured_but_not_a_run_with_checkpoints(stage, recipe, tmp_path, capsys):
    given = recipe(stage, "mine", "debug=bench", "run_name=measured", *SHORT)
    given = [text for text in given if not text.startswith("callbacks.checkpoint")]
    assert train.command(given) == 0
    found = json.loads((tmp_path / "measured/bench.json").read_text())
    assert (found["encoders"] is None) == (stage == 1)
    assert train.command(recipe(stage, "mine", "trainer.max_steps=1")) == 0
    capsys.readouterr()
    before = sorted(path for path in (tmp_path / "mine").rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        train.command([text for text in given if not text.startswith("run_name")] + ["run_name=mine"])
    assert "has a checkpoint" in capsys.readouterr().err
    assert sorted(path for path in (tmp_path / "mine").rglob("*")) == before


def test_bad_options_get_one_line(bench, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.command([*bench(), "callbacks.benchmark.seconds=0"])
    assert "seconds=0" in capsys.readouterr().err
