"""Our optimizers against closed forms, torch and the authors' package; every YAML resumes bit by bit."""

import pytest
import torch
from torch import nn

import train
from ldm.checkpoints import native
from ldm.checkpoints.optimizer import flatten_optimizer, restore_optimizer
from ldm.config import CONFIG_DIR, build, compose, plain
from ldm.training.assembly import build_module
from ldm.training.optim import parameter_groups, parameter_rules
from ldm.training.optimizers import (
    AdamW8bit,
    Muon,
    ScheduleFreeAdamW,
    dynamic_codes,
    in_memory,
    orthogonal,
)
from ldm.training.summary import memory

OPTIONS = sorted(path.stem for path in (CONFIG_DIR / "optimizer").glob("*.yaml"))
BYTES_A_PARAMETER = {
    "adamw": 8,
    "adamw_one_pass": 8,
    "adamw_8bit": 2 + 8 / 256,
    "muon": 4,
    "schedule_free": 8,
}


def parameters(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def gradients(found, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in found:
        p.grad = torch.randn(p.shape, generator=generator)


# ---- every YAML ----------------------------------------------------------------------------------------


SHORT = ["trainer.max_steps=4", "callbacks.checkpoint.every=2", "callbacks.checkpoint.keep_last=9"]
RARELY = [f"callbacks.{name}.every=100" for name in ("metrics", "validation", "pictures")]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_optimizer_goes_on_bit_by_bit(option, tmp_path):
    """Three steps, a checkpoint, three steps: by the first process, and by another."""

    def network():
        torch.manual_seed(0)
        layers = (
            nn.Conv2d(3, 64, 3),
            nn.GroupNorm(4, 64),
            nn.Conv2d(64, 8, 3),
            nn.Flatten(),
            nn.Linear(128, 2),
        )
        net = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        rules = parameter_rules([{"match": "^4", "lr": 0.1}])
        optimizer = build(cfg["optimizer"])(parameter_groups(net, 0.01, rules, lr=0.01))
        return net, optimizer, {p: name for name, p in net.named_parameters()}

    def steps(net, optimizer, seeds):
        for seed in seeds:
            x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

    cfg = plain(compose("train", ["experiment=quickstart_autoencoder", f"optimizer={option}"]))
    net, optimizer, names = network()
    steps(net, optimizer, range(3))
    tensors, document = flatten_optimizer(optimizer, names)
    path = native.save(tmp_path, 3, {"model": net.state_dict(), "optimizer": tensors}, {"o.json": document})
    steps(net, optimizer, range(3, 6))
    other, resumed, names = network()
    other.load_state_dict(native.load_tensors(path, "model"))
    stored = native.load_tensors(path, "optimizer")
    restore_optimizer(resumed, names, stored, native.load_document(path, "o.json"))
    steps(other, resumed, range(3, 6))
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_runs_with_every_optimizer_resume_bit_by_bit(option, recipe, tmp_path):
    """And the summary knew how large the checkpoint would be, to the byte."""
    argv = recipe(2, "whole", f"optimizer={option}", *SHORT, *RARELY)
    assert train.command(argv) == 0
    whole, half = (tmp_path / f"whole/checkpoints/step-{step:09d}" for step in (4, 2))
    assert train.command([*argv, "run_name=parts", f"resume={half}"]) == 0
    for kind in ("model", "ema", "optimizer"):
        name = f"{kind}.safetensors"
        again = tmp_path / "parts/checkpoints" / whole.name / name
        assert again.read_bytes() == (whole / name).read_bytes(), name
    tensors = {kind: native.load_tensors(whole, kind) for kind in ("model", "ema", "optimizer")}
    saved = sum(v.numel() * v.element_size() for kind in tensors.values() for v in kind.values())
    cfg = plain(compose("train", argv))
    assert memory(build_module(cfg, device="meta"))["checkpoint"] == saved
    if option == "schedule_free":
        for name, average in tensors["ema"].items():
            y = 0.9 * average + 0.1 * tensors["optimizer"][f"{name}.z"]
            torch.testing.assert_close(tensors["model"][name], y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("option", OPTIONS)
def test_bytes_of_the_state(option):
    """What the optimizer keeps, in bytes a parameter, of a network large enough."""
    cfg = plain(compose("train", ["experiment=quickstart_autoencoder", f"optimizer={option}"]))
    size = memory(build_module(cfg, device="meta"))
    assert size["optimizer"] / (size["weights"] / 4) == pytest.approx(BYTES_A_PARAMETER[option], rel=0.05)


# ---- Muon ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 24, 40), (2, 40, 24), (1, 7, 7)])
def test_orthogonal_sets_singular_values_to_about_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonal(matrices, 5).float()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.4
    assert values.max() < 1.4
    cosine = (found * (u @ v)).sum() / (found.norm() * (u @ v).norm())
    assert cosine > 0.95


def test_muon_is_torchs_on_matrices():
    """To the rounding of bf16, which sums in another order here."""
    mine, theirs = (parameters((8, 12), (8, 12), (20, 6)) for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9}
    ours = Muon([{"params": mine, "matrices": True}], rounds=5, **options)
    torchs = torch.optim.Muon(theirs, ns_steps=5, nesterov=True, adjust_lr_fn="match_rms_adamw", **options)
    for seed in range(5):
        for found, optimizer in ((mine, ours), (theirs, torchs)):
            gradients(found, seed)
            optimizer.step()
    start = parameters((8, 12), (8, 12), (20, 6))
    for a, b, origin in zip(mine, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (b - origin).norm()


def test_a_kernel_is_a_matrix_in_any_memory_format():
    (kernel,) = parameters((6, 4, 3, 3))
    last = nn.Parameter(kernel.detach().clone().to(memory_format=torch.channels_last))
    flat = nn.Parameter(kernel.detach().permute(0, 2, 3, 1).reshape(6, -1))
    optimizer = Muon([{"params": [kernel, last, flat], "matrices": True}], lr=0.1)
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(0))
    last.grad = kernel.grad.to(memory_format=torch.channels_last)
    flat.grad = kernel.grad.permute(0, 2, 3, 1).reshape(6, -1)
    optimizer.step()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(kernel, last)
    torch.testing.assert_close(kernel.permute(0, 2, 3, 1).reshape(6, -1), flat, rtol=0, atol=2e-3)


def test_muon_is_adamw_on_the_rest():
    mine, theirs = (parameters((8,), (30, 4)) for _ in range(2))
    options = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1}
    pair = (mine, Muon([{"params": mine}], **options)), (theirs, torch.optim.AdamW(theirs, **options))
    for seed in range(5):
        for found, optimizer in pair:
            gradients(found, seed)
            optimizer.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# ---- 8 bits --------------------------------------------------------------------------------------------


def test_the_codes_are_those_of_the_paper():
    """Seven decades; the numbers are those of the authors' create_dynamic_map, to six digits."""
    signed, unsigned = dynamic_codes(True), dynamic_codes(False)
    for codes in (signed, unsigned):
        assert len(codes) == 256
        assert (codes.diff() > 0).all()
        assert codes[-1] == 1
        assert 0 in codes
    assert signed[:2].tolist() == pytest.approx([-0.99296875, -0.97890625])
    assert unsigned[1:3].tolist() == pytest.approx([3.25e-7, 7.75e-7])


@pytest.mark.parametrize("count", [4096, 5000])
def test_what_is_stored_is_the_nearest_code(count):
    optimizer = AdamW8bit(parameters((1,)))
    state = {"root": torch.zeros(count, dtype=torch.uint8), "root_scale": torch.zeros(-(-count // 256))}
    values = torch.rand(count, generator=torch.Generator().manual_seed(0)) ** 4
    optimizer._store(state, "root", values)
    found = optimizer._load(state, "root")
    for block, again in zip(values.split(256), found.split(256), strict=True):
        codes = dynamic_codes(False) * block.max()
        best = codes[(block[:, None] - codes).abs().argmin(1)]
        torch.testing.assert_close(again, best, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("decades", "near", "most"), [(2, 0.06, 0.3), (4, 0.15, 1.0)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_8_bits_follow_adamw(memory_format, decades, near, most):
    """On a noisy quadratic, with gradients of all sizes side by side in a block.

    With the second moment itself in 8 bits, not its root, four decades end in steps of 300.
    """
    shape, generator = (16, 32, 3, 3), torch.Generator().manual_seed(0)
    target = torch.randn(shape, generator=generator)
    size = 10 ** (-decades * torch.rand(shape, generator=generator))
    found = []
    for make in (AdamW8bit, torch.optim.AdamW):
        p = nn.Parameter(torch.zeros(shape).to(memory_format=memory_format))
        small = nn.Parameter(torch.zeros(5))
        optimizer = make([p, small], lr=0.01, betas=(0.9, 0.99), weight_decay=0.01)
        noise = torch.Generator().manual_seed(1)
        for _ in range(150):
            p.grad = size * (p.detach() - target + 0.1 * torch.randn(shape, generator=noise))
            small.grad = small.detach() - 1
            optimizer.step()
        assert p.is_contiguous(memory_format=memory_format)
        found.append((p.detach(), small.detach()))
    (mine, mine_small), (theirs, theirs_small) = found
    torch.testing.assert_close(mine_small, theirs_small, rtol=1e-6, atol=1e-7)
    assert (mine - theirs).norm() < near * theirs.norm()
    assert (mine - theirs).abs().max() < most


def test_memory_order():
    tensor = torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    assert torch.equal(in_memory(tensor), tensor.permute(0, 2, 3, 1).flatten())
    in_memory(tensor).zero_()
    assert not tensor.any()


# ---- schedule-free -------------------------------------------------------------------------------------


def test_schedule_free_averages_its_iterates():
    """At a constant rate x is the mean of all z, and gradients are taken at y = beta1 x + (1 - beta1) z."""
    (p,) = parameters((5,))
    optimizer = ScheduleFreeAdamW([p], lr=0.1, betas=(0.7, 0.99))
    average, iterates = torch.zeros(5), []
    for seed in range(6):
        gradients([p], seed)
        optimizer.step()
        iterates.append(optimizer.state[p]["z"].clone())
        optimizer.average_into({p: average})
        torch.testing.assert_close(average, torch.stack(iterates).mean(0))
        torch.testing.assert_close(p.detach(), 0.7 * average + 0.3 * iterates[-1])


def test_schedule_free_is_the_authors():
    package = pytest.importorskip("schedulefree")
    warmup, options = 4, {"lr": 0.1, "betas": (0.9, 0.98), "weight_decay": 0.1}
    mine, theirs = (parameters((8,), (30, 4)) for _ in range(2))
    ours = ScheduleFreeAdamW(mine, **options)
    other = package.AdamWScheduleFree(theirs, warmup_steps=warmup, **options)
    averages = {p: torch.zeros_like(p) for p in mine}
    for seed in range(10):
        ours.param_groups[0]["lr"] = 0.1 * min(1, (seed + 1) / warmup)  # as the module's schedule does
        for found, optimizer in ((mine, ours), (theirs, other)):
            gradients(found, seed)
            if optimizer is other:
                optimizer.train()
            optimizer.step()
        ours.average_into(averages)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        other.eval()
        for a, b in zip(averages.values(), theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
