"""diffusers is an oracle here and nowhere else: the same network, grid and noise must give its numbers."""

from functools import partial

import diffusers
import numpy as np
import pytest
import torch

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.noise_scheduler import VariancePreserving
from ldm.diffusion.samplers import ddim, dpmpp_2m, heun, plms, unipc
from ldm.types import GridRow

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # theirs, under numpy 2

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SHAPE = (2, 4, 3, 3)
PREDICTIONS = ["epsilon", "v_prediction"]
SPACINGS = {"uniform": "linspace", "leading": "leading", "trailing": "trailing"}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, SD),
        (
            {"schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
            SD | {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        ),
        ({"schedule": "cosine"}, {"beta_schedule": "squaredcos_cap_v2"}),
        ({"zero_terminal_snr": True}, SD | {"rescale_betas_zero_snr": True}),
    ],
)
def test_tables(ours, theirs):
    process = VariancePreserving(**ours, prediction_type="v_prediction")
    expected = diffusers.DDIMScheduler(**theirs).alphas_cumprod.double()
    alpha_bar = process.alpha(torch.arange(1000, dtype=torch.float64)) ** 2
    torch.testing.assert_close(alpha_bar, expected, rtol=2e-3, atol=2e-7)  # theirs is a float32 product
    assert (alpha_bar / expected - 1)[:900].abs().max() < 1e-4
    if "rescale_betas_zero_snr" in theirs:
        assert alpha_bar[-1] == expected[-1] == 0


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_time_grids_have_their_indices(spacing, offset):
    process = VariancePreserving(steps_offset=offset)
    peer = diffusers.DDIMScheduler(**SD, timestep_spacing=SPACINGS[spacing], steps_offset=offset)
    for num_steps in [*range(2, 61), 111, 250, 333, 500, 1000]:
        peer.set_timesteps(num_steps)
        expected = peer.timesteps.tolist()
        told = [int(row.model_time) for row in process.grid(num_steps, spacing)[:-1]]
        if spacing == "leading" and num_steps == 1000:
            expected = list(range(999, -1, -1))  # theirs leaves its table with offset 1
        if len(expected) > num_steps:  # their arange of floats may overrun
            expected = expected[:num_steps]
        for i, (ours, theirs) in enumerate(zip(told, expected, strict=True)):
            # trailing may fall on a half, which an error of 1e-13 sends either way
            tie = spacing == "trailing" and (2 * i * 1000) % num_steps == 0
            assert abs(ours - theirs) <= tie, (num_steps, i)


def test_karras_grids_have_their_levels():
    peer = diffusers.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True)
    for num_steps in (2, 9, 30):
        peer.set_timesteps(num_steps)
        grid = VariancePreserving().grid(num_steps, "karras")
        np.testing.assert_allclose([row.sigma / row.alpha for row in grid[:-1]], peer.sigmas[:-1], rtol=1e-4)
        assert np.abs(np.array([row.model_time for row in grid[:-1]]) - peer.timesteps.numpy()).max() <= 1


def run_peer(peer, lab, x, num_steps, **options):
    """Their loop; a network sees one float time a sample and the scaled state."""
    peer.set_timesteps(num_steps)
    for t in peer.timesteps:
        time = torch.full((len(x),), float(t), dtype=torch.float64)
        output = lab.Smooth()(peer.scale_model_input(x, t), time, lab.NOTHING)
        x = peer.step(output, t, x, **options).prev_sample
    return x


def drawn(seed, num_steps, dtype=torch.float64):
    """The numbers that a diffusers step draws from a generator, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=dtype).double() for _ in range(num_steps)]


def ours(lab, process, grid, solve, x, noise):
    denoise = partial(Denoiser(lab.Smooth(), process).at_row, conditioning=lab.NOTHING)
    return solve(denoise, x, grid, noise=noise)


def ours_in_ratio(lab, process, grid, solve, x, noise):
    denoise = partial(Denoiser(lab.Smooth(), process).at_row, conditioning=lab.NOTHING)
    return solve(lab.in_ratio_denoise(denoise, grid), x, lab.in_ratio(grid), noise=noise)


def assert_agree(actual, expected):
    assert expected.abs().max() > 0.1
    scale = expected.abs().max().clamp(min=1)
    assert ((actual - expected).abs().max() / scale).item() <= 1e-4


@pytest.mark.parametrize("prediction_type", [*PREDICTIONS, "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim(lab, prediction_type, spacing, eta):
    peer = diffusers.DDIMScheduler(
        **SD, prediction_type=prediction_type, timestep_spacing=spacing, clip_sample=False
    )
    process = VariancePreserving(prediction_type=prediction_type)
    x = lab.gaussian(SHAPE, 1)
    expected = run_peer(peer, lab, x, 20, eta=eta, generator=torch.Generator().manual_seed(5))
    noise = drawn(5, 20).__getitem__
    assert_agree(ours(lab, process, process.grid(20, spacing), partial(ddim, eta=eta), x, noise), expected)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_from_zero_terminal_snr(lab, eta):
    peer = diffusers.DDIMScheduler(
        **SD,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
    )
    process = VariancePreserving(zero_terminal_snr=True, prediction_type="v_prediction")
    x = lab.gaussian(SHAPE, 1)
    expected = run_peer(peer, lab, x, 10, eta=eta, generator=torch.Generator().manual_seed(5))
    noise = drawn(5, 10).__getitem__
    assert_agree(ours(lab, process, process.grid(10, "trailing"), partial(ddim, eta=eta), x, noise), expected)


@pytest.mark.parametrize("prediction_type", [*PREDICTIONS, "sample"])
def test_ddpm(lab, prediction_type):
    peer = diffusers.DDPMScheduler(**SD, prediction_type=prediction_type, clip_sample=False)
    process = VariancePreserving(prediction_type=prediction_type)
    x = lab.gaussian(SHAPE, 1)
    expected = run_peer(peer, lab, x, 25, generator=torch.Generator().manual_seed(6))
    noise = drawn(6, 25).__getitem__
    assert_agree(ours(lab, process, process.grid(25, "leading"), partial(ddim, eta=1.0), x, noise), expected)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(
    ("name", "solve", "options"),
    [
        ("EulerDiscreteScheduler", ddim, {}),
        ("EulerAncestralDiscreteScheduler", partial(ddim, eta=1.0), {"generator": 7}),
        ("HeunDiscreteScheduler", heun, {}),
    ],
)
def test_samplers_in_sigma_over_alpha(lab, prediction_type, name, solve, options):
    peer = getattr(diffusers, name)(**SD, prediction_type=prediction_type, timestep_spacing="trailing")
    process = VariancePreserving(prediction_type=prediction_type)
    grid = process.grid(20, "trailing")
    x = lab.gaussian(SHAPE, 1) * lab.in_ratio(grid)[0].sigma
    noise = drawn(7, 20).__getitem__ if options else lab.no_noise
    options = {key: torch.Generator().manual_seed(seed) for key, seed in options.items()}
    expected = run_peer(peer, lab, x, 20, **options)
    assert_agree(ours_in_ratio(lab, process, grid, solve, x, noise), expected)


@pytest.mark.parametrize("num_steps", [3, 20])
@pytest.mark.parametrize("prediction_type", [*PREDICTIONS, "sample"])
def test_dpmpp_2m(lab, prediction_type, num_steps):
    peer = diffusers.DPMSolverMultistepScheduler(
        **SD, prediction_type=prediction_type, timestep_spacing="trailing"
    )
    assert peer.config.algorithm_type == "dpmsolver++"
    process = VariancePreserving(prediction_type=prediction_type)
    x = lab.gaussian(SHAPE, 1)
    expected = run_peer(peer, lab, x, num_steps)
    assert_agree(ours(lab, process, process.grid(num_steps, "trailing"), dpmpp_2m, x, lab.no_noise), expected)


@pytest.mark.parametrize("num_steps", [3, 20])
@pytest.mark.parametrize("prediction_type", [*PREDICTIONS, "sample"])
def test_dpmpp_2m_sde(lab, prediction_type, num_steps):
    peer = diffusers.DPMSolverMultistepScheduler(
        **SD,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        algorithm_type="sde-dpmsolver++",
    )
    process = VariancePreserving(prediction_type=prediction_type)
    x = lab.gaussian(SHAPE, 1)
    expected = run_peer(peer, lab, x, num_steps, generator=torch.Generator().manual_seed(8))
    noise = drawn(8, num_steps, torch.float32).__getitem__
    grid, solve = process.grid(num_steps, "trailing"), partial(dpmpp_2m, eta=1.0)
    assert_agree(ours(lab, process, grid, solve, x, noise), expected)


@pytest.mark.parametrize("num_steps", [3, 20])
@pytest.mark.parametrize("prediction_type", [*PREDICTIONS, "sample"])
def test_unipc(lab, prediction_type, num_steps):
    peer = diffusers.UniPCMultistepScheduler(
        **SD, prediction_type=prediction_type, timestep_spacing="trailing"
    )
    assert (peer.config.solver_order, peer.config.solver_type) == (2, "bh2")
    process = VariancePreserving(prediction_type=prediction_type)
    x = lab.gaussian(SHAPE, 1)
    expected = run_peer(peer, lab, x, num_steps)
    assert_agree(ours(lab, process, process.grid(num_steps, "trailing"), unipc, x, lab.no_noise), expected)


@pytest.mark.parametrize("order", [1, 3])
def test_unipc_of_other_orders(lab, order):
    """Down to the table's first index, for theirs lowers the order before sigma = 0 and ours does not."""
    peer = diffusers.UniPCMultistepScheduler(
        **SD,
        timestep_spacing="trailing",
        solver_order=order,
        lower_order_final=False,
        final_sigmas_type="sigma_min",
    )
    process = VariancePreserving()
    t = torch.zeros(1, dtype=torch.float64)
    end = GridRow(0.0, process.alpha(t).item(), process.sigma(t).item())
    grid = [*process.grid(20, "trailing")[:-1], end]
    x = lab.gaussian(SHAPE, 1)
    expected = run_peer(peer, lab, x, 20)
    assert_agree(ours(lab, process, grid, partial(unipc, order=order), x, lab.no_noise), expected)


@pytest.mark.parametrize("num_steps", [2, 4, 20])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_plms(lab, spacing, num_steps):
    peer = diffusers.PNDMScheduler(**SD, skip_prk_steps=True, set_alpha_to_one=True, timestep_spacing=spacing)
    process = VariancePreserving()
    x = lab.gaussian(SHAPE, 1)
    expected = run_peer(peer, lab, x, num_steps)
    assert_agree(ours(lab, process, process.grid(num_steps, spacing), plms, x, lab.no_noise), expected)
