"""AdamW in one pass: torch's AdamW, clip_grad_norm_ and a moving average, step for step."""

import copy
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train
from ldm.checkpoints import native
from ldm.errors import InputError
from ldm.training import one_pass, strategies
from ldm.training.one_pass import OnePassAdamW
from tests.training.test_speed import losses

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1,), (), (7,), (33, 65), (5, 3, 3, 3), (129, 130)]  # the last has more than one chunk
LIMIT = 0.5


@pytest.fixture(params=["one pass", "passes"])
def way(request, monkeypatch):
    """With the kernel, and as on a device without one."""
    monkeypatch.setattr(one_pass, "_fits", lambda parameters: request.param == "one pass")
    return request.param


def parameters():
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in SHAPES]
    made[4].data = made[4].data.contiguous(memory_format=torch.channels_last)
    return made


def groups(made):
    return [{"params": made[:3], "lr": 1e-2, "weight_decay": 0.0}, {"params": made[3:], "weight_decay": 0.1}]


def gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in SHAPES]  # channels first


def reference(steps, decay):
    made = parameters()
    optimizer = torch.optim.AdamW(groups(made), lr=1e-3, betas=(0.9, 0.99), fused=True)
    average = [p.detach().clone() for p in made]
    for step in range(steps):
        for p, g in zip(made, gradients(step), strict=True):
            p.grad = torch.empty_like(p).copy_(g)  # torch's kernel wants the parameter's order
        torch.nn.utils.clip_grad_norm_(made, LIMIT)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in made], 1 - decay(step))
    return made, average, optimizer


def stepped(optimizer, made, average, step, decay, scale=1.0):
    for p, g in zip(made, gradients(step), strict=True):
        p.grad = g * scale
    optimizer.clip_to(torch.nn.utils.get_total_norm([p.grad for p in made]), LIMIT)
    optimizer.average_with(dict(zip(made, average, strict=True)), decay(step))
    optimizer.step()


def ours(made, optimizer=None):
    return optimizer or OnePassAdamW(groups(made), lr=1e-3, betas=(0.9, 0.99))


def warm_up(step):
    return min(0.9, (1 + step) / (10 + step))


def assert_alike(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=3e-6, atol=1e-6)


def test_twenty_steps_are_torchs(way):
    made, average, theirs = reference(20, warm_up)
    mine, mean = parameters(), [p.detach().clone() for p in parameters()]
    optimizer = ours(mine)
    for step in range(20):
        stepped(optimizer, mine, mean, step, warm_up)
    assert_alike(mine, made)
    assert_alike(mean, average)
    for p, q in zip(mine, made, strict=True):
        assert optimizer.state[p].keys() == theirs.state[q].keys()
        assert optimizer.state[p]["step"].item() == 20
        for name in ("exp_avg", "exp_avg_sq"):
            assert_alike([optimizer.state[p][name]], [theirs.state[q][name]])


def test_the_state_goes_from_one_to_the_other_and_back(way):
    expected, average, _ = reference(9, warm_up)
    made, mean, theirs = reference(3, warm_up)
    optimizer = ours(made)
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for step in range(3, 6):
        stepped(optimizer, made, mean, step, warm_up)
    again = torch.optim.AdamW(groups(made), lr=1e-3, betas=(0.9, 0.99), fused=True)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(6, 9):
        for p, g in zip(made, gradients(step), strict=True):
            p.grad = torch.empty_like(p).copy_(g)  # torch's kernel wants the parameter's order
        torch.nn.utils.clip_grad_norm_(made, LIMIT)
        again.step()
        torch._foreach_lerp_(mean, [p.detach() for p in made], 1 - warm_up(step))
    assert_alike(made, expected)
    assert_alike(mean, average)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(bad, monkeypatch):
    monkeypatch.setattr(one_pass, "_fits", lambda parameters: True)
    made, mean = parameters(), [p.detach().clone() for p in parameters()]
    optimizer = ours(made)
    stepped(optimizer, made, mean, 0, warm_up)
    before = [t.detach().clone() for t in (*made, *mean)]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    stepped(optimizer, made, mean, 1, warm_up, scale=bad)
    assert all(map(torch.equal, before, (*made, *mean)))
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(state[k][name], after[k][name]) for k in state for name in state[k])


def test_without_a_limit_or_averages_it_is_plain_adamw(way):
    theirs, mine = parameters(), parameters()
    plain, optimizer = (
        torch.optim.AdamW(groups(theirs), lr=1e-3, fused=True),
        OnePassAdamW(groups(mine), lr=1e-3),
    )
    for step in range(3):
        for made, each in ((theirs, plain), (mine, optimizer)):
            for p, g in zip(made, gradients(step), strict=True):
                p.grad = torch.empty_like(p).copy_(g)
            each.step()
    assert_alike(mine, theirs)


def test_parameters_without_a_gradient_stay(way):
    made = parameters()
    optimizer, before = ours(made), made[0].detach().clone()
    for p in made[1:]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(made[0], before)
    assert not torch.equal(made[1], parameters()[1])


@pytest.mark.parametrize("resumed", [False, True])
def test_parameters_that_come_later_are_corrected_for_their_own_steps(resumed, monkeypatch):
    monkeypatch.setattr(one_pass, "_fits", lambda parameters: True)
    theirs, mine = parameters(), parameters()
    plain = torch.optim.AdamW(groups(theirs), lr=1e-3, betas=(0.9, 0.99), fused=True)
    optimizer = ours(mine)
    for step in range(6):
        for made, each in ((theirs, plain), (mine, optimizer)):
            for p, g in zip(made, gradients(step), strict=True):
                p.grad = torch.empty_like(p).copy_(g)
            if step < 3:
                made[0].grad = made[5].grad = None
            each.step()
        if resumed and step == 3:
            state, optimizer = copy.deepcopy(optimizer.state_dict()), ours(mine)
            optimizer.load_state_dict(state)
    assert_alike(mine, theirs)


def test_the_state_of_an_adamw_that_was_not_fused_is_taken_over(monkeypatch):
    monkeypatch.setattr(one_pass, "_fits", lambda parameters: True)
    theirs = parameters()
    plain = torch.optim.AdamW(groups(theirs), lr=1e-3, betas=(0.9, 0.99), foreach=True)
    for p in theirs:
        p.grad = torch.ones_like(p)
    plain.step()
    mine = [nn.Parameter(p.detach().clone()) for p in theirs]
    optimizer = ours(mine)
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert all(group["fused"] for group in optimizer.param_groups)
    assert all(state["step"].device == p.device for p, state in optimizer.state.items())
    for made in (theirs, mine):
        for p in made:
            p.grad = torch.ones_like(p)
    plain.step()
    optimizer.step()
    assert_alike(mine, theirs)


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_what_one_pass_does_not_do_is_refused(option):
    with pytest.raises(InputError, match=f"^optimizer.{option}: is not part of one pass; use"):
        OnePassAdamW(parameters(), lr=1e-3, **{option: True})


@pytest.mark.parametrize(
    ("made", "clips", "place"),
    [
        (partial(OnePassAdamW, lr=1e-3), False, "optimizer: adamw_one_pass does not"),
        (partial(torch.optim.AdamW, fused=True), True, "optimizer.fused: true cannot"),
        (partial(torch.optim.AdamW, fused=True), False, None),
        (partial(torch.optim.AdamW), True, None),
    ],
)
def test_a_gradient_as_a_scaler_made_it_is_refused(made, clips, place):
    module = SimpleNamespace(make_optimizer=made)
    with nullcontext() if place is None else pytest.raises(InputError, match=f"^{place}"):
        strategies.require_scalable(module, clips)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_trains_as_with_adamw(stage, recipe, tmp_path):
    one = "optimizer=adamw_one_pass"
    assert train.command(recipe(stage, "plain")) == 0
    assert train.command(recipe(stage, "ours", one)) == 0
    assert losses(tmp_path / "ours") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    found = [native.newest(tmp_path / name / "checkpoints") for name in ("plain", "ours")]
    for kind in ("model", "ema", "optimizer"):
        theirs, mine = (native.load_tensors(path, kind) for path in found)
        assert theirs.keys() == mine.keys()


def test_rows_of_sharded_parameters_are_refused(monkeypatch):
    monkeypatch.setattr(one_pass, "DTensor", nn.Parameter)
    with pytest.raises(InputError, match="use optimizer=adamw"):
        ours(parameters())
