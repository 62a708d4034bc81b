from functools import partial

import pytest
import torch

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.inpainting import keep_known
from ldm.diffusion.noise_scheduler import EDM, RectifiedFlow, VariancePreserving
from ldm.diffusion.samplers import plms, prior, truncate

SHAPE = (2, 4, 6, 6)


def is_stochastic(sampler):
    return sampler.keywords.get("eta", 0) > 0 or sampler.keywords.get("s_churn", 0) > 0


def left_half_kept(batch=1):
    mask = torch.zeros(batch, 1, *SHAPE[2:], dtype=torch.float64)
    mask[..., 3:] = 1
    return mask


class Watched:
    """A network's clean estimate that notes the states and rows it is asked at."""

    def __init__(self, lab, process):
        self.denoiser, self.nothing, self.seen = Denoiser(lab.Smooth(), process), lab.NOTHING, []

    def __call__(self, x, row):
        self.seen.append((x, row))
        return self.denoiser.at_row(x, row, self.nothing)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_what_is_known_stays_at_its_level_and_ends_as_given(lab, noise_scheduler, sampler, strength):
    grid = truncate(noise_scheduler.grid(10, "log_snr"), strength)
    if sampler.func is plms and grid[0].alpha == 0:
        return
    latents, mask = lab.gaussian(SHAPE, 1), left_half_kept()
    watched, plain = Watched(lab, noise_scheduler), Watched(lab, noise_scheduler)
    noise = lab.gaussian(SHAPE, 2)
    x = prior(noise, grid, (1 - mask) * latents)
    fresh = [lab.gaussian(SHAPE, 10 + i) for i in range(10)]
    out = sampler(keep_known(watched, latents, mask), x, grid, noise=fresh.__getitem__)
    freely = sampler(plain, x, grid, noise=fresh.__getitem__)
    assert len(watched.seen) == len(plain.seen), "no further call"
    kept = (mask == 0).expand(SHAPE)
    torch.testing.assert_close(out[kept], latents[kept], rtol=1e-9, atol=1e-9)
    assert (freely - latents)[kept].abs().mean() > 0.1
    assert (out - latents)[~kept].abs().mean() > 0.1
    for state, row in watched.seen:
        implied = ((state - row.alpha * latents) / row.sigma)[kept]
        if is_stochastic(sampler):  # its law is the subject of the next test
            assert 0.6 < implied.std() < 1.5
        else:
            torch.testing.assert_close(implied, noise[kept], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("process", [VariancePreserving(), EDM(), RectifiedFlow()])
def test_fresh_noise_keeps_the_law_of_what_is_known(lab, process, sampler):
    """Normal noise of unit variance around alpha * latents at every row, independent of the latents."""
    if not is_stochastic(sampler):
        return
    count, grid, seen = 20_000, process.grid(20, "karras"), []
    latents = lab.gaussian((1, 1, 1, count), 1)

    def denoise(x, row):
        seen.append((x, row))
        return torch.zeros_like(x)

    x = prior(lab.gaussian(latents.shape, 2), grid, latents)
    kept = keep_known(denoise, latents, torch.zeros_like(latents))
    out = sampler(kept, x, grid, noise=lambda i: lab.gaussian(latents.shape, 3 + i))
    torch.testing.assert_close(out, latents)
    inflation = 0.02 if sampler.keywords.get("s_noise", 1.0) == 1.0 else 0.05
    for state, row in seen:
        implied = (state - row.alpha * latents) / row.sigma
        assert implied.std().item() == pytest.approx(1, abs=inflation)
        assert (implied * latents).mean().item() == pytest.approx(0, abs=0.03)


def test_what_is_drawn_heeds_what_is_known(lab, sampler):
    """Two elements of a normal law with correlation 0.9, its exact denoiser: the drawn follows the kept."""
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)

    def denoise(x, row):  # [b 1 1 2]
        gain = (
            row.alpha
            * covariance
            @ torch.linalg.inv(row.alpha**2 * covariance + row.sigma**2 * torch.eye(2, dtype=torch.float64))
        )
        return x @ gain.T

    process, count = EDM(), 4000
    grid = process.grid(40, "log_snr")
    latents = torch.zeros(count, 1, 1, 2, dtype=torch.float64)
    latents[..., 0] = lab.gaussian((count, 1, 1), 1)
    mask = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(1, 1, 1, 2)
    x = prior(lab.gaussian(latents.shape, 2), grid, (1 - mask) * latents)
    kept = keep_known(denoise, latents, mask)
    out = sampler(kept, x, grid, noise=lambda i: lab.gaussian(latents.shape, 3 + i))
    known, drawn = out[..., 0].flatten(), out[..., 1].flatten()
    correlation = torch.corrcoef(torch.stack([known, drawn]))[0, 1].item()
    # 0.9 is the law itself; a noise that never changes shows less of what is known
    assert correlation > (0.7 if is_stochastic(sampler) else 0.5)


def test_masks_of_each_sample_and_between_0_and_1(lab):
    flow = RectifiedFlow()
    denoise = partial(Denoiser(lab.Smooth(), flow).at_row, conditioning=lab.NOTHING)
    row, x, latents = flow.grid(4, "uniform")[1], lab.gaussian(SHAPE, 1), lab.gaussian(SHAPE, 2)
    free = denoise(x, row)
    mask = torch.cat([torch.ones(1, 1, 6, 6), torch.full((1, 1, 6, 6), 0.25)]).double()
    out = keep_known(denoise, latents, mask)(x, row)
    torch.testing.assert_close(out[0], free[0])
    torch.testing.assert_close(out[1], 0.25 * free[1] + 0.75 * latents[1])


@pytest.mark.parametrize("shape", [(2, 4, 6, 6), (1, 1, 3, 6), (3, 1, 6, 6)])
def test_masks_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"mask \[.*\] does not fit latents \[2, 4, 6, 6\]"):
        keep_known(lambda x, row: x, torch.zeros(SHAPE), torch.zeros(shape))
