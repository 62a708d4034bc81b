import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.diffusion.denoiser import Denoiser, MinSNR, Simple
from ldm.diffusion.guidance import guided
from ldm.diffusion.noise_scheduler import EDM, RectifiedFlow, VariancePreserving
from ldm.diffusion.samplers import ddim, dpmpp_2m, heun, prior, truncate
from ldm.types import Conditioning, GridRow

COUNT = 2000  # elements of a distribution


def start(lab, grid, count=64):
    """States at the first row, on quantiles of its distribution."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    x = torch.special.ndtri(u) * math.hypot(grid[0].sigma, 1.2 * grid[0].alpha) + 0.09 * grid[0].alpha
    return x.view(-1, 1)


def error(lab, oracle, solve, grid, reference):
    x = start(lab, grid)
    return (solve(oracle.denoise, x, grid, noise=lab.no_noise) - reference).abs().mean().item()


@pytest.mark.parametrize(("solve", "expected"), [(ddim, 1), (heun, 2), (dpmpp_2m, 2)])
def test_order_of_convergence_on_the_exact_denoiser(lab, noise_scheduler, solve, expected):
    """Against the exact solution of the flow of a mixture, on interior log-SNR grids."""
    oracle = lab.Oracle(noise_scheduler, lab.Mixture())
    errors = []
    for num_steps in (64, 128, 256):
        grid = lab.interior(noise_scheduler, num_steps)
        x = start(lab, grid)
        reference = oracle.mixture.flow(x, grid[0], grid[-1])
        errors.append(error(lab, oracle, solve, grid, reference))
    assert lab.order(errors) == pytest.approx(expected, abs=0.2)
    assert errors[-1] < (1e-2 if expected == 1 else 1e-3)


def test_every_sampler_is_finite_at_the_ends_and_converges(lab, noise_scheduler, sampler):
    """From the prior to the clean row: the distribution's quantiles are met better with more steps."""
    oracle = lab.Oracle(noise_scheduler, lab.Mixture())
    stochastic = sampler.keywords.get("eta", 0) > 0
    for spacing in ["karras", *noise_scheduler.time_spacings]:
        if spacing == "leading":
            continue  # does not begin at the prior
        errors = []
        for num_steps in (1, 8, 24, 72):
            grid = noise_scheduler.grid(num_steps, spacing)
            noise = [lab.gaussian((COUNT, 1), 100 + i) for i in range(num_steps)]
            u = ((torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT).view(-1, 1)
            x = prior(torch.special.ndtri(u), grid)
            out = sampler(oracle.denoise, x, grid, noise=noise.__getitem__)
            assert out.isfinite().all()
            exact = oracle.mixture.flow(torch.special.ndtri(u), GridRow(0, 0.0, 1.0), GridRow(0, 1.0, 0.0))
            errors.append((out.sort(0).values - exact).abs().mean().item())
        assert errors[-1] < errors[1] / 2 < errors[0] / 3, (spacing, errors)
        assert errors[-1] < (0.16 if stochastic else 0.08), (spacing, errors)  # the spread itself is 1


@pytest.mark.parametrize("process", [VariancePreserving(), EDM(), RectifiedFlow()])
def test_ancestral_steps_give_a_gaussian_its_variance(lab, process):
    """Latents N(0.5, 0.3^2) with their exact denoiser: eta = 1 must not shrink nor widen them."""

    def denoise(x, row):
        gain = row.alpha * 0.09 / (row.alpha**2 * 0.09 + row.sigma**2)
        return 0.5 + gain * (x - row.alpha * 0.5)

    grid = process.grid(300, "log_snr")
    x = prior(lab.gaussian((20_000,), 0), grid)
    out = ddim(denoise, x, grid, noise=lambda i: lab.gaussian((20_000,), 1 + i), eta=1.0)
    assert out.mean().item() == pytest.approx(0.5, abs=0.01)
    assert out.std().item() == pytest.approx(0.3, rel=0.03)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_euler_in_sigma_over_alpha(lab, eta):
    """For any network: the step does not depend on how the state is scaled."""
    vp = VariancePreserving()
    denoiser = Denoiser(lab.Smooth(), vp)
    grid = vp.grid(20, "leading")
    denoise = partial(denoiser.at_row, conditioning=lab.NOTHING)
    noise = [lab.gaussian((2, 4, 3, 3), i) for i in range(20)]
    x = lab.gaussian((2, 4, 3, 3), 99)
    ours = ddim(denoise, x, grid, noise=noise.__getitem__, eta=eta)
    ratio = lab.in_ratio_denoise(denoise, grid)
    scaled = ddim(ratio, x / grid[0].alpha, lab.in_ratio(grid), noise=noise.__getitem__, eta=eta)
    torch.testing.assert_close(scaled, ours, rtol=1e-10, atol=1e-10)


def test_ddim_along_a_flow_is_the_textbook_euler(lab):
    flow = RectifiedFlow()
    network = lab.Smooth()
    grid = flow.grid(10, "uniform")
    x = expected = lab.gaussian((2, 4, 3, 3))
    for i in range(10):
        time = torch.full((2,), 1000 * (1 - i / 10), dtype=torch.float64)
        expected = expected - 0.1 * network(expected, time, lab.NOTHING)
    denoise = partial(Denoiser(network, flow).at_row, conditioning=lab.NOTHING)
    torch.testing.assert_close(ddim(denoise, x, grid, noise=lab.no_noise), expected)


def test_network_calls_and_callbacks(lab, noise_scheduler, sampler, request):
    oracle = lab.Oracle(noise_scheduler, lab.Mixture())
    grid, seen = noise_scheduler.grid(9, "karras"), []
    x = prior(lab.gaussian((5, 1)), grid)
    asked = []

    def noise(i):
        asked.append(i)
        return lab.gaussian((5, 1), i)

    out = sampler(
        oracle.denoise, x, grid, noise=noise, callback=lambda i, denoised: seen.append((i, denoised))
    )
    assert oracle.calls == (17 if sampler.func is heun else 9)
    assert [i for i, _ in seen] == list(range(9))
    torch.testing.assert_close(seen[-1][1], out)  # the last step lands on its clean estimate
    assert asked == (list(range(8)) if sampler.keywords.get("eta") else [])  # none on the way to sigma = 0


def test_dpmpp_2m_with_one_step_is_the_clean_estimate(lab, noise_scheduler):
    oracle = lab.Oracle(noise_scheduler, lab.Mixture())
    grid = noise_scheduler.grid(1, "log_snr")
    x = prior(lab.gaussian((5, 1)), grid)
    expected = oracle.denoise(x, grid[0])
    for solve in (ddim, heun, dpmpp_2m):
        torch.testing.assert_close(solve(oracle.denoise, x, grid, noise=lab.no_noise), expected)


def test_prior_of_image_to_image_is_a_noised_image(lab, noise_scheduler):
    grid = truncate(noise_scheduler.grid(10, "log_snr"), 0.6)
    noise, latents = lab.gaussian((2, 3), 1), lab.gaussian((2, 3), 2)
    assert torch.equal(prior(noise, grid), grid[0].sigma * noise)
    torch.testing.assert_close(prior(noise, grid, latents), grid[0].alpha * latents + grid[0].sigma * noise)


@pytest.mark.parametrize(
    ("num_steps", "strength", "steps"),
    [(10, 1.0, 10), (10, 0.6, 6), (30, 0.75, 23), (10, 0.01, 1), (5, 0.5, 3)],
)
def test_truncate_keeps_the_last_steps(num_steps, strength, steps):
    grid = EDM().grid(num_steps, "karras")
    assert truncate(grid, strength) == grid[-steps - 1 :]
    assert len(truncate(grid, strength)) == steps + 1


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.1])
def test_truncate_refuses(strength):
    with pytest.raises(ValueError, match=f"strength={strength} is not above 0 and at most 1"):
        truncate(EDM().grid(4, "karras"), strength)


def test_eta_outside_0_and_1_is_refused(lab):
    with pytest.raises(ValueError, match="eta=1.5 is not within 0 and 1"):
        ddim(lambda x, row: x, torch.ones(1), EDM().grid(4, "karras"), noise=lab.no_noise, eta=1.5)


class NoSync(TorchDispatchMode):
    """Fails where a tensor's value would be asked for, which stops the queue of a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        assert name not in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::masked_select",
            "aten::equal",
        ), name
        return func(*args, **(kwargs or {}))


def test_the_guard_against_synchronisation_guards():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        torch.ones(1).item()


def test_sampling_never_asks_the_device(lab, noise_scheduler, sampler):
    null = Conditioning(pooled=torch.zeros(2, 1))
    denoise = guided(Denoiser(lab.Smooth(), noise_scheduler), null, null, 4.0, rescale=0.5)
    grid = noise_scheduler.grid(4, "uniform")
    noise = [lab.gaussian((2, 4, 3, 3), i).float() for i in range(5)]
    with NoSync():
        out = sampler(denoise, prior(noise[4], grid), grid, noise=noise.__getitem__)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("weighting", [Simple(), MinSNR()])
def test_the_loss_never_asks_the_device(lab, noise_scheduler, weighting):
    denoiser = Denoiser(lab.Smooth(), noise_scheduler, weighting)
    latents, noise = lab.gaussian((2, 4, 3, 3), 1).float(), lab.gaussian((2, 4, 3, 3), 2).float()
    with NoSync():
        t = noise_scheduler.time_at(torch.tensor([0.3, 0.8]))
        loss = denoiser.loss(latents, noise, t, lab.NOTHING)
        noise_scheduler.time_of(noise_scheduler.log_snr(t))
    assert loss.shape == (2,)
