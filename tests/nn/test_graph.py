"""A network's pass as a graph: recorded once for each set of shapes, on tensors that stay."""

import pytest
import torch

from ldm.backbones.unet import CrossAttentionUNet
from ldm.nn import graph
from ldm.nn.graph import Graphed
from ldm.types import Conditioning
from tests.taped import Recorder

SIZES = {"in_channels": 4, "out_channels": 4, "block_out_channels": [8, 16], "layers_per_block": 1}
SIZES |= {"transformer_depth": [0, 1], "head_dim": 8, "context_dim": 6, "norm_groups": 4}


def unet(device="cpu"):
    torch.manual_seed(0)
    net = CrossAttentionUNet(**SIZES).to(device, memory_format=torch.channels_last)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.eval().requires_grad_(False)


def given(seed, b=2, side=8, tokens=3, mask=False, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, 4, side, side, generator=generator).contiguous(memory_format=torch.channels_last)
    context = torch.randn(b, tokens, 6, generator=generator)
    kept = (torch.arange(tokens) < 2).expand(b, -1).to(device) if mask else None
    told = Conditioning(context=context.to(device), context_mask=kept)
    return x.to(device), torch.full((b,), 500.0 + seed, device=device), told


@torch.no_grad()
def test_each_set_of_shapes_is_recorded_once_and_replayed_on_new_values():
    net, recorder = unet(), Recorder()
    quick, found, expected = Graphed(net, recorder), [], []
    calls = [
        given(0),
        given(1),
        given(2, b=3),
        given(3, side=4),
        given(4, mask=True),
        given(5),
        given(6, b=3),
    ]
    for call in calls:
        found.append(quick(*call))
        expected.append(net(*call))
    assert len(recorder.tapes) == 4
    assert recorder.replayed == len(calls)
    for a, b in zip(found, expected, strict=True):  # none was written over by a later one
        assert torch.equal(a, b)


@torch.no_grad()
def test_types_under_autocast_have_graphs_of_their_own():
    net, recorder = unet(), Recorder()
    quick = Graphed(net, recorder)
    plain = quick(*given(0))
    with torch.autocast("cpu", torch.bfloat16):
        low, expected = quick(*given(0)), net(*given(0))
    assert len(recorder.tapes) == 2
    assert torch.equal(low, expected)
    assert not torch.equal(low.float(), plain)


@torch.no_grad()
def test_the_oldest_graph_goes():
    net, recorder = unet(), Recorder()
    quick = Graphed(net, recorder)
    for tokens in range(2, graph.MOST + 4):
        quick(*given(0, tokens=tokens))
    assert len(quick.graphs) == graph.MOST
    quick(*given(0, tokens=2))
    assert len(recorder.tapes) == graph.MOST + 3


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_replays_are_what_the_network_gives():
    net = unet("cuda")
    quick = Graphed(net)
    for seed in range(4):
        call = given(seed, device="cuda")
        torch.testing.assert_close(quick(*call), net(*call), rtol=1e-4, atol=1e-5)
    assert len(quick.graphs) == 1
