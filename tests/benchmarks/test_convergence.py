"""The race of recipes runs, measures all in one unit, and keeps what it has."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from benchmarks import contestants, convergence
from benchmarks.contestants import RECIPES
from benchmarks.harness import missing


@pytest.fixture(scope="module")
def data():
    return contestants.pictures(objects=8)


def test_a_small_run_and_its_resumption(tmp_path, capsys):
    path, command = tmp_path / "results.json", ["--small", "--jobs", "1", "--sheets", str(tmp_path)]
    assert convergence.main([*command, "--only", "1,2,9,13", "--json", str(path)]) == 0
    file = json.loads(path.read_text())
    names = ["diffusers' script", "EMA", "v, logit-normal", "flow"]
    runs = file["results"][0]["values"]["runs"]
    assert [run["contestant"] for run in runs] == names
    for run in runs:
        assert [mark["images"] for mark in run["marks"]] == [16, 32, 64, 128]
        assert all(len(mark["errors"]) == 6 and mark["cpu_seconds"] > 0 for mark in run["marks"])
        if missing("torchmetrics", "efficientnet_lite_pytorch") is None:
            assert all(math.isfinite(mark["kid"]) for mark in run["marks"][1:])
    assert len({run["marks"][-1]["errors"][0] for run in runs}) == 4, "the average is not the weights"
    assert len(list(tmp_path.glob("*.png"))) == 4
    assert all(f"| {name} |" in path.with_suffix(".md").read_text() for name in names)
    capsys.readouterr()

    assert convergence.main([*command, "--only", "1,9,12", "--json", str(path), "--resume"]) == 0
    again = json.loads(path.read_text())["results"][0]["values"]["runs"]
    assert again[:4] == runs
    assert [run["contestant"] for run in again[4:]] == ["sample, logit-normal"]
    assert again[4]["commit"] == runs[0]["commit"]
    assert "| sample, logit-normal | v, logit-normal |" in capsys.readouterr().out
    file["results"][0]["values"]["settings"]["batch"] = 1
    path.write_text(json.dumps(file))
    with pytest.raises(SystemExit):
        convergence.main([*command, "--json", str(path), "--resume"])
    assert "other settings" in capsys.readouterr().err


def test_assignment_is_the_least():
    rng = np.random.default_rng(0)
    for _ in range(20):
        cost = rng.random((5, 5))
        least = min(itertools.permutations(range(5)), key=lambda p: sum(cost[i, p[i]] for i in range(5)))
        assert tuple(contestants.assignment(cost)) == least


def test_immiscible_noises_are_nearer(data):
    n, latents = torch.arange(16), data.latents[:16]
    plain, dealt, near = (
        noises(0, n, latents)
        for noises in (contestants.independent, contestants.assigned, contestants.nearest)
    )
    assert not dealt.equal(plain)
    assert dealt.flatten(1).sum(1).sort()[0].equal(plain.flatten(1).sum(1).sort()[0]), "dealt anew"
    distances = [(x - latents).square().sum() for x in (plain, dealt, near)]
    assert distances[0] > distances[1] > distances[2] * 0.9
    alone = contestants.nearest(0, n[5:6], latents[5:6])
    assert near[5:6].equal(alone), "whatever the batch"


def test_recipes_change_what_they_say():
    roots = [name for name, recipe in RECIPES.items() if not recipe.against]
    assert roots == [contestants.BASELINE]
    assert {recipe.against for recipe in RECIPES.values()} - {""} <= set(RECIPES)
    for recipe in RECIPES.values():
        if recipe.shares:
            trained = RECIPES[recipe.shares]
            assert (recipe.lr, recipe.warmup, recipe.weighting) == (
                trained.lr,
                trained.warmup,
                trained.weighting,
            )


@pytest.mark.parametrize("name", ["rate and EMA", "v", "sample, logit-normal", "flow"])
def test_the_unit_is_the_same_for_all(name, data):
    """A network that answers 0: the clean estimate follows from the noisy latents alone, in closed form."""
    (mark,) = contestants.train(RECIPES[name], data, 0, 16, [16], (8, 16))
    with torch.no_grad():
        for p in mark.network.parameters():
            p.zero_()
    found = contestants.errors(mark, data)
    x = data.held_out
    noise = contestants.independent(0, torch.arange(len(x)) + contestants.VALIDATION, x)
    for log_snr, error in zip(contestants.LOG_SNRS, found, strict=True):
        ratio = math.exp(-log_snr / 2)  # sigma / alpha
        clean = {
            "rate and EMA": x + ratio * noise,
            "v": (x + ratio * noise) / (1 + ratio**2),
            "sample, logit-normal": torch.zeros_like(x),
            "flow": (x + ratio * noise) / (1 + ratio),
        }[name]
        assert error == pytest.approx(float((clean - x).square().mean()), rel=1e-3)


def test_latents_come_back_as_pictures(data):
    assert data.latents.mean((0, 2, 3)).abs().max() < 1e-5
    assert data.latents.var((0, 2, 3)) == pytest.approx(torch.ones(4), rel=1e-3)
    made = data.bytes_of(data.held_out).float()
    emoji = contestants.EmojiSet(contestants.SIZE, 8, 8)
    true = np.stack([emoji.picture(i, j) for i, j in emoji.held_out]).transpose(0, 3, 1, 2)
    assert (made - torch.from_numpy(true.copy())).abs().mean() < 15, "of 255"


def run(errors, seconds=(1.0, 2.0, 4.0, 8.0), kid=0.1, seed=0):
    marks = [
        {"images": 16 * 2**k, "cpu_seconds": s, "errors": [e] * 6, "kid": kid}
        for k, (e, s) in enumerate(zip(errors, seconds, strict=True))
    ]
    return {"contestant": "x", "seed": seed, "marks": marks}


def test_how_much_sooner():
    runs = [run([0.8, 0.4, 0.2, 0.1])]
    assert convergence.sooner(runs, 0.4 / 2**0.5, "images") == "45.3"  # 32 sqrt(2)
    assert convergence.sooner(runs, 0.9, "images") == "< 16"
    assert convergence.sooner(runs, 0.05, "cpu_seconds") == "> 8"
    assert convergence.at_time(runs, 2.0**1.5) == pytest.approx(0.4 / 2**0.5)
    assert convergence.at_time(runs, 100.0) == pytest.approx(0.1)


def test_what_is_better():
    other = [run([1, 1, 1, 0.2]), run([1, 1, 1, 0.3], seed=1)]
    better = [run([1, 1, 1, 0.1], kid=0.05), run([1, 1, 1, 0.2], kid=0.05, seed=1)]
    assert convergence.against(better, other) == ["0.50, 0.67", "-0.050, -0.050", "better"]
    assert convergence.against(other, better)[2] == "worse"
    assert convergence.against([better[0], run([1, 1, 1, 0.4], kid=0.0, seed=1)], other)[2] == "mixed"


def test_trainings_of_another_commit_are_named():
    of = {name: [{"commit": commit}] for name, commit in (("a", "1"), ("b", "1"), ("c", "2"))}
    assert convergence.commits(of) == ["Trained at commit 1, but c: trained at commit 2."]
    del of["c"]
    assert convergence.commits(of) == []
