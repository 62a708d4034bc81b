import math

import pytest
import torch

from ldm.diffusion.denoiser import (
    P2,
    Debiased,
    Denoiser,
    LogitNormal,
    LogNormal,
    MinSNR,
    Simple,
    Uniform,
    Unweighted,
)
from ldm.diffusion.noise_scheduler import EDM, RectifiedFlow, VariancePreserving
from ldm.types import GridRow


def inputs(lab, noise_scheduler, batch=6):
    latents, noise = lab.gaussian((batch, 4, 3, 5), 1), lab.gaussian((batch, 4, 3, 5), 2)
    t = noise_scheduler.time_at((torch.arange(batch, dtype=torch.float64) + 0.5) / batch)
    return latents, noise, t


class Recorder:
    """A backbone that notes what it is told and answers a fixed tensor."""

    in_channels = out_channels = 4

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, x, time, conditioning):
        self.x, self.time, self.conditioning = x, time, conditioning
        return self.answer


def test_the_right_output_gives_the_latents_and_no_loss(lab, noise_scheduler):
    latents, noise, t = inputs(lab, noise_scheduler)
    alpha, sigma, a, b = (
        c.view(-1, 1, 1, 1)
        for c in (noise_scheduler.alpha(t), noise_scheduler.sigma(t), *noise_scheduler.coefficients(t))
    )
    backbone = Recorder(a * latents + b * noise)
    denoiser = Denoiser(backbone, noise_scheduler, Unweighted())
    noisy = alpha * latents + sigma * noise
    torch.testing.assert_close(denoiser(noisy, t, lab.NOTHING), latents, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(backbone.x, noisy * noise_scheduler.input_scale(t).view(-1, 1, 1, 1))
    torch.testing.assert_close(backbone.time, noise_scheduler.model_time(t))
    assert backbone.conditioning is lab.NOTHING
    loss = denoiser.loss(latents, noise, t, lab.NOTHING)
    assert loss.shape == (6,)
    assert loss.abs().max() < 1e-20


def test_loss_is_the_weighted_mean_square_in_output_space(lab, noise_scheduler):
    latents, noise, t = inputs(lab, noise_scheduler)
    denoiser = Denoiser(lab.Smooth(), noise_scheduler, Simple())
    errors = denoiser.errors(latents, noise, t, lab.NOTHING)
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in (noise_scheduler.alpha(t), noise_scheduler.sigma(t)))
    a, b = (c.view(-1, 1, 1, 1) for c in noise_scheduler.coefficients(t))
    scale, time = noise_scheduler.input_scale(t).view(-1, 1, 1, 1), noise_scheduler.model_time(t)
    output = lab.Smooth()(scale * (alpha * latents + sigma * noise), time, lab.NOTHING)
    expected = ((output - a * latents - b * noise) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(errors, expected)
    weighted = denoiser.loss(latents, noise, t, lab.NOTHING)
    torch.testing.assert_close(weighted, denoiser.weight(t) * expected)


def test_at_row_is_the_call_at_that_time(lab, noise_scheduler):
    """Floats of a row and tensors of times are one computation; indices of a table are told alike."""
    denoiser = Denoiser(lab.Smooth(), noise_scheduler)
    x = lab.gaussian((3, 4, 2, 2))
    for row in noise_scheduler.grid(7, "uniform")[:-1]:
        if row.alpha > 0:
            t = noise_scheduler.time_of(
                torch.full((3,), row.alpha / row.sigma, dtype=torch.float64).log() * 2
            )
            torch.testing.assert_close(
                denoiser.at_row(x, row, lab.NOTHING), denoiser(x, t, lab.NOTHING), rtol=1e-7, atol=1e-7
            )


def test_gradients_reach_the_backbone(lab):
    backbone = torch.nn.Conv2d(4, 4, 1)
    denoiser = Denoiser(lambda x, time, conditioning: backbone(x), RectifiedFlow())
    latents, noise, t = (value.float() for value in inputs(lab, RectifiedFlow()))
    denoiser.loss(latents, noise, t, lab.NOTHING).mean().backward()
    assert backbone.weight.grad.abs().sum() > 0


def test_a_backbone_in_half_precision_leaves_float32_arithmetic(lab):
    denoiser = Denoiser(lambda x, time, conditioning: x.bfloat16(), VariancePreserving())
    x = lab.gaussian((2, 4, 2, 2)).float()
    assert denoiser.at_row(x, GridRow(500.0, 0.6, 0.8), lab.NOTHING).dtype == torch.float32
    t = torch.tensor([10.0, 900.0])
    assert denoiser.loss(x, x, t, lab.NOTHING).dtype == torch.float32


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_published_weight(prediction_type, gamma):
    """2303.09556: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v, and itself for the clean sample."""
    vp = VariancePreserving(prediction_type=prediction_type)
    t = torch.arange(1000, dtype=torch.float64)
    snr = (vp.alpha(t) / vp.sigma(t)) ** 2
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
    expected = snr.clamp(max=gamma) / divisor
    torch.testing.assert_close(MinSNR(gamma, floor=0.0)(vp, t), expected, rtol=1e-10, atol=0)
    floored = MinSNR(gamma)(vp, t)
    torch.testing.assert_close(
        floored, torch.where(snr < 1, expected.clamp(min=0.01), expected), rtol=1e-10, atol=0
    )
    if prediction_type == "epsilon":
        torch.testing.assert_close(floored, expected, rtol=1e-10, atol=0)


def test_min_snr_keeps_a_floor_at_zero_terminal_snr():
    vp = VariancePreserving(zero_terminal_snr=True, prediction_type="v_prediction")
    last = torch.tensor([999.0])
    assert MinSNR(floor=0.0)(vp, last).item() == 0
    assert MinSNR(floor=0.05)(vp, last).item() == pytest.approx(0.05)


def test_simple_is_the_noise_error_and_unweighted_is_one(noise_scheduler):
    t = noise_scheduler.time_at((torch.arange(9, dtype=torch.float64) + 0.5) / 9)
    alpha, m = (
        noise_scheduler.alpha(t),
        noise_scheduler.determinant(noise_scheduler.alpha(t), noise_scheduler.sigma(t)),
    )
    torch.testing.assert_close(Simple()(noise_scheduler, t), (alpha / m) ** 2)
    assert Unweighted()(noise_scheduler, t).tolist() == [1] * 9
    if noise_scheduler.prediction_type == "epsilon":
        torch.testing.assert_close(Simple()(noise_scheduler, t), torch.ones_like(t))


def table_of_weights(case, alpha, sigma):
    """w_F of every weighting, derived by hand; SNR = r^2, r = alpha / sigma; gamma 5, k 1, no floor."""
    r = alpha / sigma
    capped, p2 = (r**2).clamp(max=5), 1 / (1 + r**2)
    one = torch.ones_like(alpha)
    if case == "epsilon":  # F = noise; an error e of it is one of -e / r of the clean estimate
        return {"Simple": one, "MinSNR": capped / r**2, "P2": p2, "Debiased": 1 / r}
    if case == "v_prediction":  # clean = alpha x - sigma F, noise = sigma x + alpha F
        clean, noise = sigma**2, alpha**2
    elif case == "flow":  # alpha = 1 - t, sigma = t: clean = x - t F, noise = x + (1 - t) F
        clean, noise = sigma**2, (1 - sigma) ** 2
    else:  # of a velocity on the circle: clean = (x - sigma F) / (alpha + sigma), noise = (x + alpha F) / ..
        clean, noise = sigma**2 / (alpha + sigma) ** 2, alpha**2 / (alpha + sigma) ** 2
    return {"Simple": noise, "MinSNR": capped * clean, "P2": p2 * noise, "Debiased": noise / r}


@pytest.mark.parametrize(
    ("case", "process"),
    [
        ("epsilon", VariancePreserving()),
        ("v_prediction", VariancePreserving(prediction_type="v_prediction")),
        ("flow", RectifiedFlow()),
        ("flow on the circle", VariancePreserving(prediction_type="flow")),
    ],
)
def test_weightings_are_those_derived_by_hand(case, process):
    t = process.time_at((torch.arange(40, dtype=torch.float64) + 0.5) / 40)
    weightings = [Simple(), MinSNR(5.0, floor=0.0), P2(), Debiased()]
    actual = {type(weighting).__name__: weighting(process, t) for weighting in weightings}
    torch.testing.assert_close(
        actual, table_of_weights(case, process.alpha(t), process.sigma(t)), rtol=1e-9, atol=0
    )
    if case == "flow":  # in t alone
        torch.testing.assert_close(actual["P2"], (t * (1 - t)) ** 2 / (t**2 + (1 - t) ** 2))
        torch.testing.assert_close(actual["Debiased"], t * (1 - t))
        torch.testing.assert_close(
            actual["MinSNR"], torch.where(1 - t < 5**0.5 * t, (1 - t) ** 2, 5 * t**2), rtol=1e-9, atol=0
        )


def test_p2_follows_its_two_constants():
    vp = VariancePreserving()
    t = torch.arange(0, 1000, 50, dtype=torch.float64)
    snr = (vp.alpha(t) / vp.sigma(t)) ** 2
    torch.testing.assert_close(P2(gamma=0.5, k=3.0)(vp, t), 1 / (3 + snr).sqrt())
    torch.testing.assert_close(P2(gamma=0.0)(vp, t), Simple()(vp, t))


def test_weights_are_finite_everywhere_and_min_snr_above_0(noise_scheduler):
    ends = torch.tensor([2.0**-24, 0.3, 0.9, 1 - 2.0**-24])
    for t in (noise_scheduler.time_at(ends), noise_scheduler.time_at(ends.double())):
        for weighting in (Simple(), Unweighted(), MinSNR(), P2(), Debiased()):
            weight = weighting(noise_scheduler, t)
            assert weight.isfinite().all()
            assert (weight > 0).all() or (noise_scheduler.first.alpha == 0 and (weight[:-1] > 0).all())
        assert (MinSNR()(noise_scheduler, t) > 0).all()


def test_unweighted_edm_is_the_weight_of_the_paper():
    """w_clean = (sigma^2 + sd^2) / (sigma sd)^2, in output space 1."""
    edm = EDM(sigma_data=0.5)
    t = edm.time_at(torch.linspace(0.01, 0.99, 20, dtype=torch.float64))
    sigma = edm.sigma(t)
    published = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    torch.testing.assert_close(published * edm.weight_of_clean(t), Unweighted()(edm, t))


def test_logit_normal_times_have_normal_logits():
    u = (torch.arange(100_001, dtype=torch.float64) + 0.5) / 100_001
    position = LogitNormal(mean=0.5, std=1.5)(RectifiedFlow(), u)
    logit = torch.logit(position)
    assert logit.mean().item() == pytest.approx(0.5, abs=1e-4)
    assert logit.std().item() == pytest.approx(1.5, rel=1e-3)
    assert (position.diff() > 0).all()
    torch.testing.assert_close(Uniform()(RectifiedFlow(), u), u)


def test_log_normal_times_have_normal_levels_on_every_process(noise_scheduler):
    u = (torch.arange(10_001, dtype=torch.float64) + 0.5) / 10_001
    t = noise_scheduler.time_at(LogNormal()(noise_scheduler, u))
    level = noise_scheduler.log_snr(t) / -2
    expected = -1.2 + math.log(2) + 1.2 * torch.special.ndtri(u)
    if isinstance(noise_scheduler, VariancePreserving):  # the nearest index of those there are
        assert (t == t.round()).all()
        exact = noise_scheduler.time_of(-2 * expected)
        assert (t - exact).abs().max() <= 0.5 + 1e-9
        assert level.median().item() == pytest.approx(-1.2 + math.log(2), abs=0.01)
    else:
        torch.testing.assert_close(level, expected, rtol=1e-9, atol=1e-9)
    other = noise_scheduler.time_at(LogNormal(mean=1.0, std=0.01)(noise_scheduler, u))
    assert noise_scheduler.sigma(other).div(noise_scheduler.alpha(other)).log().mean() == pytest.approx(
        1.0, abs=0.01
    )


def test_logit_normal_times_stay_inside():
    position = LogitNormal()(RectifiedFlow(), torch.tensor([2.0**-24, 1 - 2.0**-24]))
    assert 0 < position[0] < position[1] < 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: MinSNR(gamma=0),
        lambda: MinSNR(floor=-1),
        lambda: P2(gamma=-1),
        lambda: P2(k=0),
        lambda: LogitNormal(std=0),
        lambda: LogNormal(std=0),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(ValueError, match="is not above 0"):
        make()
