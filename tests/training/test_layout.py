"""Channels last from end to end: which operations of a step change the order of channels in memory."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm.autoencoder.kl import AutoencoderKL
from ldm.autoencoder.losses import ReconstructionLoss
from ldm.autoencoder.vq import AutoencoderVQ, VectorQuantizer
from ldm.backbones.unet import CrossAttentionUNet
from ldm.nn import attention, norm
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.types import Batch, Conditioning
from tests.training.test_adversarial import adversarial
from tests.training.test_modules import diffusion

COPIES = ("aten.clone", "aten._to_copy", "aten.copy_")


def is_last(x):
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def is_first(x):
    return x.ndim == 4 and x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)


class Conversions(TorchDispatchMode):
    """Operations that copy a tensor of 3 or 4 dimensions into another order, or that are given channels last
    and give channels first; and our kernels where they are given channels first. Views change nothing.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        places = {x.untyped_storage().data_ptr() for x in given}
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        new = [x for x in made if x.untyped_storage().data_ptr() not in places]
        if str(operation).startswith(COPIES):
            source, target = given[-1] if "copy_." in str(operation) else given[0], made[0]
            same = source.stride() == target.stride() or source.shape != target.shape or source.ndim < 3
            change = not same
        else:
            change = any(map(is_last, given)) and any(map(is_first, new))
            change = change or (str(operation).startswith("ldm.") and any(map(is_first, given)))
        if change:
            self.found.append(f"{operation} {list(made[0].shape)}")
        return out


def conversions(work):
    with Conversions() as mode:
        work()
    return mode.found


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


def ready(net):
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return net.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("work", "count"),
    [
        (lambda x: x.contiguous(), 1),
        (lambda x: x.flatten(1).mean(1), 1),
        (lambda x: x.flatten(2).mT.contiguous(), 0),
        (lambda x: torch.zeros(x.shape).copy_(x), 1),
        (lambda x: F.avg_pool2d(x.permute(0, 1, 3, 2), 2), 0),
        (lambda x: x.permute(0, 2, 3, 1).flatten(1, 2).mT.contiguous(), 1),
        (lambda x: torch.zeros(x.shape) * x, 1),
        (lambda x: x.to(torch.bfloat16), 0),
    ],
)
def test_conversions_are_seen(work, count):
    x = last(torch.randn(2, 8, 4, 4))
    assert len(conversions(lambda: work(x))) == count


def unet(**options):
    return ready(
        CrossAttentionUNet(
            block_out_channels=(16, 32),
            layers_per_block=1,
            transformer_depth=(1, 1),
            head_dim=8,
            context_dim=12,
            norm_groups=4,
            **options,
        )
    )


def through(net, x, precision):
    """The conversions of a forward and a backward pass of `net(x)`."""
    x = x.requires_grad_()

    def work():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            out = net(x)
        assert is_last(out)
        out.square().sum().backward()

    found = conversions(work)
    assert is_last(x.grad)
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fused_qkv", [False, True])
@pytest.mark.parametrize("linear_projection", [False, True])
def test_a_unet_has_none(linear_projection, fused_qkv, precision, monkeypatch):
    monkeypatch.setattr(attention, "_fused_qkv", fused_qkv)
    net = unet(linear_projection=linear_projection)
    told = Conditioning(context=torch.randn(2, 5, 12))
    x = last(torch.randn(2, 4, 8, 8))
    assert through(lambda x: net(x, torch.tensor([1.0, 2.0]), told), x, precision) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs in Triton's interpreter")
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_a_unet_with_our_norm_has_none(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(norm, "_fused", True)
    net, told = unet(), Conditioning(context=torch.randn(2, 5, 12))
    x = last(torch.randn(2, 4, 8, 8))
    assert through(lambda x: net(x, torch.tensor([1.0, 2.0]), told), x, "bf16") == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_autoencoder_has_none(precision):
    net = ready(AutoencoderKL(block_out_channels=(16, 32), norm_groups=4))
    assert through(net.moments, last(torch.randn(2, 3, 16, 16)), precision) == []
    assert through(net.decode, last(torch.randn(2, 4, 8, 8)), precision) == []


def pictures():
    image = torch.arange(2 * 3 * 16 * 16).view(2, 3, 16, 16) % 256
    return Batch(n=torch.arange(2), weight=torch.ones(2), image=image.to(torch.uint8), caption=["a", "b"])


BYTES = "aten._to_copy.default [2, 3, 16, 16]"  # pictures come as [3 h w], and leave so for the device


def test_a_step_of_an_autoencoder_has_those_of_its_bytes_and_moments():
    """Moments are cut in two, whose gradients torch puts together as channels first: 8 channels, small."""
    net = ready(AutoencoderKL(block_out_channels=(16, 32), norm_groups=4))
    module = AutoencoderModule(net, ReconstructionLoss(l1=1.0, l2=0.5, kl=1e-4), None, None)
    found = conversions(lambda: module.training_step(pictures(), 0).backward())
    assert found == [BYTES, "aten.add.Tensor [2, 4, 8, 8]"]


def test_a_step_with_a_codebook_has_that_of_its_bytes():
    net = AutoencoderVQ(lambda dim: VectorQuantizer(16, dim), block_out_channels=(16, 32), norm_groups=4)
    module = AutoencoderModule(ready(net), ReconstructionLoss(), None, None)
    assert conversions(lambda: module.training_step(pictures(), 0).backward()) == [BYTES]


def test_a_step_of_latent_diffusion_has_that_of_its_bytes(networks):
    module = diffusion(networks).to(memory_format=torch.channels_last)
    given = []
    module.backbone.conv_in.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    found = conversions(lambda: module.training_step(pictures(), 0).backward())
    assert [each for each in found if "12" not in each] == [BYTES], "12 tokens are the text tower's"
    assert is_last(given[0])


def test_a_step_with_a_discriminator_has_no_more(networks):
    module = adversarial(ready(networks()[0])).to(memory_format=torch.channels_last)
    module.trainer = SimpleNamespace(global_step=0, accumulate_grad_batches=1)
    found = conversions(lambda: module.training_step(pictures(), 0).backward())
    weights = "aten.clone.default [2, 3, 8, 3, 3]"  # the last layer's gradients, whose norms are compared
    assert found == [BYTES, weights, "aten.add.Tensor [2, 4, 4, 4]"]


@pytest.mark.gpu
def test_on_a_gpu_a_unet_with_our_norm_has_none(monkeypatch):
    """torch's own group norm gives channels first there."""
    monkeypatch.setattr(norm, "_fused", True)
    net = unet().cuda()
    told = Conditioning(context=torch.randn(2, 5, 12, device="cuda"))
    x, time = last(torch.randn(2, 4, 8, 8, device="cuda")), torch.tensor([1.0, 2.0], device="cuda")
    assert through(lambda x: net(x, time, told), x, "bf16") == []
