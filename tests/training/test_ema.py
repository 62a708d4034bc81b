"""EMA against the formula; swapping; what it covers."""

import pytest
import torch
from torch import nn

import train
from ldm.checkpoints import native
from ldm.training.ema import EMA


def test_average_follows_the_formula_with_warm_up():
    module = nn.Linear(3, 2).double()
    ema = EMA(module, decay=0.5)
    expected = module.weight.detach().clone()
    for k in range(12):
        with torch.no_grad():
            module.weight += 1.0
        ema.update(k)
        decay = min(0.5, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    torch.testing.assert_close(ema.state_dict()["weight"], expected, rtol=1e-12, atol=0)
    assert ema.decay_at(0) == pytest.approx(0.1)
    assert ema.decay_at(100) == 0.5


def test_average_of_a_bf16_parameter_is_fp32_and_moves():
    module = nn.Linear(4, 4).bfloat16()
    ema = EMA(module, decay=0.999)
    start = ema.state_dict()["weight"].clone()
    assert start.dtype == torch.float32
    for k in range(3):
        with torch.no_grad():
            module.weight.add_(0.5)
        ema.update(100_000 + k)
    moved = ema.state_dict()["weight"] - start
    assert 0 < moved.abs().max() < 0.01, "a bf16 average would round steps of a thousandth away"


def test_further_lengths_leave_the_main_average_alone_and_forget_the_start():
    module = nn.Linear(3, 2).double()
    ema, alone = EMA(module, 0.5, [0.05, 0.1]), EMA(module, 0.5)
    for k in range(5):
        with torch.no_grad():
            module.weight += 1.0
        before = module.weight.detach().clone()
        for one in (ema, alone):
            one.update(k)
        assert torch.equal(module.weight, before)
        assert torch.equal(ema.state_dict()["weight"], alone.state_dict()["weight"])
        if k == 0:
            assert torch.equal(ema.state_dict(0.05)["weight"], before)
    short, long = (before - ema.state_dict(length)["weight"] for length in (0.05, 0.1))
    assert (short > 0).all()
    assert (short < long).all()
    other = EMA(module, 0.5, [0.05, 0.1])
    other.load_state_dict({name: value.clone() for name, value in ema.state_dict(0.1).items()}, 0.1)
    assert torch.equal(other.state_dict(0.1)["weight"], ema.state_dict(0.1)["weight"])
    assert torch.equal(other.state_dict(0.05)["weight"], before)
    assert torch.equal(other.state_dict()["weight"], before)


def test_swapped_uses_the_average_and_gives_every_bit_back():
    module = nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4))
    ema = EMA(module, 0.9)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    x = torch.randn(2, 4)
    own = module(x)
    with ema.swapped():
        assert not torch.equal(module(x), own)
        for name, p in module.named_parameters():
            assert torch.equal(p, ema.state_dict()[name])
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    with pytest.raises(RuntimeError, match="inside"), ema.swapped():
        raise RuntimeError("inside")
    assert torch.equal(module(x), own)


def test_frozen_parameters_are_not_averaged_and_names_are_checked():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    ema = EMA(module, 0.9)
    assert ema.names == ["1.weight", "1.bias"]
    with pytest.raises(ValueError, match="missing"):
        ema.load_state_dict({"1.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="decay=1"):
        EMA(module, 1.0)


def test_profiles_move_also_where_the_optimizer_gives_the_average(recipe, tmp_path):
    """After one step a profile is that step's weights: it forgets its start at once."""
    more = ["optimizer=schedule_free", "module.ema_lengths=[0.1]", "trainer.max_steps=1"]
    assert train.command(recipe(2, "run", *more)) == 0
    path = native.resolve(tmp_path / "run")
    weights, profile = native.load_tensors(path, "model"), native.load_tensors(path, "ema-0.1")
    assert profile
    assert all(torch.equal(value, weights[name]) for name, value in profile.items())
