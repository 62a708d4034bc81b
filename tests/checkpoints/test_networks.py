"""Frozen networks: stored once, found from a moved run, never taken for another."""

from __future__ import annotations

import shutil

import pytest
import torch

from ldm.checkpoints.native import load_network, network_entry, network_path, store_network
from ldm.errors import InputError

TENSORS = {"conv.weight": torch.arange(6.0).view(2, 3), "conv.bias": torch.ones(2)}
CONFIG = "autoencoder: {_target_: ldm.autoencoder.kl.AutoencoderKL}\n"


@pytest.fixture
def run(tmp_path):
    return tmp_path / "runs" / "quick"


def stored(run):
    return sorted(p.name for p in (run / "networks").iterdir())


def test_content_has_one_name(run):
    first = store_network(run, TENSORS, CONFIG)
    again = store_network(run, {name: TENSORS[name].clone() for name in reversed(TENSORS)}, CONFIG)
    assert first == again
    assert len(first) == 64
    assert stored(run) == [first]
    changed = {**TENSORS, "conv.bias": torch.tensor([1.0, 1.0000001])}
    others = {store_network(run, changed, CONFIG), store_network(run, TENSORS, CONFIG + "#")}
    assert len(others | {first}) == 3
    assert stored(run) == sorted([*others, first])


@pytest.mark.parametrize("stage", ["", "diffusion"])
def test_a_moved_run_still_finds_its_network(run, tmp_path, stage):
    sha256 = store_network(run, TENSORS, CONFIG)
    checkpoint = run / stage / "checkpoints" / "step-000000001"
    checkpoint.mkdir(parents=True)
    entry = network_entry(run, sha256, checkpoint)
    up = "../../.." if stage else "../.."
    assert entry == {"sha256": sha256, "path": f"{up}/networks/{sha256}"}
    moved = tmp_path / "elsewhere"
    shutil.move(run, moved)
    checkpoint = moved / stage / "checkpoints" / "step-000000001"
    tensors, config = load_network(checkpoint, entry)
    assert config == CONFIG
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert network_path(checkpoint, entry) == moved / "networks" / sha256


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml"])
def test_a_damaged_network_is_refused_and_can_be_stored_again(run, name):
    sha256 = store_network(run, TENSORS, CONFIG)
    checkpoint = run / "checkpoints" / "step-000000001"
    entry = network_entry(run, sha256, checkpoint)
    file = run / "networks" / sha256 / name
    good = file.read_bytes()
    for damaged in (good[:-1] + bytes([good[-1] ^ 1]), None):
        file.write_bytes(damaged) if damaged else file.unlink()
        with pytest.raises(InputError, match="the network's sha256 is not the one its checkpoint names"):
            load_network(checkpoint, entry)
        assert store_network(run, TENSORS, CONFIG) == sha256
        load_network(checkpoint, entry)
    assert stored(run) == [sha256]


def test_a_checkpoint_without_its_run_says_what_is_missing(run, tmp_path):
    entry = network_entry(run, store_network(run, TENSORS, CONFIG), run / "checkpoints" / "step-000000001")
    alone = tmp_path / "a" / "b" / "step-000000001"
    alone.mkdir(parents=True)
    with pytest.raises(
        InputError, match="not found, but step-000000001 needs this network; move or copy the whole"
    ):
        load_network(alone, entry)
