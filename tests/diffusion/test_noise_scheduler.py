import math

import pytest
import torch

from ldm.diffusion.noise_scheduler import EDM, RectifiedFlow, VariancePreserving
from ldm.diffusion.process import PREDICTIONS

SPACINGS = ["uniform", "leading", "trailing", "karras", "log_snr"]


def times(process, count=64):
    """Times all over the process, whole and broken indices alike."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    t = process.time_at(u)
    return torch.cat([t, (t[1:] + t[:-1]) / 2])


def rows_of(process, num_steps=20):
    return [
        row for spacing in SPACINGS if allows(process, spacing) for row in process.grid(num_steps, spacing)
    ]


def allows(process, spacing):
    return spacing in ("karras", "log_snr", *process.time_spacings)


def test_every_yaml_builds_a_process_that_agrees_with_its_equation(noise_scheduler):
    t = times(noise_scheduler)
    alpha, sigma = noise_scheduler.alpha(t), noise_scheduler.sigma(t)
    law = {
        VariancePreserving: alpha**2 + sigma**2,
        EDM: alpha,
        RectifiedFlow: alpha + sigma,
    }[type(noise_scheduler)]
    torch.testing.assert_close(law, torch.ones_like(law), rtol=1e-14, atol=0)
    noisier = noise_scheduler.log_snr(t.sort().values).diff()
    assert (noisier <= 0).all()
    assert (noisier < 0).float().mean() > 0.95


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_prediction_identities(process, prediction_type):
    """F = a latents + b noise and x_t give latents and noise back, for tensors and for the floats of rows."""
    arguments = {"prediction_type": prediction_type}
    if isinstance(process, EDM):
        arguments |= {"sigma_data": process.sigma_data, "sigma_max": process.most}
    elif isinstance(process, RectifiedFlow):
        arguments |= {"shift": process.shift}
    else:
        arguments |= {
            name: getattr(process, name)
            for name in ("num_train_timesteps", "schedule", "beta_start", "beta_end", "zero_terminal_snr")
        }
    if prediction_type == "epsilon" and process.first.alpha == 0:
        with pytest.raises(ValueError, match="prediction_type=epsilon .* alpha=0.0"):
            type(process)(**arguments)
        return
    chosen = type(process)(**arguments)
    generator = torch.Generator().manual_seed(1)
    t = times(chosen)
    shape = (len(t), 3)
    latents, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = (c[:, None] for c in chosen.coefficients(t))
    alpha, sigma = chosen.alpha(t)[:, None], chosen.sigma(t)[:, None]
    check_identities(chosen, latents, noise, a, b, alpha, sigma)
    for row in rows_of(chosen):
        if row.sigma > 0:
            a, b = chosen.pair(row.alpha, row.sigma)
            check_identities(chosen, latents, noise, a, b, row.alpha, row.sigma)


def check_identities(process, latents, noise, a, b, alpha, sigma):
    x, output = alpha * latents + sigma * noise, a * latents + b * noise
    m = process.determinant(alpha, sigma)
    # rounding grows where the pair hardly tells latents from noise
    bound = 1e-13 * ((abs(a) + abs(b) + 1) * (alpha + sigma + 1) / abs(m))
    assert ((process.clean_from_output(x, output, alpha, sigma) - latents).abs() <= bound * 10).all()
    assert ((process.noise_from_output(x, output, alpha, sigma) - noise).abs() <= bound * 10).all()
    back = process.output_from_clean(x, latents, alpha, sigma)
    assert ((back - output).abs() <= 1e-12 * (1 + (abs(b) + abs(m)) * (alpha + 1) / sigma)).all()


def test_pairs_are_the_published_ones():
    alpha, sigma = 0.6, 0.8
    at = {name: pair(alpha, sigma, 0.5) for name, pair in PREDICTIONS.items()}
    assert at["epsilon"] == (0, 1)
    assert at["sample"] == (1, 0)
    assert at["flow"] == (-1, 1)
    assert at["v_prediction"] == pytest.approx((-0.8, 0.6))
    sigma, sd = 3.0, 0.5
    root = math.sqrt(sigma**2 + sd**2)
    assert PREDICTIONS["edm"](1.0, sigma, sd) == pytest.approx((sigma / sd / root, -sd / root))


@pytest.mark.parametrize("sigma", [0.01, 0.7, 40.0])
def test_edm_preconditioning_is_table_1_of_the_paper(sigma):
    """c_skip, c_out, c_in and c_noise, up to the sign of F that house.md's pair fixes."""
    edm = EDM(sigma_data=0.5)
    t = torch.tensor([math.log(sigma)], dtype=torch.float64)
    x, output = torch.full((1, 1), 1.7, dtype=torch.float64), torch.full((1, 1), -0.4, dtype=torch.float64)
    skip, out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / math.sqrt(sigma**2 + 0.25)
    clean = edm.clean_from_output(x, output, 1.0, sigma)
    torch.testing.assert_close(clean, skip * x + out * output)
    assert edm.input_scale(t).item() == pytest.approx(1 / math.sqrt(sigma**2 + 0.25))
    assert edm.model_time(t).item() == pytest.approx(math.log(sigma) / 4)


def test_edm_pair_is_uncorrelated_with_the_noisy_latents_on_every_process(process):
    """With latents of standard deviation sd: cov(F, x_t) = a alpha sd^2 + b sigma = 0, var F = 1."""
    chosen = process if isinstance(process, EDM) else None
    sd = chosen.sigma_data if chosen else 1.0
    for row in rows_of(process):
        a, b = PREDICTIONS["edm"](row.alpha, row.sigma, sd)
        assert a * row.alpha * sd**2 + b * row.sigma == pytest.approx(0, abs=1e-12)
        assert a**2 * sd**2 + b**2 == pytest.approx(1)


def test_the_three_weight_spaces_agree(process):
    """An error e of F is an error sigma/m e of the clean estimate and alpha/m e of the noise estimate."""
    t = times(process)
    t = t[process.alpha(t) > 0]
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    generator = torch.Generator().manual_seed(2)
    x, output, error = (torch.randn(len(t), 5, generator=generator, dtype=torch.float64) for _ in range(3))
    of_clean = process.clean_from_output(x, output + error, alpha, sigma) - process.clean_from_output(
        x, output, alpha, sigma
    )
    of_noise = process.noise_from_output(x, output + error, alpha, sigma) - process.noise_from_output(
        x, output, alpha, sigma
    )
    squared = error.square().mean(1)
    torch.testing.assert_close(
        process.weight_of_clean(t) * squared, of_clean.square().mean(1), rtol=1e-6, atol=1e-9
    )
    torch.testing.assert_close(
        process.weight_of_noise(t) * squared, of_noise.square().mean(1), rtol=1e-6, atol=1e-9
    )
    snr = process.log_snr(t).exp()
    torch.testing.assert_close(process.weight_of_noise(t), snr * process.weight_of_clean(t))


def test_time_of_inverts_log_snr(process):
    t = times(process)
    t = t[process.alpha(t) > 0]
    torch.testing.assert_close(process.time_of(process.log_snr(t)), t, rtol=1e-9, atol=1e-9)


def test_position_of_inverts_time_at(process):
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    t = process.time_at(u)
    position = process.position_of(t)
    if isinstance(process, VariancePreserving):
        assert (position - u).abs().max() <= 0.5 / process.num_train_timesteps
        torch.testing.assert_close(process.time_at(process.position_of(t + 0.3)), t)
    else:
        torch.testing.assert_close(position, u, rtol=1e-12, atol=1e-12)


def test_a_grid_makes_rows_of_any_level(noise_scheduler):
    grid = noise_scheduler.grid(6, "log_snr")
    for ratio in (0.05, 0.7, 9.0):
        row = grid.row_of(ratio)
        assert row.sigma / row.alpha == pytest.approx(ratio)
        t = noise_scheduler.time_of(torch.tensor(-2 * math.log(ratio), dtype=torch.float64))
        whole = isinstance(noise_scheduler, VariancePreserving)
        told = noise_scheduler.model_time(t).item()
        assert row.model_time == pytest.approx(round(told) if whole else told)


def test_time_of_beyond_the_table_is_its_end():
    vp = VariancePreserving(zero_terminal_snr=True, prediction_type="v_prediction")
    assert vp.time_of(torch.tensor([-math.inf, -60.0, 60.0])).tolist() == pytest.approx(
        [999, 999, 0], abs=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64])
def test_levels_are_float32_at_least(process, dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    t = torch.tensor([1, 2], dtype=dtype)
    for value in (process.alpha(t), process.sigma(t), process.input_scale(t), process.model_time(t)):
        assert value.dtype == expected
        assert value.shape == (2,)


def test_float32_levels_are_close_to_float64(process):
    t = times(process).float()
    for level in (process.alpha, process.sigma):
        torch.testing.assert_close(level(t).double(), level(t.double()), rtol=1e-5, atol=1e-6)


def test_time_at_covers_the_process_from_clean_to_noisy(process):
    u = torch.tensor([2.0**-24, 0.5, 1 - 2.0**-24])  # the ends of keyed_uniform
    t = process.time_at(u)
    sigma, alpha = process.sigma(t), process.alpha(t)
    assert t.diff().gt(0).all()
    ratio = sigma / alpha
    if isinstance(process, VariancePreserving):
        assert t.tolist() == [0, process.num_train_timesteps // 2, process.num_train_timesteps - 1]
    elif isinstance(process, EDM):
        assert ratio.tolist() == pytest.approx(
            [process.least, math.sqrt(process.least * process.most), process.most], rel=1e-4
        )
    else:
        assert ratio[1].item() == pytest.approx(process.shift, rel=1e-5)
        assert ratio[0] < process.least


def test_vp_times_are_whole_indices_equally_often():
    vp = VariancePreserving(num_train_timesteps=10)
    u = (torch.arange(1000) + 0.5) / 1000
    index, count = vp.time_at(u).unique(return_counts=True)
    assert index.tolist() == list(range(10))
    assert count.tolist() == [100] * 10


def test_vp_between_indices_is_between_and_smooth():
    vp = VariancePreserving()
    t = torch.linspace(0, 999, 99_901, dtype=torch.float64)
    log_snr = vp.log_snr(t)
    assert (log_snr.diff() < 0).all()
    midpoint = vp.log_snr(torch.arange(0.5, 999, dtype=torch.float64))
    average = (vp.log_snr(torch.arange(999)) + vp.log_snr(torch.arange(1, 1000))).double() / 2
    assert (midpoint - average).abs()[5:].max() < 2e-3  # like interpolating the log-SNR itself


def test_flow_shift_is_that_of_stable_diffusion_3():
    flow = RectifiedFlow(shift=3.0)
    u = torch.rand(100, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(flow.time_at(u), 3 * u / (1 + 2 * u))
    sigmas = [row.sigma for row in flow.grid(4, "uniform")]
    assert sigmas == pytest.approx([1, 3 * 0.75 / 2.5, 3 * 0.5 / 2, 3 * 0.25 / 1.5, 0])


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_num_steps_gives_that_many_steps(noise_scheduler, spacing):
    if not allows(noise_scheduler, spacing):
        with pytest.raises(ValueError, match=f"spacing={spacing} .*choose one of uniform"):
            noise_scheduler.grid(10, spacing)
        return
    for num_steps in range(1, 61):
        check_grid(noise_scheduler, noise_scheduler.grid(num_steps, spacing), num_steps)


@pytest.mark.parametrize("spacing", ["uniform", "leading", "trailing"])
def test_every_num_steps_up_to_the_table(spacing):
    vp = VariancePreserving(steps_offset=1)
    for num_steps in [*range(61, 1000, 7), 101, 111, 251, 333, 500, 501, 999, 1000]:
        check_grid(vp, vp.grid(num_steps, spacing), num_steps)
    with pytest.raises(ValueError, match="num_steps=1001 exceeds num_train_timesteps=1000"):
        vp.grid(1001, spacing)


def check_grid(noise_scheduler, grid, num_steps):
    assert len(grid) == num_steps + 1
    assert all(isinstance(value, float) for row in grid for value in row)
    assert all(math.isfinite(value) for row in grid for value in row)
    assert (grid[-1].alpha, grid[-1].sigma) == (1, 0)
    assert all(row.sigma > 0 and row.alpha >= 0 for row in grid[:-1])
    ratios = [row.alpha / row.sigma for row in grid[:-1]]
    assert ratios == sorted(set(ratios))  # strictly less noise at every step
    told = [row.model_time for row in grid]
    assert told == sorted(told, reverse=True)
    table = torch.tensor([row for row in grid[:-1] if row.alpha > 0], dtype=torch.float64).view(-1, 3)
    t = noise_scheduler.time_of(2 * (table[:, 1] / table[:, 2]).log())
    off = (noise_scheduler.model_time(t) - table[:, 0]).abs()
    # a table's index is told rounded; other times exactly
    assert (off <= (0.5 + 1e-6 if isinstance(noise_scheduler, VariancePreserving) else 1e-6)).all()


def test_grids_of_vp_tell_whole_indices_and_compute_with_exact_levels():
    vp = VariancePreserving()
    for row in vp.grid(17, "karras")[:-1]:
        assert row.model_time == int(row.model_time)
        assert row.alpha**2 + row.sigma**2 == pytest.approx(1, abs=1e-14)
    roots = [(row.sigma / row.alpha) ** (1 / 7) for row in vp.grid(17, "karras")[:-1]]
    assert torch.tensor(roots).diff().tolist() == pytest.approx([(roots[-1] - roots[0]) / 16] * 16, rel=1e-4)


def test_log_snr_grids_are_even(noise_scheduler):
    grid = [row for row in noise_scheduler.grid(12, "log_snr")[:-1] if row.alpha > 0]
    steps = torch.tensor([math.log(row.alpha / row.sigma) for row in grid], dtype=torch.float64).diff()
    torch.testing.assert_close(steps, steps.mean().expand(len(steps)), rtol=1e-9, atol=0)


def test_grids_begin_at_the_noisiest_level_and_honestly_at_alpha_0(noise_scheduler):
    for spacing in SPACINGS:
        if allows(noise_scheduler, spacing) and spacing != "leading":
            first = noise_scheduler.grid(20, spacing)[0]
            assert (first.alpha, first.sigma) == pytest.approx(noise_scheduler.first[1:], rel=1e-12)
    if isinstance(noise_scheduler, RectifiedFlow) or getattr(noise_scheduler, "zero_terminal_snr", False):
        assert noise_scheduler.first[1:] == (0, 1)


def test_stable_diffusion_constants():
    """../reference: alpha_bar_T = 0.0046601, sigma_max = 14.6146, sigma_min = 0.029167."""
    vp = VariancePreserving()
    assert vp.first.alpha**2 == pytest.approx(0.0046601, rel=1e-4)
    assert vp.most == pytest.approx(14.6146, rel=1e-5)
    assert vp.least == pytest.approx(0.029167, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VariancePreserving(schedule="square"), "schedule=square is none of linear"),
        (lambda: VariancePreserving(prediction_type="eps"), "prediction_type=eps is none of epsilon"),
        (lambda: VariancePreserving(num_train_timesteps=2), "num_train_timesteps=2 is below 3"),
        (lambda: VariancePreserving(beta_start=0.02, beta_end=0.01), "beta_start=0.02, beta_end=0.01"),
        (lambda: EDM(sigma_min=2.0, sigma_max=1.0), "sigma_min=2.0, sigma_max=1.0"),
        (lambda: RectifiedFlow(shift=0.0), "shift=0.0"),
        (lambda: RectifiedFlow(prediction_type="epsilon"), "prediction_type=epsilon .*RectifiedFlow begins"),
        (lambda: EDM().grid(0, "karras"), "num_steps=0 is below 1"),
    ],
)
def test_nonsense_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_tables_made_in_inference_mode_serve_training():
    vp = VariancePreserving()
    with torch.inference_mode():
        vp.alpha(torch.zeros(1))
    weight = torch.ones(1, requires_grad=True)
    (vp.alpha(torch.zeros(1)) * weight).sum().backward()
    assert weight.grad is not None
