"""Optimizer state by name: training goes on bit by bit, and another model's state is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from ldm.checkpoints.native import load_document, load_tensors, save
from ldm.checkpoints.optimizer import flatten_optimizer, restore_optimizer
from ldm.errors import InputError


def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    return net.to(memory_format=torch.channels_last)


def names_of(net):
    return {parameter: name for name, parameter in net.named_parameters()}


def step(net, optimizer, seed):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()


def grouped(net):
    return [{"params": list(net[0].parameters()), "lr": 0.01}, {"params": list(net[1:].parameters())}]


OPTIMIZERS = {
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.8, 0.95)),
    "adamw-fused": lambda net: torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True),
    "adamw-foreach": lambda net: torch.optim.AdamW(grouped(net), lr=1e-3, foreach=True, amsgrad=True),
    "adamw-tensor-lr": lambda net: torch.optim.AdamW(net.parameters(), lr=torch.tensor(1e-2), foreach=False),
    "sgd-momentum": lambda net: torch.optim.SGD(grouped(net), lr=0.1, momentum=0.9, nesterov=True),
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_goes_on_bit_by_bit(tmp_path, make):
    net = model()
    optimizer = make(net)
    for seed in range(3):
        step(net, optimizer, seed)
    optimizer.param_groups[0]["lr"] *= (
        0.5  # as a schedule does: what counts is the group, not the constructor
    )
    tensors, document = flatten_optimizer(optimizer, names_of(net))
    path = save(tmp_path, 3, {"model": net.state_dict(), "optimizer": tensors}, {"optimizer.json": document})
    for seed in range(3, 6):
        step(net, optimizer, seed)

    other = model()
    other.load_state_dict(load_tensors(path, "model"))
    resumed = make(other)
    step(other, resumed, 99)  # state and weights that must not survive
    other.load_state_dict(load_tensors(path, "model"))
    stored = load_tensors(path, "optimizer")
    restore_optimizer(resumed, names_of(other), stored, load_document(path, "optimizer.json"))
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state.get(mine, {}).items():
            again = resumed.state[theirs][key]
            assert (again is None and value is None) or again.stride() == value.stride()
    for seed in range(3, 6):
        step(other, resumed, seed)
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    again, _ = flatten_optimizer(resumed, names_of(other))
    final, _ = flatten_optimizer(optimizer, names_of(net))
    assert again.keys() == final.keys()
    assert all(torch.equal(again[name], final[name]) for name in final)


def test_names_and_plain_json():
    net = model()
    optimizer = OPTIMIZERS["adamw"](net)
    step(net, optimizer, 0)
    tensors, document = flatten_optimizer(optimizer, names_of(net))
    assert {"0.weight.exp_avg", "0.weight.exp_avg_sq", "3.bias.step"} <= tensors.keys()
    group = json.loads(json.dumps(document))["groups"][0]
    assert group["betas"] == [0.8, 0.95]
    assert group["params"][:2] == ["0.weight", "0.bias"]
    assert not {"fused", "foreach", "capturable"} & group.keys()


def test_how_it_is_computed_is_not_restored():
    net = model()
    fused = OPTIMIZERS["adamw-fused"](net)
    step(net, fused, 0)
    state = flatten_optimizer(fused, names_of(net))
    plain = OPTIMIZERS["adamw"](net)
    restore_optimizer(plain, names_of(net), *state)
    assert not plain.param_groups[0]["fused"]
    assert plain.param_groups[0]["betas"] == (0.9, 0.999)
    step(net, plain, 1)


def test_a_parameter_without_state_stays_without():
    net = model()
    optimizer = OPTIMIZERS["adamw"](net)
    net[3].requires_grad_(False)
    step(net, optimizer, 0)
    tensors, document = flatten_optimizer(optimizer, names_of(net))
    assert not any(name.startswith("3.") for name in tensors)
    resumed = OPTIMIZERS["adamw"](net)
    restore_optimizer(resumed, names_of(net), tensors, document)
    assert net[3].weight not in resumed.state
    assert net[0].weight in resumed.state


def test_restored_state_shares_nothing_with_the_tensors_given():
    net = model()
    optimizer = OPTIMIZERS["adamw"](net)
    step(net, optimizer, 0)
    tensors, document = flatten_optimizer(optimizer, names_of(net))
    before = {name: value.clone() for name, value in tensors.items()}
    restore_optimizer(optimizer, names_of(net), tensors, document)
    step(net, optimizer, 1)
    assert all(torch.equal(before[name], tensors[name]) for name in before)


def test_another_models_state_is_refused():
    net = model()
    names = names_of(net)
    optimizer = OPTIMIZERS["adamw"](net)
    tensors, document = flatten_optimizer(optimizer, names)

    def line(optimizer=optimizer, names=names):
        with pytest.raises(InputError) as caught:
            restore_optimizer(optimizer, names, tensors, document)
        return str(caught.value)

    renamed = {parameter: name.replace("3.", "head.") for parameter, name in names.items()}
    assert line(names=renamed) == (
        "optimizer: the checkpoint lacks 2: head.bias, head.weight and has unknown 2: 3.bias, 3.weight; "
        "use the config it was made with"
    )
    kind = "optimizer: is SGD, the checkpoint has AdamW; use the same optimizer"
    assert line(OPTIMIZERS["sgd"](net)) == kind
    other = "the checkpoint deals the same parameters into other groups"
    assert other in line(torch.optim.AdamW(grouped(net), lr=1.0))
    fewer = torch.optim.AdamW(net[:2].parameters())
    assert "has unknown 2: 3.bias, 3.weight" in line(fewer)
    with pytest.raises(ValueError, match="6 parameters of the optimizer have no name"):
        flatten_optimizer(optimizer, {})
