"""Two pieces of a step on their own: the moving average of the weights (C5), a sampler's arithmetic (C6)."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness
from benchmarks.harness import Measured
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.noise_scheduler import VariancePreserving
from ldm.diffusion.samplers import ddim, dpmpp_2m, prior
from ldm.training.ema import EMA
from ldm.types import Conditioning

# ---- C5 ------------------------------------------------------------------------------------------------

TENSORS, DECAY = 686, 0.9999  # as many tensors as Stable Diffusion's U-Net has


def network(parameters: int) -> nn.Module:
    """Tensors of unequal sizes, as networks have: half of them small."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(TENSORS, generator=generator) ** 4
    sizes = (weights / weights.sum() * parameters).long().clamp(min=8).tolist()
    module = nn.Module()
    for i, size in enumerate(sizes):
        module.register_parameter(f"w{i}", nn.Parameter(torch.randn(size, generator=generator)))
    return module


def averages(module: nn.Module) -> dict[str, tuple[Callable[[], Any], Callable[[], list[Tensor]]]]:
    """Contestant -> (one update at a fixed decay, what it holds)."""
    own, parameters, updates = EMA(module, DECAY), list(module.parameters()), 10**9
    found: dict[str, tuple[Callable[[], Any], Callable[[], list[Tensor]]]] = {
        "ours": (lambda: own.update(updates), lambda: own.average),
    }
    if harness.missing("diffusers") is None:
        from diffusers.training_utils import EMAModel

        for name, foreach in (("diffusers, foreach", True), ("diffusers, its default loop", False)):
            peer = EMAModel(parameters, decay=DECAY, foreach=foreach)
            peer.optimization_step = updates
            found[name] = (partial(peer.step, parameters), lambda peer=peer: peer.shadow_params)
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    stock = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    stock.update_parameters(module)  # the first one copies
    held = partial(list, stock.module.parameters())
    found["torch's AveragedModel (Lightning's)"] = (partial(stock.update_parameters, module), held)
    return found


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most that is allocated at once, above what was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    now = most = 0
    for event in found.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def moving_average(rounds: int, parameters: int = 60_000_000, updates: int = 10) -> list[Any]:
    module = network(parameters)
    contestants = averages(module)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)
    held: dict[str, list[Tensor]] = {}
    for name, (update, average) in contestants.items():
        update()
        held[name] = [tensor.clone() for tensor in average()]
    for tensors in held.values():
        for mine, theirs in zip(held["ours"], tensors, strict=True):
            torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-6)

    def turn(update: Callable[[], Any]) -> Measured:
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(updates):
            update()
        return Measured(updates, time.perf_counter() - began, time.process_time() - cpu)

    temporary = {name: peak_bytes(update) for name, (update, _) in contestants.items()}
    what = f"One update of the average of {parameters / 1e6:.0f} M parameters in {TENSORS} tensors, fp32."
    found = harness.race(
        "C5",
        what,
        {name: partial(turn, update) for name, (update, _) in contestants.items()},
        rounds,
        "updates",
        {"diffusers, foreach": 1 / 0.55, "diffusers, its default loop": 1 / 0.3},
    )
    spent = "; ".join(f"{name} {harness.number(size / 1e6)} MB" for name, size in temporary.items())
    found.notes.append(f"Memory that an update takes for itself: {spent}.")
    return [found]


# ---- C6 ------------------------------------------------------------------------------------------------

SHAPE, STEPS = (1, 4, 64, 64), 50
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


class Identity(nn.Module):
    """A network that costs nothing, so that what is left is the sampler."""

    def forward(self, x: Tensor, time: Any = None, conditioning: Any = None) -> Tensor:
        return x


@torch.no_grad()
def sampled(process: VariancePreserving, solve: Callable[..., Tensor], noise: Tensor) -> Tensor:
    denoise = partial(Denoiser(Identity(), process).at_row, conditioning=Conditioning())
    grid = process.grid(STEPS, "trailing")
    return solve(denoise, prior(noise, grid), grid, noise=None)


@torch.no_grad()
def peer_sampled(scheduler: Any, noise: Tensor) -> Tensor:
    scheduler.set_timesteps(STEPS)
    x, net = noise * scheduler.init_noise_sigma, Identity()
    for t in scheduler.timesteps:
        x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


def samplers(rounds: int, repeats: int = 20) -> list[Any]:
    if harness.missing("diffusers") is not None:
        return [harness.Table("C6", "diffusers is not installed: nothing to compare with.", [""], [], {})]
    import diffusers

    process = VariancePreserving()
    noise, found = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), []
    spaced = {**SD, "timestep_spacing": "trailing"}
    first = process.grid(STEPS, "trailing")[0].sigma  # what theirs but Euler leaves to the caller
    pairs = {
        "DDIM": (ddim, partial(diffusers.DDIMScheduler, **spaced, clip_sample=False), first),
        "Euler": (ddim, partial(diffusers.EulerDiscreteScheduler, **spaced), 1.0),
        "DPM++ 2M": (dpmpp_2m, partial(diffusers.DPMSolverMultistepScheduler, **spaced), first),
    }
    for name, (solve, make, scale) in pairs.items():
        peer = make()
        mine, theirs = sampled(process, solve, noise), peer_sampled(peer, scale * noise)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))

        def turn(work: Callable[[], Tensor]) -> Measured:
            began, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                work()
            count = repeats * STEPS
            return Measured(count, time.perf_counter() - began, time.process_time() - cpu)

        contestants = {
            "ours": partial(turn, partial(sampled, process, solve, noise)),
            "diffusers": partial(turn, partial(peer_sampled, peer, scale * noise)),
        }
        what = (
            f"{STEPS} steps at {list(SHAPE)} with a network that costs nothing; set-up of the grid included."
        )
        found.append(harness.race(f"C6 {name}", what, contestants, rounds, "steps", {"diffusers": 1 / 0.4}))
    return found
