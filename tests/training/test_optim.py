"""Schedules at the points that name them; which parameters decay."""

import pytest
from torch import nn

from ldm.training.optim import Constant, Cosine, Linear, parameter_groups


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
