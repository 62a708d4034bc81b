"""Rows and whole tensors in one process; what the strategies refuse, and how their options are checked."""

import inspect
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from ldm.autoencoder.discriminator import PatchDiscriminator, hinge_discriminator, hinge_generator
from ldm.autoencoder.kl import AutoencoderKL
from ldm.autoencoder.losses import ReconstructionLoss
from ldm.autoencoder.vq import AutoencoderVQ, EMAVectorQuantizer
from ldm.checkpoints.lazy import LazyTensor
from ldm.checkpoints.optimizer import flatten_optimizer
from ldm.config import CONFIG_DIR, build, compose
from ldm.errors import InputError
from ldm.training import sharding, strategies
from ldm.training.adversarial_module import AdversarialAutoencoderModule
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.ema import EMA
from ldm.training.optim import Constant
from ldm.training.optimizers import AdamW8bit, Muon

GIVEN = ["run_name=x", "data.shards=x.tar", "autoencoder_from=x"]


@pytest.fixture
def group(tmp_path):
    """This process as the only one of its group."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.mid_block = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
        self.register_buffer("offset", torch.tensor([2.0]))

    def forward(self, x):
        return self.mid_block(self.first(x)) + self.offset


def pair(mesh):
    torch.manual_seed(0)
    net, other = Net(), Net()
    other.load_state_dict(net.state_dict())
    sharding.shard(net, mesh, MixedPrecisionPolicy(cast_forward_inputs=False))
    return net, other


@pytest.mark.parametrize(("length", "world"), [(8, 4), (10, 4), (3, 4), (1, 4), (9, 4), (7, 1), (2, 8)])
def test_rows_are_those_of_torch_chunk(length, world):
    whole = torch.arange(2.0 * length).view(length, 2)
    expected = [*whole.chunk(world), *[whole[:0]] * world][:world]
    found = [whole[sharding.rows_of(length, rank, world)] for rank in range(world)]
    assert [piece.tolist() for piece in found] == [piece.tolist() for piece in expected]


def test_a_sharded_network_keeps_names_and_computes_the_same(group):
    net, other = pair(group)
    assert list(net.state_dict()) == list(other.state_dict())
    assert all(isinstance(p, DTensor) for p in net.parameters())
    assert [type(part).__name__ for part in sharding.sharded_parts(net)] == ["FSDPNet", "FSDPSequential"]
    assert sharding.roots(net) == [net]
    x = torch.randn(4, 3)
    outputs = [network(x) for network in (net, other)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()  # after it the rows are the parameters again
    norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
    torch.testing.assert_close(sharding.clip_norm(list(net.parameters()), 0.5), norm)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad)
    assert norm > 0.5


def test_averages_take_the_place_of_the_rows_and_go_again(group):
    net, other = pair(group)
    emas, x = [EMA(network, decay=0.5) for network in (net, other)], torch.randn(4, 3)
    with torch.no_grad():
        net(x)  # gathers the weights, which are then older than the rows
    for network in (net, other):
        for part in sharding.sharded_parts(network):
            part.reshard()
        with torch.no_grad():
            for p in network.parameters():
                sharding.local(p).mul_(3.0)
    for ema in emas:
        ema.update(20)
    assert emas[0].sharded
    assert not emas[1].sharded
    before = {name: value.clone() for name, value in sharding.gathered(net.state_dict()).items()}
    with torch.no_grad():
        own = other(x)
        with emas[0].swapped(), emas[1].swapped():
            torch.testing.assert_close(net(x), other(x))
            assert not torch.allclose(net(x), own)
        torch.testing.assert_close(net(x), own)
    after = sharding.gathered(net.state_dict())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    averages = [sharding.gathered(ema.state_dict()) for ema in emas]
    assert averages[0].keys() == averages[1].keys()
    assert all(torch.equal(value, averages[1][name]) for name, value in averages[0].items())


@pytest.mark.parametrize(
    "make",
    [partial(torch.optim.AdamW, fused=True), torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)],
    ids=["fused", "foreach", "sgd"],
)
def test_state_goes_from_whole_to_rows_and_back_bit_for_bit(group, make):
    net, other = pair(group)
    optimizer, second = make(other.parameters(), lr=0.1), make(net.parameters(), lr=0.1)
    other(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    names = [{p: name for name, p in network.named_parameters()} for network in (other, net)]
    tensors, document = flatten_optimizer(optimizer, names[0])
    lazy = {name: LazyTensor.of(value) for name, value in other.state_dict().items()}
    sharding.load_local(net, lazy)
    sharding.load_local_optimizer(
        second, names[1], {k: LazyTensor.of(v) for k, v in tensors.items()}, document
    )
    again, _ = flatten_optimizer(second, names[1])
    for found, expected in ((net.state_dict(), other.state_dict()), (again, tensors)):
        mine, whole = sharding.local_state(found), sharding.gathered(found)
        assert mine.keys() == whole.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(mine[name], value)
            assert torch.equal(whole[name], value)
    x = torch.randn(4, 3)
    for network, one in ((net, second), (other, optimizer)):
        one.zero_grad()
        network(x).square().sum().backward()
        one.step()
    moved = sharding.gathered(net.state_dict())
    for name, value in other.state_dict().items():
        torch.testing.assert_close(moved[name], value)


# ---- what is refused, and the options ------------------------------------------------------------------


def autoencoder(codebook=False):
    sizes = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_groups": 4, "mid_attention": False}
    if codebook:
        return AutoencoderVQ(quantizer=partial(EMAVectorQuantizer, 4), **sizes)
    return AutoencoderKL(**sizes)


def stage1(network=None, optimizer=torch.optim.AdamW, loss=None):
    network = network or autoencoder()
    return AutoencoderModule(network, loss or ReconstructionLoss(), partial(optimizer, lr=1e-3), Constant())


def adversarial():
    return AdversarialAutoencoderModule(
        autoencoder(),
        ReconstructionLoss(),
        partial(torch.optim.AdamW, lr=1e-3),
        Constant(),
        discriminator=PatchDiscriminator(width=8, layers=1, norm_groups=4),
        discriminator_optimizer=torch.optim.AdamW,
        discriminator_loss=hinge_discriminator,
        generator_loss=hinge_generator,
    )


@pytest.mark.parametrize(
    ("make", "where", "what"),
    [
        (lambda: stage1(optimizer=Muon), "optimizer", "Muon needs whole matrices"),
        (lambda: stage1(optimizer=AdamW8bit), "optimizer", "AdamW8bit needs whole matrices"),
        (adversarial, "trainer.strategy", "discriminator"),
        (lambda: stage1(autoencoder(codebook=True)), "trainer.strategy", "codebook"),
        (lambda: stage1(loss=ReconstructionLoss(learn_log_variance=True)), "trainer.strategy", "one number"),
    ],
    ids=["muon", "8bit", "adversarial", "codebook", "scalar"],
)
def test_fsdp_refuses_in_one_line(make, where, what):
    module = make()
    strategies.require_shardable(stage1(), scaled=False)
    with pytest.raises(InputError) as error:
        strategies.require_shardable(module, scaled=False)
    assert str(error.value).startswith(f"{where}: ")
    assert what in str(error.value)


def test_fsdp_refuses_a_gradient_scaler():
    with pytest.raises(InputError, match="trainer.precision: 16-mixed"):
        strategies.require_shardable(stage1(), scaled=True)


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ({"reduce_dtype": "fp16"}, "trainer.strategy.reduce_dtype=fp16"),
        ({"static_graph": "maybe"}, "trainer.strategy.static_graph=maybe"),
    ],
)
def test_options_are_checked(option, what):
    with pytest.raises(InputError, match=what):
        strategies.ddp(**option)
    if "reduce_dtype" in option:
        with pytest.raises(InputError, match=what):
            strategies.fsdp(**option)


@pytest.mark.parametrize(("name", "kind"), [("ddp", strategies.DDP), ("fsdp", strategies.FSDP)])
def test_the_config_names_every_option_with_its_default(name, kind):
    cfg = compose("train", [*GIVEN, f"trainer={name}"])
    assert type(build(cfg.trainer.strategy)) is kind
    known = inspect.signature(getattr(strategies, name)).parameters
    said = {key: value for key, value in cfg.trainer.strategy.items() if key != "_target_"}
    assert said == {key: parameter.default for key, parameter in known.items()}
    text = Path(CONFIG_DIR / f"trainer/{name}.yaml").read_text()
    assert all("#" in line for line in text.splitlines() if line.strip().split(":")[0] in known)


def test_ddp_is_told_what_the_config_says():
    made = strategies.ddp(bucket_cap_mb=25, find_unused_parameters=True)
    options = made._ddp_kwargs
    assert options["bucket_cap_mb"] == 25
    assert options["find_unused_parameters"] is True
    assert options["gradient_as_bucket_view"] is True
    assert [value for key, value in options.items() if "buffers" in key] == [False]


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ([], "SingleDeviceStrategy"),
        (["trainer.strategy=ddp"], "DDP"),
        (["trainer.strategy=fsdp"], "FSDP"),
        (["trainer.devices=2"], "DDP"),
        (["trainer.num_nodes=2"], "DDP"),
        (["trainer.devices=2", "trainer.strategy=fsdp"], "FSDP"),
        (["trainer.devices=2", "trainer.strategy=ddp_find_unused_parameters_true"], "DDPStrategy"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else words,
)
def test_words_for_a_strategy(words, kind, recipe, refused, monkeypatch):
    def said(trainer, module):
        raise InputError("seen", type(trainer.strategy).__name__)

    monkeypatch.setenv("NODE_RANK", "0")  # as whoever starts the other nodes by hand sets it
    monkeypatch.setattr(strategies, "check", said)
    assert refused(recipe(1, "run", *words)) == f"seen: {kind}"


@pytest.mark.parametrize("debug", ["ddp_cpu"])
@pytest.mark.parametrize("trainer", ["cpu", "gpu", "ddp"])
def test_debug_runs_ddp_over_any_trainer(trainer, debug):
    cfg = compose("train", [*GIVEN, f"trainer={trainer}", f"debug={debug}"])
    assert isinstance(build(cfg.trainer.strategy), strategies.DDP)


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["trainer=fsdp", "optimizer=muon"], "optimizer: Muon needs whole matrices"),
        (
            ["trainer=ddp", "trainer.strategy.static_graph=true", "trainer.accumulate_grad_batches=2"],
            "trainer.strategy.static_graph=true: goes with no trainer.accumulate_grad_batches=2",
        ),
    ],
    ids=["fsdp", "static graph"],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    overrides, what, recipe, refused, tmp_path
):
    argv = recipe(1, "run", *overrides, "trainer.accelerator=cpu", "trainer.devices=2")
    assert refused(argv).startswith(what)
    assert not (tmp_path / "run").exists()
