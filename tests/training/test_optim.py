"""Schedules at the points that name them; which parameters decay, go slower, or stay as they are."""

import pytest
from torch import nn

import train
from ldm.checkpoints import native
from ldm.config import compose
from ldm.errors import InputError
from ldm.training.assembly import build_module
from ldm.training.optim import (
    Constant,
    Cosine,
    InverseSquareRoot,
    Linear,
    freeze,
    parameter_groups,
    parameter_rules,
)


def test_constant_warms_up_to_one():
    schedule = Constant(warmup=4)
    assert [schedule(s) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert Constant()(0) == 1


@pytest.mark.parametrize(("kind", "middle"), [(Cosine, 0.55), (Linear, 0.55)])
def test_decays_from_the_end_of_the_warm_up(kind, middle):
    schedule = kind(total=110, warmup=10, final=0.1)
    assert schedule(0) == pytest.approx(0.1)
    assert schedule(9) == 1
    assert schedule(10) == 1, "no jump where the decay begins"
    assert schedule(60) == pytest.approx(middle)
    assert schedule(110) == pytest.approx(0.1)
    assert schedule(10_000) == pytest.approx(0.1)
    values = [schedule(s) for s in range(10, 111)]
    assert values == sorted(values, reverse=True)


def test_cosine_at_a_quarter():
    assert Cosine(total=100)(25) == pytest.approx(0.5 * (1 + 2**-0.5))


@pytest.mark.parametrize("kind", [Cosine, Linear])
def test_a_warm_up_longer_than_the_run_is_refused(kind):
    with pytest.raises(ValueError, match=r"warmup=10 must be below total=10"):
        kind(total=10, warmup=10)


def test_inverse_square_root():
    """EDM2's rule, with its warm-up as a factor: reference 4, the sixteenth step has half the rate."""
    schedule = InverseSquareRoot(reference=4, warmup=8)
    plain = InverseSquareRoot(reference=4)
    assert [plain(step) for step in (0, 4, 16, 64)] == [1, 1, 0.5, 0.25]
    assert [schedule(step) for step in (0, 3, 16)] == [1 / 8, 4 / 8, 0.5]
    assert schedule(5) == pytest.approx(6 / 8 / 1.25**0.5)
    with pytest.raises(ValueError, match="reference=0"):
        InverseSquareRoot(reference=0)


def test_only_matrices_decay():
    module = nn.ModuleDict(
        {"conv": nn.Conv2d(2, 2, 1), "norm": nn.GroupNorm(1, 2), "embedding": nn.Embedding(3, 2)}
    )
    module["frozen"] = nn.Linear(2, 2).requires_grad_(False)
    decayed, spared = parameter_groups(module, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert [p is module["conv"].weight for p in decayed["params"]] == [True]
    assert spared["weight_decay"] == 0
    assert len(spared["params"]) == 4


@pytest.fixture
def net():
    parts = {
        "attn1": nn.Linear(4, 4),
        "attn2": nn.Linear(4, 4),
        "norm": nn.LayerNorm(4),
        "out": nn.Linear(4, 1),
    }
    return nn.ModuleDict(parts)


def test_the_first_rule_that_matches_wins(net):
    rules = parameter_rules(
        [{"match": "attn2.*bias", "lr": 0.5}, {"match": "attn", "lr": 0.1, "weight_decay": 0.3}]
    )
    found = {
        name: (group["lr"], group["weight_decay"], group["matrices"])
        for group in parameter_groups(net, 0.2, rules, lr=1.0)
        for name, p in net.named_parameters()
        if any(p is q for q in group["params"])
    }
    assert found == {
        "attn1.weight": (0.1, 0.3, True),
        "attn1.bias": (0.1, 0.3, False),
        "attn2.weight": (0.1, 0.3, True),
        "attn2.bias": (0.5, 0.0, False),
        "norm.weight": (1.0, 0.0, False),
        "norm.bias": (1.0, 0.0, False),
        "out.weight": (1.0, 0.2, True),
        "out.bias": (1.0, 0.0, False),
    }


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ([{"match": "atn2"}], "parameter_groups[0].match='atn2': matches no parameter; names near it: attn2"),
        (
            [{"match": "attn"}, {"match": "attn2"}],
            "parameter_groups[1].match='attn2': is left nothing by 'attn'; the first match wins",
        ),
        ([{"match": "("}], "parameter_groups[0].match='(': not a regular expression"),
        ([{"match": "out", "rate": 1}], "parameter_groups[0]: unknown key rate; it takes: match, lr,"),
        ([{"lr": 1.0}], "parameter_groups[0]: has no match"),
        ([{"match": "out", "lr": 0}], "parameter_groups[0].lr=0: a factor must be above 0"),
        ([{"match": "", "train": False}], "parameter_groups: nothing is left to train"),
    ],
)
def test_wrong_rules_are_one_line(section, line, net):
    with pytest.raises(InputError) as caught:
        freeze(net, parameter_rules(section))
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


RULES = "parameter_groups=[{match: '^conditioner', train: false}, {match: attn2, lr: 0.1, weight_decay: 0.0}]"


def test_a_run_with_rules(recipe, tmp_path):
    """Frozen parameters stay as they were and are in the weights alone; a run resumed is the run whole."""
    argv = recipe(2, "whole", RULES, "trainer.max_steps=4", "callbacks.checkpoint.every=2")
    assert train.command(argv) == 0
    whole, half = (tmp_path / f"whole/checkpoints/step-{step:09d}" for step in (4, 2))
    assert train.command([*argv, "run_name=parts", f"resume={half}"]) == 0
    for kind in ("model", "ema", "optimizer"):
        again = tmp_path / f"parts/checkpoints/{whole.name}/{kind}.safetensors"
        assert again.read_bytes() == (whole / again.name).read_bytes(), kind
    first, last = build_module(compose("train", argv)).state_dict(), native.load_tensors(whole, "model")
    moved = {name for name, value in last.items() if not value.equal(first[name])}
    frozen = {name for name in last if name.startswith("conditioner.")}
    assert first.keys() == last.keys()
    assert frozen
    assert moved
    assert not moved & frozen
    assert not frozen & native.load_tensors(whole, "ema").keys()
    groups = native.load_document(whole, "state.json")["optimizer"]["groups"]
    assert [(group["base_lr"], group["weight_decay"]) for group in groups] == [
        *((0.001, decay) for decay in (0.01, 0.0)),
        *((pytest.approx(0.0001), 0.0) for _ in range(2)),
    ]
    assert all("attn2" in name for group in groups[2:] for name in group["params"])
    assert not any(name.startswith("conditioner.") for group in groups for name in group["params"])


def test_an_idle_rule_ends_the_command(recipe, refused, tmp_path):
    line = refused(recipe(2, "x", "parameter_groups=[{match: atn2, lr: 0.1}]"))
    assert line.startswith("parameter_groups[0].match='atn2': matches no parameter; names near it: attn2")
    assert not (tmp_path / "x").exists()
