"""`ldm plan` as it is typed: its lines, numbers, options and errors."""

import json
import math
from dataclasses import replace

import pytest
import torch

from ldm import cli
from ldm.cluster import allocator, planning
from ldm.cluster.forecast import Work, images_per_second, step
from ldm.cluster.hardware import GPUS, Cluster
from ldm.cluster.plan_command import fitted
from ldm.cluster.planning import Options, Stage, forecast, rate_of, software_of
from ldm.cluster.workload import Workload, workload
from ldm.config import CONFIG_DIR
from ldm.errors import InputError

SMALL = "experiment=quickstart_autoencoder"
P = 859_520_964
STATIC = {"weights": 4 * P, "gradients": 4 * P, "average": 4 * P, "optimizer": 8 * P, "frozen": 827_000_000}


@pytest.fixture
def stage(composed):
    """Stable Diffusion 1 at 512 px, with its counted work."""
    work = Work(3.54e12, 632, P, 950)
    load = Workload(work, {"backbone": 2.41, "autoencoder": 1.12}, STATIC, 16 * P, 1.68e9, 1.2e9, 0.0, 50e3)
    return Stage("sd1_512", composed("sd1_512"), load)


def planned(stage, options, gpus, **more):
    return forecast(stage, options, gpus, rate_of(stage, options)[0], **more)


def test_a_plan_by_hand(stage):
    """Hours are pictures / speed / goodput, dollars GPU-hours at a price, saves the file at its rate."""
    options = Options(4, 8, dollars=3.0, write=2e9)
    found = planned(stage, options, 32)
    cluster = Cluster(GPUS["h100"], 32)
    seconds = step(stage.load.work, software_of(stage), cluster, found.batch, found.rate)
    assert found.images_per_second == images_per_second(seconds, cluster, found.batch)
    assert found.batch.pictures * found.batch.accumulate * 32 == 2048
    assert found.hours == pytest.approx(194_000 * 2048 / found.images_per_second / found.goodput / 3600)
    assert found.dollars == pytest.approx(3 * 32 * found.hours)
    assert found.reliability.save == pytest.approx(16 * P / 2e9)
    assert found.reliability.between == pytest.approx(29_500 / 32 * 3600)
    assert found.every * seconds.seconds == pytest.approx(found.reliability.interval(), rel=0.01)
    assert found.failures == pytest.approx(found.hours * 3600 / found.reliability.between)


def test_optimizer_traffic_is_counted(stage):
    """AdamW with clipping and an average: 28 + 12 + 12 bytes a parameter."""
    assert software_of(stage).optimizer_bytes == pytest.approx(52)
    assert software_of(stage).gradient_bytes == 4
    assert software_of(stage, graph=True).graph


def test_the_batch_is_the_largest_that_fits(stage):
    found = planned(stage, Options(1, 8), 8).batch
    most = stage.load.fits(GPUS["h100"].memory, 8)
    assert found.pictures <= most < 2 * found.pictures, "shares are powers of two"
    assert planned(stage, Options(1, 8, gpu="h200"), 8).batch.pictures > found.pictures
    cfg = {**stage.cfg, "data": {**stage.cfg["data"], "batch_size": 4}}
    chosen = planned(Stage("x", cfg, stage.load), Options(1, 8), 8).batch
    assert (chosen.pictures, chosen.accumulate) == (4, 64)


def test_nodes_of_few_gpus_meet_on_the_network(stage):
    whole, halves, single = (planned(stage, Options(8 // each, each), 8).step for each in (8, 4, 1))
    assert whole.gradients < halves.gradients <= single.gradients
    slow = planned(stage, Options(2, 4, network=1e9), 8).step
    assert slow.gradients > 5 * halves.gradients
    assert planned(stage, Options(2, 4, "gb200"), 8).step == planned(stage, Options(1, 8, "gb200"), 8).step


def test_fsdp_keeps_rows_and_gathers_weights(stage):
    """By hand: a 64th of weights, gradients, average and moments, weights in bf16, activations as ever."""
    load = replace(stage.load, gathered=2 * P)
    assert load.memory(16, 64) == pytest.approx(
        1.05 * (20 * P / 64 + STATIC["frozen"] + 2 * P + 16 * 1.2e9) + 1.5e9
    )
    assert load.memory(16, 64) < stage.load.memory(16, 64) - 20e9
    rows, whole = (planned(Stage("x", stage.cfg, one), Options(8, 8), 64).step for one in (load, stage.load))
    assert rows.optimizer == pytest.approx(whole.optimizer / 64)
    software = software_of(Stage("x", stage.cfg, load))
    assert (software.shards, software.gather_bytes, software.gradient_bytes) == ("world", 2.0, 4.0)


def test_what_fsdp_gathers():
    """bf16 in stage 2; float32, and what autocast makes of it, in stage 1."""
    recipe = "experiment=quickstart_{}".format
    (second,) = planning.configs([recipe("diffusion"), "trainer=fsdp"])
    (first,) = planning.configs([recipe("autoencoder"), "trainer.strategy=fsdp"])
    (alone,) = planning.configs([recipe("diffusion")])
    load = workload(second)
    assert load.gathered == 2 * load.work.parameters
    load = workload(first)
    assert load.gathered is not None
    assert load.gathered >= load.static["weights"]
    assert workload(alone).gathered is None


def test_more_gpus_than_pictures_raise_the_batch(stage):
    with pytest.raises(InputError, match=r"data.global_batch_size=2048: not divisible by the 4096 GPUs"):
        planned(stage, Options(512, 8), 4096)
    found = planned(stage, Options(512, 8), 4096, grown=True)
    assert (found.global_batch_size, found.batch.pictures) == (4096, 1)
    before = planned(stage, Options(1, 8), 8)
    assert found.goodput < before.goodput < 1


def test_what_does_not_fit_is_said(stage):
    huge = Workload(stage.load.work, {}, STATIC, 1, 0.0, 90e9, 0.0, 1.0)
    with pytest.raises(InputError, match="memory: one picture takes .* of the 84.9 of a H100; set backbone"):
        planned(Stage("x", stage.cfg, huge), Options(), 8)


def test_options_move_what_they_should(stage):
    base = planned(stage, Options(), 64)
    graph = planned(stage, Options(graph=True), 2048)
    assert graph.images_per_second > 1.5 * planned(stage, Options(), 2048).images_per_second
    slow = planned(stage, Options(network=1e8, graph=True), 2048)
    assert slow.step.gradients > 2 * graph.step.gradients
    assert planned(stage, Options(network=1e8), 8).step == planned(stage, Options(), 8).step
    starved = planned(stage, Options(loader=100.0), 64)
    assert starved.images_per_second == pytest.approx(800)
    assert planned(stage, Options(storage=50e3 * 700), 64).images_per_second == pytest.approx(700)
    fragile = planned(stage, Options(gpu_hours=5_000), 64)
    assert fragile.every < base.every
    assert fragile.goodput < base.goodput
    late = planned(stage, Options(requeue=3600), 64)
    assert late.reliability.restart - base.reliability.restart == pytest.approx(3600 - 180)


@pytest.mark.parametrize("gpu", list(GPUS))
def test_every_gpu_has_a_rate(stage, gpu):
    rate, source = rate_of(stage, Options(gpu=gpu))
    assert 0.2 < rate / GPUS[gpu].flops < 0.45
    assert "its row of" in source


def test_rates_of_other_kinds(stage, composed):
    rate, _ = rate_of(stage, Options())
    first = Stage("x", composed("autoencoder_kl_f8"), stage.load)
    assert rate_of(first, Options())[0] == pytest.approx(rate * 200 / 330)
    exact = {**stage.cfg, "trainer": {**stage.cfg["trainer"], "precision": "32-true"}}
    assert rate_of(Stage("x", exact, stage.load), Options())[0] == pytest.approx(rate / 2)


def test_a_measured_run_calibrates(stage):
    """A forecast of the measured size gives what was measured."""
    options = Options(measured=(8, 700.0))
    assert planned(stage, options, 8).images_per_second == pytest.approx(700)
    assert planned(stage, options, 64).images_per_second < 5600
    with pytest.raises(InputError, match="need more than the peak of 8 H100"):
        rate_of(stage, Options(measured=(8, 1e6)))


def test_fit_by_forecast(stage):
    lines = list(fitted(stage, Options(1, 8)))
    most = stage.load.fits(GPUS["h100"].memory, 8)
    if torch.cuda.is_available():
        assert lines[-1].startswith("tried: ")
    else:
        assert lines[0].startswith(f"sd1_512: {most} pictures fit in H100 by forecast")
        assert lines[1:] == ["not tried: there is no GPU here"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.slow)])
def test_the_steps_that_are_tried_run(composed, device):
    """Two whole steps; on a GPU they take about what is forecast."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    pictures, taken = allocator.largest(composed("quickstart_diffusion"), 4, device)
    assert pictures == 4
    assert (taken > 0) == (device == "cuda")


def test_what_does_not_fit_is_tried_smaller(monkeypatch):
    """By tenths until the allocator agrees; it raises torch's own error."""
    tried = []

    def steps(cfg, pictures, device):
        tried.append(pictures)
        if pictures > 30:
            raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(allocator, "_steps", steps)
    assert allocator.largest({}, 40, "cpu") == (30, 0)
    assert tried == [40, 36, 33, 30]
    monkeypatch.setattr(allocator, "_steps", lambda cfg, pictures, device: steps(cfg, 99, device))
    assert allocator.largest({}, 3, "cpu") == (0, 0)


def test_recipes_of_stages_are_planned_stage_by_stage():
    names = [cfg["stage"] for cfg in planning.configs(["experiment=quickstart"])]
    assert names == ["autoencoder", "diffusion"]


# ---- the command ----------------------------------------------------------------------------------------


def test_the_command(capsys, tmp_path):
    """One small recipe: every line, the table, the published errors, and the same numbers as JSON."""
    out = tmp_path / "plan.json"
    words = ["plan", "experiment=quickstart_autoencoder", "--gpus-per-node", "4", "--json", str(out)]
    assert cli.main([*words, "trainer.max_steps=2000", "--dollars-per-gpu-hour", "4"]) == 0
    text = capsys.readouterr().out
    for word in ("work", "rate", "step", "speed", "memory", "data", "checkpoint", "failures", "cost"):
        assert f"\n{word.ljust(12)}" in text
    assert "16,000 pictures, 2,000 steps of 8, on 4 H100" in text
    assert "at $4\n" in text
    assert "16 of 17 held-out rows within 15 %" in text
    told = json.loads(out.read_text())
    (only,) = told["stages"]
    assert [one["gpus"] for one in only["forecasts"]] == [4, *planning.SCALES]
    assert only["options"]["dollars"] == 4
    assert only["forecasts"][0]["hours"] * 16 == pytest.approx(only["forecasts"][0]["dollars"])
    assert math.isclose(sum(only["forecasts"][0]["step"].values()), only["forecasts"][0]["step_seconds"])
    assert len(told["published"]) == 22
    assert {"source", "error", "held_out"} <= told["published"][0].keys()


def test_units_of_the_options(tmp_path):
    out = tmp_path / "plan.json"
    words = ["--gpu", "a100", "--network", "200", "--write", "2", "--storage", "3", "--loader", "500"]
    words += ["--requeue", "60", "--gpu-hours-per-failure", "9000", "--measured", "8=10", "--cuda-graph"]
    assert cli.main(["plan", SMALL, "--gpus-per-node", "8", *words, "--json", str(out)]) == 0
    told = json.loads(out.read_text())["stages"][0]["options"]
    expected = {"gpu": "a100", "network": 25e9, "write": 2e9, "storage": 3e9, "loader": 500.0, "graph": True}
    expected |= {"requeue": 60.0, "gpu_hours": 9000.0, "measured": [8, 10.0]}
    assert {name: told[name] for name in expected} == expected


def test_the_published_rows_alone(capsys, tmp_path):
    assert cli.main(["plan", "--check", "--json", str(tmp_path / "x.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["table", "GPUs", "a", "GPU", "published", "predicted", "error"]
    assert len(json.loads((tmp_path / "x.json").read_text())["published"]) == 22


def test_a_simulated_start(capsys):
    assert cli.main(["plan", "--simulate", "--nodes", "16", "experiment=quickstart_autoencoder",
                     "data.global_batch_size=256"]) == 0  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4 steps of 128 ranks on 16 nodes: 1,024 samples, each played by exactly one")
    assert lines[2].startswith("start with a checkpoint of 0.0 GB: launched ")
    assert lines[-1].startswith("simulated in ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "experiment: none given; ldm plan experiment=NAME --nodes N"),
        (["experiment=sd3"], "experiment=sd3: no such option; (have: "),
        ([SMALL, "trainer.max_step=3"], "trainer.max_step: unknown key; did you mean trainer.max_steps?"),
        ([SMALL, "--nodes", "0"], "--nodes: expected above 0, got 0"),
        ([SMALL, "--nodes", "x"], "ldm plan: argument --nodes: invalid int value: 'x'"),
        ([SMALL, "--gpus-per-node", "-8"], "--gpus-per-node: expected above 0, got -8"),
        ([SMALL, "--gpu", "h1000"], "--gpu h1000: not known; did you mean h100?"),
        ([SMALL, "--write", "0"], "--write: expected above 0, got 0"),
        ([SMALL, "--storage", "nan"], "--storage: expected above 0, got nan"),
        ([SMALL, "--requeue", "-1"], "--requeue: expected at least 0, got -1"),
        ([SMALL, "--measured", "1084"], "--measured: cannot read '1084'; write GPUS=PICTURES/S, as 8=1084"),
        ([SMALL, "--measured", "8=-3"], "--measured: cannot read '8=-3'"),
        (
            [SMALL, "--simulate", "--nodes", "3"],
            "data.global_batch_size=8: not divisible by ranks*accumulate",
        ),
        ([SMALL, "--simulate", "--json", "x"], "--json: holds forecasts, and this makes none; leave out --s"),
        ([SMALL, "--fit", "--json", "x"], "--json: holds forecasts, and this makes none; leave out --s"),
        (
            [SMALL, "--simulate", "trainer.accumulate_grad_batches=3"],
            "data.global_batch_size=8: not divisible",
        ),
        (["--check", "--json", "/nowhere/x.json"], "--json: cannot write /nowhere/x.json"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", *words])
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ldm: error: {message}")


RECIPES = [  # some in the gate; all of them build networks of full size, though without memory, several times
    pytest.param(
        path.stem, marks=pytest.mark.slow if path.stem in ("quickstart", "sd1_256") else pytest.mark.soak
    )
    for path in sorted((CONFIG_DIR / "experiment").glob("*.yaml"))
]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_plan(name, capsys):
    """On eight H100, whatever the recipe leaves to the user."""
    assert cli.main(["plan", f"experiment={name}"]) == 0
    text = capsys.readouterr().out
    assert text.count("\ncost ") == len(planning.configs([f"experiment={name}"]))
