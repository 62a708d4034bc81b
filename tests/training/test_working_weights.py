"""speed.bf16_weights: layers read bf16 copies; what is trained, averaged and saved are the fp32 weights."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import train
from ldm.checkpoints import native
from ldm.training.working_weights import WorkingWeights
from tests.training.test_graphed import GAN

ON, BF16 = "speed.bf16_weights=true", "trainer.precision=bf16-mixed"
LONGER = ("trainer.max_steps=7", "callbacks.metrics.every=3", "trainer.gradient_clip_val=0.5", BF16)
RUNS = {
    "autoencoder": (1, []),
    "latent diffusion": (2, []),
    "with recomputed activations": (2, ["++backbone.gradient_checkpointing=true"]),
    "with one product for q, k and v": (2, ["speed.fused_qkv=true"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_them_is_the_run_without(name, recipe, assert_same_run, tmp_path):
    stage, overrides = RUNS[name]
    assert train.command(recipe(stage, "plain", *LONGER, *overrides)) == 0
    assert train.command(recipe(stage, "working", *LONGER, *overrides, ON)) == 0
    assert_same_run(tmp_path / "working", tmp_path / "plain")
    saved = native.load_tensors(native.newest(tmp_path / "working" / "checkpoints"), "model")
    assert {t.dtype for name, t in saved.items() if name.endswith("weight")} == {torch.float32}


def test_it_is_interrupted_and_resumed_with_them_or_without(recipe, assert_same_run, tmp_path):
    assert train.command(recipe(2, "plain", *LONGER)) == 0
    assert train.command(recipe(2, "working", *LONGER, "trainer.max_steps=3", ON)) == 0
    assert train.command(recipe(2, "working", *LONGER, "trainer.max_steps=5")) == 0
    assert train.command(recipe(2, "working", *LONGER, ON)) == 0
    assert_same_run(tmp_path / "working", tmp_path / "plain")


def test_two_ranks_average_the_gradients_of_working_weights(recipe, process, assert_same_run, tmp_path):
    two = [*LONGER, "data.global_batch_size=8", "trainer.devices=2", "trainer.strategy=ddp"]
    for name, more in (("plain", []), ("working", [ON])):
        pair = process(recipe(2, name, *two, *more))
        output, _ = pair.communicate(timeout=300)
        assert pair.returncode == 0, output
    assert_same_run(tmp_path / "working", tmp_path / "plain")


class Casts(TorchDispatchMode):
    """Counts casts of tensors of these shapes."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.found = shapes, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._to_copy.default and args[0].shape in self.shapes:
            self.found += 1
        return operation(*args, **(kwargs or {}))


def network():
    torch.manual_seed(0)
    twice = nn.Linear(5, 5)
    layers = (
        nn.Conv2d(3, 5, 3, padding=1),
        nn.Flatten(2),
        nn.LayerNorm(49),
        nn.Linear(49, 5),
        twice,
        nn.SiLU(),
    )
    return nn.Sequential(*layers, twice, nn.Linear(5, 7))


def gradients(working, steps):
    """Of micro-batches, added up; and how many weights were cast on the way."""
    net = network()
    weights = WorkingWeights(net) if working else None
    with Casts({p.shape for p in net.parameters() if p.ndim > 1}) as casts:
        for step in range(steps):
            x = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(step))
            with weights.used(step == 0) if weights else torch.enable_grad():
                with torch.autocast("cpu", torch.bfloat16):
                    loss = net(x).float().square().mean()
                loss.backward()
    return [p.grad for p in net.parameters()], casts.found


@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_are_those_of_autocast_without_its_casts(steps):
    (expected, before), (found, after) = gradients(False, steps), gradients(True, steps)
    assert all(g.dtype == torch.float32 for g in found)
    assert all(map(torch.equal, found, expected)), "also of micro-batches, added up in fp32"
    assert before >= 8 * steps, "each weight to bf16, each gradient to fp32"
    assert after <= 4, "the first use makes the copies"


def test_outside_of_a_batch_layers_have_their_own_weights():
    net = network()
    own, weights = dict(net.named_parameters()), WorkingWeights(net)
    with weights.used(True):
        assert net[0].weight.dtype == net[-1].bias.dtype == torch.bfloat16
        assert net[2].weight.dtype == torch.float32, "a norm is computed in fp32"
        assert net[4].weight is net[6].weight
        with torch.no_grad():
            own["0.weight"] += 1
    assert all(p is own[name] for name, p in net.named_parameters())
    with weights.used(True):
        assert torch.equal(net[0].weight, own["0.weight"].bfloat16()), "copied at the start of each step"
    with pytest.raises(KeyError), weights.used(True):
        raise KeyError
    assert all(p is own[name] for name, p in net.named_parameters())
    with weights.used(True):
        net[0](torch.ones(1, 3, 4, 4, dtype=torch.bfloat16)).sum().backward()
    assert net[-1].weight.grad is None, "nothing used it"


REFUSED = {
    "fp32": (2, ["trainer.precision=32-true"], "is for bf16; add trainer.precision=bf16-mixed"),
    "adversarial": (1, [BF16, *GAN], "is not for a discriminator"),
    "a graph": (2, [BF16, "speed.cuda_graph=true"], "a graph casts once a step anyway"),
    "a profiler": (2, [BF16, "debug=profile"], "is not for a run that is profiled"),
    "fsdp": (2, [BF16, "trainer.devices=2", "trainer.strategy=fsdp"], "is of one device or ddp"),
    "ranks that accumulate": (
        2,
        [BF16, "trainer.devices=2", "trainer.accumulate_grad_batches=2"],
        "would add up a rank's micro-batches in bf16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_they_are_not_for_is_refused(name, recipe, refused):
    stage, overrides, words = REFUSED[name]
    assert f"speed.bf16_weights: {words}" in refused(recipe(stage, "run", *overrides, ON))
