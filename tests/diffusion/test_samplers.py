import math
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.diffusion.denoiser import P2, Debiased, Denoiser, LogNormal, MinSNR, Simple
from ldm.diffusion.guidance import guided
from ldm.diffusion.noise_scheduler import EDM, RectifiedFlow, VariancePreserving
from ldm.diffusion.samplers import ddim, dpmpp_2m, heun, plms, prior, truncate, unipc
from ldm.errors import InputError
from ldm.types import Conditioning, GridRow


def start(lab, grid, count=64):
    """States at the first row, on quantiles of its distribution."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    x = torch.special.ndtri(u) * math.hypot(grid[0].sigma, 1.2 * grid[0].alpha) + 0.09 * grid[0].alpha
    return x.view(-1, 1)


def error(lab, oracle, solve, grid, reference):
    x = start(lab, grid)
    return (solve(oracle.denoise, x, grid, noise=lab.no_noise) - reference).abs().mean().item()


def refused(sampler, grid):
    """PLMS takes even grids from alpha > 0 alone; whether this one is refused, in one line."""
    if sampler.func is not plms or grid[0].alpha > 0:
        return False
    with pytest.raises(InputError, match="sampler=plms: the grid begins at alpha = 0; choose") as caught:
        sampler(lambda x, row: x, torch.ones(1), grid, noise=None)
    assert "\n" not in str(caught.value)
    return True


def is_stochastic(sampler):
    return sampler.keywords.get("eta", 0) > 0 or sampler.keywords.get("s_churn", 0) > 0


@pytest.mark.parametrize(
    ("solve", "expected"),
    [
        (ddim, 1),
        (heun, 2),
        (dpmpp_2m, 2),
        (partial(unipc, order=1), 2),
        (unipc, 3),
        (partial(unipc, order=3), 4),
        (plms, 2),
    ],
)
def test_order_of_convergence_on_the_exact_denoiser(lab, noise_scheduler, solve, expected):
    """Against the exact solution of the flow of a mixture, on interior log-SNR grids."""
    oracle = lab.Oracle(noise_scheduler, lab.Mixture())
    grids = [lab.interior(noise_scheduler, num_steps) for num_steps in (32, 64, 128)]
    reference = oracle.mixture.flow(start(lab, grids[0]), grids[0][0], grids[0][-1])
    errors = [error(lab, oracle, solve, grid, reference) for grid in grids]
    assert lab.order(errors) == pytest.approx(expected, abs=0.2)
    assert errors[-1] < {1: 1e-2, 2: 1e-3}.get(expected, 1e-4)


def test_every_sampler_is_finite_at_the_ends_and_converges(lab, noise_scheduler, sampler):
    """From the prior to the clean row: the distribution's quantiles are met better with more steps."""
    oracle = lab.Oracle(noise_scheduler, lab.Mixture())
    stochastic = is_stochastic(sampler)
    if refused(sampler, noise_scheduler.grid(8, "log_snr")):
        return
    count, chance = (2000, 0.05) if stochastic else (500, 0.0)  # elements, and what draws of them may miss by
    pure, exact = lab.quantiles(count)
    for spacing in ["karras", *noise_scheduler.time_spacings]:
        if spacing == "leading":
            continue  # does not begin at the prior
        if spacing == "karras" and sampler.func is plms:
            continue  # not even
        errors = []
        for num_steps in (1, 8, 72):
            grid = noise_scheduler.grid(num_steps, spacing)
            x = prior(pure, grid)
            out = sampler(oracle.denoise, x, grid, noise=lambda i: lab.gaussian((count, 1), 100 + i))
            assert out.isfinite().all()
            errors.append((out.sort(0).values - exact).abs().mean().item())
        assert errors[-1] < max(errors[1] / 2, chance), (spacing, errors)
        if sampler.func is not plms:  # whose few steps are unstable from the largest sigma / alpha
            assert errors[1] < errors[0] * 3 / 4, (spacing, errors)
        assert errors[-1] < errors[0] / 3, (spacing, errors)
        assert errors[-1] < (0.16 if stochastic else 0.08), (spacing, errors)  # the spread itself is 1


def normal_denoise(x, row):
    """The exact denoiser of latents N(0.5, 0.3^2)."""
    gain = row.alpha * 0.09 / (row.alpha**2 * 0.09 + row.sigma**2)
    return 0.5 + gain * (x - row.alpha * 0.5)


@pytest.mark.parametrize("process", [VariancePreserving(), EDM(), RectifiedFlow()])
@pytest.mark.parametrize(
    "solve",
    [
        partial(ddim, eta=1.0),
        partial(dpmpp_2m, eta=1.0),
        partial(heun, s_churn=60.0),
    ],
    ids=["ddim", "dpmpp_2m", "heun"],
)
def test_fresh_noise_leaves_a_gaussian_its_variance(lab, process, solve):
    """Latents N(0.5, 0.3^2) with their exact denoiser: fresh noise must not shrink nor widen them."""
    grid = process.grid(300, "log_snr")
    x = prior(lab.gaussian((20_000,), 0), grid)
    asked = []

    def noise(i):
        asked.append(i)
        return lab.gaussian((20_000,), 1 + i)

    out = solve(normal_denoise, x, grid, noise=noise)
    assert len(asked) > 280
    assert out.mean().item() == pytest.approx(0.5, abs=0.01)
    assert out.std().item() == pytest.approx(0.3, rel=0.03)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("process", [VariancePreserving(), EDM(), RectifiedFlow()])
def test_dpmpp_2m_sde_is_of_second_order_between_its_noises(lab, process, eta):
    """With noise 0 it solves an equation of its own, which steps of half the size solve four times better."""
    denoise = lab.Oracle(process, lab.Mixture()).denoise
    grids = [lab.interior(process, num_steps) for num_steps in (32, 64, 128, 512)]
    x = start(lab, grids[0])
    outs = [dpmpp_2m(denoise, x, grid, noise=lambda i: 0.0, eta=eta) for grid in grids]
    errors = [(out - outs[-1]).abs().mean().item() for out in outs[:-1]]
    assert lab.order(errors) == pytest.approx(2, abs=0.25)
    ode = dpmpp_2m(denoise, x, grids[0], noise=lab.no_noise)
    assert (ode - outs[0]).abs().mean() > 0.01


def test_heun_with_churn_is_algorithm_2_of_the_paper(lab):
    edm, denoise = EDM(), lab.Mixture().clean
    grid = edm.grid(18, "karras")
    noise = [lab.gaussian((64, 1), i) for i in range(18)]
    options = {"s_churn": 12.0, "s_tmin": 0.1, "s_tmax": 50.0, "s_noise": 1.01}
    x = expected = prior(lab.gaussian((64, 1), 99), grid)
    churned = 0
    for i in range(18):
        t, ahead = grid[i].sigma, grid[i + 1].sigma
        gamma = min(12.0 / 18, math.sqrt(2) - 1) if 0.1 <= t <= 50.0 else 0.0
        churned += gamma > 0
        raised = t + gamma * t
        expected = expected + math.sqrt(raised**2 - t**2) * 1.01 * noise[i]
        slope = (expected - denoise(expected, GridRow(0, 1.0, raised))) / raised
        there = expected + (ahead - raised) * slope
        if ahead != 0:
            its = (there - denoise(there, GridRow(0, 1.0, ahead))) / ahead
            there = expected + (ahead - raised) * (slope + its) / 2
        expected = there
    actual = heun(denoise, x, grid, noise=noise.__getitem__, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert 5 < churned < 18


def test_churn_never_leaves_the_grid_and_tells_the_raised_time(lab, noise_scheduler):
    oracle, grid, rows = lab.Oracle(noise_scheduler, lab.Mixture()), noise_scheduler.grid(12, "karras"), []

    def denoise(x, row):
        rows.append(row)
        return oracle.denoise(x, row)

    x = prior(lab.gaussian((5, 1)), grid)
    out = heun(denoise, x, grid, noise=lambda i: lab.gaussian((5, 1), i), s_churn=1e3)
    assert out.isfinite().all()
    starts = rows[::2]
    assert starts[0] == grid[0]
    for before, row in zip(grid[1:], starts[1:], strict=False):
        top = grid[0].sigma / grid[0].alpha if grid[0].alpha > 0 else math.inf
        ratio = min(math.sqrt(2) * before.sigma / before.alpha, top)
        assert row.sigma / row.alpha == pytest.approx(ratio)
        assert row == pytest.approx(grid.row_of(ratio))


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
    grid, seen = noise_scheduler.grid(9, "log_snr"), []
    if refused(sampler, grid):
        return
    x = prior(lab.gaussian((5, 1)), grid)
    asked = []

    def noise(i):
        asked.append(i)
        return lab.gaussian((5, 1), i)

    out = sampler(
        oracle.denoise, x, grid, noise=noise, callback=lambda i, denoised: seen.append((i, denoised))
    )
    assert oracle.calls == {heun: 17, plms: 10}.get(sampler.func, 9)
    assert [i for i, _ in seen] == list(range(9))
    torch.testing.assert_close(seen[-1][1], out)  # the last step lands on its clean estimate
    options = sampler.keywords
    if options.get("s_churn"):
        levels = [row.sigma / row.alpha if row.alpha > 0 else math.inf for row in grid[:-1]]
        low, high = options["s_tmin"], options["s_tmax"]
        assert asked == [i for i, level in enumerate(levels) if i > 0 and low <= level <= high] != []
    else:  # none on the way to sigma = 0
        assert asked == (list(range(8)) if options.get("eta") else [])


def test_one_step_is_the_clean_estimate(lab, noise_scheduler):
    oracle = lab.Oracle(noise_scheduler, lab.Mixture())
    grid = noise_scheduler.grid(1, "log_snr")
    x = prior(lab.gaussian((5, 1)), grid)
    expected = oracle.denoise(x, grid[0])
    solvers = [ddim, heun, dpmpp_2m, partial(dpmpp_2m, eta=1.0), unipc, *[plms] * (grid[0].alpha > 0)]
    for solve in solvers:
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


@pytest.mark.parametrize(
    ("solve", "options", "message"),
    [
        (ddim, {"eta": 1.5}, "eta=1.5 is not within 0 and 1"),
        (dpmpp_2m, {"eta": -0.5}, "eta=-0.5 is not within 0 and 1"),
        (unipc, {"order": 4}, "order=4 is none of 1, 2, 3"),
        (heun, {"s_churn": -1.0}, "s_churn=-1.0 or s_noise=1.0 is below 0"),
        (plms, {}, "sampler=plms: needs an even grid, and has time steps from .* to .*; choose spacing="),
    ],
)
def test_nonsense_is_refused(lab, solve, options, message):
    with pytest.raises(ValueError, match=message):
        solve(lambda x, row: x, torch.ones(1), EDM().grid(4, "karras"), noise=lab.no_noise, **options)


def test_plms_takes_even_grids_alone(lab):
    vp = VariancePreserving(steps_offset=1)
    denoise = partial(Denoiser(lab.Smooth(), vp).at_row, conditioning=lab.NOTHING)
    x = lab.gaussian((1, 4, 2, 2))
    for spacing in ("uniform", "leading", "trailing", "log_snr"):
        for num_steps in (1, 2, 3, 7, 30):
            assert plms(denoise, x, vp.grid(num_steps, spacing), noise=lab.no_noise).isfinite().all()
    flow = truncate(RectifiedFlow().grid(10, "uniform"), 0.9)
    assert plms(lambda x, row: x, x, flow, noise=lab.no_noise).isfinite().all()
    for grid in (vp.grid(10, "karras"), truncate(RectifiedFlow(shift=3.0).grid(10, "uniform"), 0.9)):
        with pytest.raises(InputError, match="needs an even grid"):
            plms(denoise, x, grid, noise=lab.no_noise)


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
    if refused(sampler, grid):
        return
    with NoSync():
        out = sampler(denoise, prior(noise[4], grid), grid, noise=noise.__getitem__)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("weighting", [Simple(), MinSNR(), P2(), Debiased()])
def test_the_loss_never_asks_the_device(lab, noise_scheduler, weighting):
    denoiser = Denoiser(lab.Smooth(), noise_scheduler, weighting)
    latents, noise = lab.gaussian((2, 4, 3, 3), 1).float(), lab.gaussian((2, 4, 3, 3), 2).float()
    with NoSync():
        t = noise_scheduler.time_at(LogNormal()(noise_scheduler, torch.tensor([0.3, 0.8])))
        loss = denoiser.loss(latents, noise, t, lab.NOTHING)
        noise_scheduler.time_of(noise_scheduler.log_snr(t))
    assert loss.shape == (2,)
