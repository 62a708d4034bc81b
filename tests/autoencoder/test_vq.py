"""The codebook against a slow quantiser; the autoencoder's laws. Against a peer: test_vq_parity.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from ldm.autoencoder import vq
from ldm.autoencoder.vq import AutoencoderVQ, EMAVectorQuantizer, VectorQuantizer
from ldm.config import CONFIG_DIR, build, from_yaml

TINY = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_groups": 4}
KINDS = {
    "gradient": partial(VectorQuantizer, num_codes=16, beta=0.3),
    "means": partial(EMAVectorQuantizer, num_codes=16, beta=0.3),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quantizer(kind: str = "gradient", num_codes: int = 16, dim: int = 3, **options) -> VectorQuantizer:
    made = KINDS[kind](num_codes=num_codes, dim=dim, **options).double()
    with torch.no_grad():
        made.embedding.weight.copy_(normal(num_codes, dim, seed=9))
    return made


def tiny(kind: str = "gradient", **options) -> AutoencoderVQ:
    torch.manual_seed(0)
    return AutoencoderVQ(KINDS[kind], **{**TINY, "latent_channels": 3, **options}).double()


def slow(z: Tensor, codes: Tensor) -> Tensor:
    """Index of the nearest code, one vector and one code at a time: [b c h w] -> [b h w]."""
    b, _, h, w = z.shape
    out = torch.zeros(b, h, w, dtype=torch.int64)
    for place in torch.cartesian_prod(torch.arange(b), torch.arange(h), torch.arange(w)):
        i, y, x = place.tolist()
        distances = [float((z[i, :, y, x] - code).square().sum()) for code in codes]
        out[i, y, x] = distances.index(min(distances))
    return out


@pytest.mark.parametrize("chunk", [2**25, 40])
def test_nearest_codes_and_loss_the_slow_way(chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(vq, "DISTANCES", chunk)
    quantize, z = quantizer(), normal(2, 3, 4, 5).requires_grad_()
    codes = quantize.embedding.weight
    expected = slow(z.detach(), codes.detach())
    assert expected.unique().numel() > 5
    assert torch.equal(quantize.indices(z), expected)
    out, terms = quantize(z)
    chosen = codes[expected].permute(0, 3, 1, 2)
    assert torch.equal(out, chosen)
    error = (z - chosen).square().flatten(1).mean(1)
    torch.testing.assert_close(terms["codebook"], 1.3 * error)
    share = torch.bincount(expected.flatten(), minlength=16) / expected.numel()
    perplexity = torch.exp(-(share[share > 0] * share[share > 0].log()).sum())
    torch.testing.assert_close(terms["perplexity"], perplexity.expand(2))
    torch.testing.assert_close(terms["usage"], (share > 0).float().mean().expand(2))


def test_gradients_go_to_the_right_terms() -> None:
    """A code is drawn to its vectors with weight 1, a vector to its code with beta; the rest is straight."""
    quantize, z = quantizer(), normal(2, 3, 4, 5).requires_grad_()
    out, terms = quantize(z)
    weight = normal(2, 3, 4, 5, seed=3)
    (out * weight).sum().backward()
    assert torch.equal(z.grad, weight)
    assert quantize.embedding.weight.grad is None
    z.grad = None
    terms["codebook"].sum().backward()
    indices, values = quantize.indices(z), z[0].numel()
    chosen = quantize.embedding.weight.detach()[indices].permute(0, 3, 1, 2)
    torch.testing.assert_close(z.grad, 0.3 * 2 * (z.detach() - chosen) / values)
    expected = torch.zeros(16, 3, dtype=torch.float64)
    pulls = (2 * (chosen - z.detach()) / values).permute(0, 2, 3, 1).flatten(0, 2)
    expected.index_add_(0, indices.flatten(), pulls)
    torch.testing.assert_close(quantize.embedding.weight.grad, expected)


def test_codes_are_found_in_full_precision_whatever_the_context() -> None:
    """Codes 1e-4 apart far from 0: bfloat16, and float32 by |z|^2 - 2 z.e + |e|^2, take them for one."""
    quantize = VectorQuantizer(32, 1)
    with torch.no_grad():
        quantize.embedding.weight.copy_(100 + 1e-4 * torch.arange(32.0)[:, None])
    z = quantize.embedding.weight.detach().view(1, 1, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = quantize(z)
    assert torch.equal(out, z)
    assert quantize(z.bfloat16())[0].dtype == torch.bfloat16


def by_hand(codes: Tensor, batches: list[Tensor], decay: float) -> list[Tensor]:
    """VQ-VAE, appendix A.1, with smoothed counts, in python."""
    k = len(codes)
    counts, sums = torch.ones(k).double(), codes.clone()
    for z in batches:
        indices = slow(z, codes).flatten()
        vectors = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        for i in range(k):
            mine = vectors[indices == i]
            counts[i] = decay * counts[i] + (1 - decay) * len(mine)
            sums[i] = decay * sums[i] + (1 - decay) * mine.sum(0)
        total = counts.sum()
        codes = sums / ((counts + 1e-5) / (total + k * 1e-5) * total)[:, None]
    return codes


def test_running_means_by_hand() -> None:
    quantize = quantizer("means", decay=0.9, restart=0.0)
    quantize.sums.copy_(quantize.embedding.weight)
    batches = [normal(2, 3, 4, 5, seed=i).requires_grad_() for i in range(4)]
    expected = by_hand(quantize.embedding.weight.clone(), [z.detach() for z in batches], 0.9)
    for z in batches:
        before = quantize.embedding.weight.clone()
        out, terms = quantize(z)
        chosen = before[slow(z.detach(), before)].permute(0, 3, 1, 2)
        assert torch.equal(out, chosen), "a batch is quantised by the codes it found"
        torch.testing.assert_close(terms["codebook"], 0.3 * (z - chosen).square().flatten(1).mean(1))
    torch.testing.assert_close(quantize.embedding.weight, expected)
    assert [p.requires_grad for p in quantize.parameters()] == [False]


def test_codes_move_in_training_steps_alone() -> None:
    net, images = tiny("means"), normal(2, 3, 8, 8)
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def unchanged() -> bool:
        return all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    net.decode(net.encode(images))
    with torch.no_grad():
        net(images)
    net.eval()(images)
    assert unchanged()
    net.train()(images)
    assert not unchanged()
    assert int(net.quantize.updates) == 1


def test_the_first_batch_places_the_codes_and_dead_ones_start_again() -> None:
    quantize = quantizer("means", num_codes=8, decay=0.5, restart=0.2)
    z = normal(4, 3, 8, 8).requires_grad_()
    rows = z.detach().permute(0, 2, 3, 1).reshape(-1, 3)
    quantize(z)
    distances = torch.cdist(quantize.embedding.weight, rows).min(1).values
    assert float(distances.max()) < 1e-4, "each code is a vector of the batch"
    with torch.no_grad():  # one code far away: chosen never, so it dies after log(0.2) / log(0.5) = 2.3 steps
        quantize.embedding.weight[3] = 1e6
        quantize.sums[3] = 1e6 * quantize.counts[3]
    for step in range(3):
        assert float(quantize.embedding.weight[3, 0].log10()) > 5, step
        quantize(z)
    assert float(torch.cdist(quantize.embedding.weight[3:4], rows).min()) < 1e-4
    assert int(quantize.updates) == 4


def test_restarts_are_a_function_of_the_state() -> None:
    """A copy made from the state dict goes on as the original does, bit for bit."""
    one = quantizer("means", num_codes=64, restart=0.9).float()
    for i in range(3):
        one(normal(2, 3, 4, 4, seed=i).float().requires_grad_())
    other = EMAVectorQuantizer(64, 3, beta=0.3, restart=0.9)
    other.load_state_dict(one.state_dict())
    before = one.embedding.weight.clone()
    for quantize in (one, other):
        torch.manual_seed(0 if quantize is one else 1)
        for i in range(3, 6):
            quantize(normal(2, 3, 4, 4, seed=i).float().requires_grad_())
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))
    assert torch.equal(one.embedding.weight, other.embedding.weight)
    assert not torch.equal(one.embedding.weight, before)


def _rank(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    states = []
    for restart in (0.0, 0.5):
        quantize = quantizer("means", restart=restart)
        for i in range(3):
            quantize(normal(4, 3, 4, 4, seed=i)[2 * rank : 2 * rank + 2].requires_grad_())
        states.append(quantize.state_dict())
    torch.save(states, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_have_one_codebook(tmp_path: Path) -> None:
    """Equal on both; without restarts, that of one process that has the batches of both."""
    mp.start_processes(_rank, (tmp_path,), nprocs=2, start_method="fork")
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(one[name], value) for name, value in other.items())
    alone = quantizer("means", restart=0.0)
    for i in range(3):
        alone(normal(4, 3, 4, 4, seed=i).requires_grad_())
    torch.testing.assert_close(ours[0], dict(alone.state_dict()))
    rows = torch.cat([normal(4, 3, 4, 4, seed=i).permute(0, 2, 3, 1).reshape(-1, 3) for i in range(3)])
    assert int(ours[1]["updates"]) == 3
    assert float(torch.cdist(ours[1]["embedding.weight"], rows).min(1).values.max()) < 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_shifted_and_scaled_before_quantising(kind: str) -> None:
    net = tiny(kind, latent_shift=[1.0, -2.0, 0.5], latent_scale=[0.5, 4.0, 1.0])
    images, noise = normal(2, 3, 8, 8), normal(2, 3, 4, 4, seed=1)
    z = net.moments(images)
    assert z.shape == (2, net.latent_channels, 4, 4)
    expected = torch.stack([(z[:, 0] - 1) * 0.5, (z[:, 1] + 2) * 4, z[:, 2] - 0.5], 1)
    torch.testing.assert_close(net.encode(images), expected)
    assert torch.equal(net.latents(z, noise), net.latents(z)), "there is nothing to sample"
    reconstruction, terms = net.eval()(images)
    torch.testing.assert_close(net.decode(net.encode(images)), reconstruction)
    assert {name: value.shape for name, value in terms.items()} == {
        name: (2,) for name in ("codebook", "usage", "perplexity")
    }
    nudged = net.decode(net.encode(images) + 1e-9)
    torch.testing.assert_close(nudged, reconstruction, rtol=0, atol=0 if kind == "means" else 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_travel_and_foreign_state_dicts_keep_ours(kind: str) -> None:
    net = tiny(kind)
    net.set_latent_statistics(torch.arange(3.0), torch.full((3,), 2.0))
    net.train()(normal(2, 3, 8, 8))
    other = tiny(kind)
    other.load_state_dict(net.state_dict())
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in other.state_dict().items())
    own = ("latent_", "quantize.counts", "quantize.sums", "quantize.updates")
    foreign = {name: value for name, value in net.state_dict().items() if not name.startswith(own)}
    third = tiny(kind)
    third.load_state_dict(foreign, strict=True)
    if kind == "means":
        torch.testing.assert_close(third.quantize.sums, net.quantize.embedding.weight, check_dtype=False)
        third.quantize.restart = 0.0
        third.train()(normal(2, 3, 8, 8))
        moved = (third.quantize.embedding.weight - net.quantize.embedding.weight).abs()
        assert 0 < float(moved.max()) < 1.0, "trained codes are no first batch's to place"


@pytest.mark.parametrize("name", ["vq_f4", "vq_f8"])
def test_published_sizes(name: str) -> None:
    published = {"vq_f4": (55.30e6, 8192, 3, 4), "vq_f8": (67.65e6, 16384, 4, 8)}[name]
    with torch.device("meta"):
        net = build(from_yaml((CONFIG_DIR / f"autoencoder/{name}.yaml").read_text()))
    codebook = net.quantize.embedding.weight
    assert (codebook.shape[0], codebook.shape[1], net.factor) == published[1:]
    total = sum(p.numel() for p in net.parameters()) - codebook.numel()
    assert abs(total - published[0]) <= 0.005e6


def test_forward_never_asks_for_a_value() -> None:
    with torch.device("meta"):
        for kind in KINDS:
            net = AutoencoderVQ(KINDS[kind], **TINY)
            assert net(torch.empty(2, 3, 8, 8))[0].shape == (2, 3, 8, 8)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="4 channels.*3"):
        quantizer().indices(normal(1, 4, 2, 2))
    with pytest.raises(ValueError, match=r"decay=1\.0.*restart=0\.1"):
        quantizer("means", decay=1.0)
    assert isinstance(tiny().quantize, nn.Module)


@pytest.mark.slow
def test_nine_codes_of_ten_are_used_on_the_quickstarts_pictures() -> None:
    """Measured: all 64 after 80 steps of a small autoencoder (seeds 0 and 1)."""
    from ldm.data.emoji import EmojiSet

    emoji = EmojiSet(image_size=32, num_objects=60)
    pairs = (*emoji.train_pairs, *emoji.held_out)
    pictures = torch.stack([torch.from_numpy(emoji.picture(i, j).copy()).permute(2, 0, 1) for i, j in pairs])
    pictures = pictures.float() / 127.5 - 1
    torch.manual_seed(0)
    net = AutoencoderVQ(
        partial(EMAVectorQuantizer, num_codes=64, decay=0.95, restart=0.2), latent_channels=4,
        block_out_channels=(8, 16, 32), layers_per_block=1, norm_groups=8, mid_attention=False,
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for step in range(120):
        choice = torch.randint(len(emoji.train_pairs), (8,), generator=torch.Generator().manual_seed(step))
        output, terms = net(pictures[choice])
        loss = ((output - pictures[choice]).abs().mean((1, 2, 3)) + terms["codebook"]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        used = net.quantize.indices(net.moments(pictures)).unique().numel()
        held_out = pictures[len(emoji.train_pairs) :]
        error = (net.decode(net.encode(held_out)) - held_out).square().mean()
    assert used >= 0.9 * 64
    assert error < 0.9 * held_out.var(), "used to say something about the pictures"


def test_pictures_of_weight_0_leave_no_trace_in_the_codebook():
    torch.manual_seed(0)
    z = torch.randn(3, 4, 5, 5)
    codebooks = []
    for part, weight in ((z[:2], None), (z, torch.tensor([1.0, 1.0, 0.0]))):
        torch.manual_seed(1)
        codebook = EMAVectorQuantizer(8, 4, restart=0.0)
        for _ in range(3):
            codebook(part, weight)
        codebooks.append(codebook.state_dict())
    for name, value in codebooks[0].items():
        torch.testing.assert_close(codebooks[1][name], value)
    torch.manual_seed(1)
    nothing = EMAVectorQuantizer(8, 4)
    before = nothing.embedding.weight.clone()
    nothing(z, torch.zeros(3))
    torch.testing.assert_close(nothing.embedding.weight, before, rtol=1e-4, atol=1e-7)
