"""Noise schedulers and samplers to scheduler_config.json and back, and what diffusers makes of it."""

from __future__ import annotations

import pytest
import torch

from ldm.checkpoints.foreign import schedulers
from ldm.config import build
from ldm.errors import InputError
from ldm.sampling.request import known_samplers

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # theirs, under numpy 2

VP = {"_target_": schedulers.VP, "num_train_timesteps": 1000, "steps_offset": 1}
SD = {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PROCESSES = {
    "sd": VP | SD | {"zero_terminal_snr": False, "prediction_type": "epsilon"},
    "v": VP | SD | {"zero_terminal_snr": False, "prediction_type": "v_prediction"},
    "sample": VP | SD | {"zero_terminal_snr": False, "prediction_type": "sample"},
    "zero terminal": VP | SD | {"zero_terminal_snr": True, "prediction_type": "v_prediction"},
    "linear": VP
    | {"schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    | {"zero_terminal_snr": False, "prediction_type": "epsilon"},
}
NAMES = {
    ("ddim", "trailing"): "DDIMScheduler",
    ("euler", "leading"): "DDIMScheduler",
    ("ddim", "karras"): "EulerDiscreteScheduler",
    ("euler", "log_snr"): "EulerDiscreteScheduler",
    ("ddpm", "trailing"): "DDPMScheduler",
    ("euler_ancestral", "leading"): "DDPMScheduler",
    ("heun", "trailing"): "HeunDiscreteScheduler",
    ("plms", "leading"): "PNDMScheduler",
    ("dpmpp_2m", "trailing"): "DPMSolverMultistepScheduler",
    ("dpmpp_2m", "karras"): "DPMSolverMultistepScheduler",
    ("dpmpp_2m_sde", "trailing"): "DPMSolverMultistepScheduler",
    ("unipc", "trailing"): "UniPCMultistepScheduler",
}


def opened(config):
    """Their scheduler of a config, which has no option that is not theirs."""
    kind = getattr(diffusers, config["_class_name"])
    found, unknown = kind.from_config(config, return_unused_kwargs=True)
    assert {name for name in unknown if not name.startswith("_")} == set()
    return found


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("sampler", "spacing"), NAMES)
def test_out_and_in_again(process, sampler, spacing):
    section = known_samplers()[sampler]
    config, notes = schedulers.written(PROCESSES[process], section, spacing)
    opened(config)
    again, its, spaced, _ = schedulers.read(config, "scheduler")
    assert again == PROCESSES[process]
    name = NAMES[sampler, spacing]
    if (process, name) in (
        ("zero terminal", "PNDMScheduler"),
        ("zero terminal", "HeunDiscreteScheduler"),
    ) or (
        process,
        name,
    ) == ("sample", "PNDMScheduler"):
        assert any("DDIMScheduler" in note for note in notes)
        assert config["_class_name"] == "DDIMScheduler"
        return
    assert (config["_class_name"], spaced, notes) == (name, spacing, [])
    assert its == {key: value for key, value in section.items() if not key.startswith("s_")}


@pytest.mark.parametrize("process", PROCESSES)
def test_theirs_has_our_table(process):
    config, _ = schedulers.written(PROCESSES[process], None, "trailing")
    theirs = opened(config).alphas_cumprod.double()
    ours = build(PROCESSES[process]).alpha(torch.arange(1000, dtype=torch.float64)) ** 2
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-7)


def test_cosine_tables():
    process = VP | {"schedule": "cosine", "prediction_type": "v_prediction", "zero_terminal_snr": False}
    config, _ = schedulers.written(process, None, "trailing")
    ours = build(process).alpha(torch.arange(1000, dtype=torch.float64)) ** 2
    torch.testing.assert_close(ours, opened(config).alphas_cumprod.double(), rtol=2e-3, atol=2e-7)
    assert schedulers.read(config, "scheduler")[0] == process


@pytest.mark.parametrize("spacing", ["leading", "trailing", "uniform"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "plms", "heun"])
def test_theirs_has_our_times(sampler, spacing):
    config, notes = schedulers.written(PROCESSES["sd"], known_samplers()[sampler], spacing)
    theirs = opened(config)
    theirs.set_timesteps(10)
    times = [round(float(t)) for t in dict.fromkeys(theirs.timesteps.tolist())]
    assert times == [int(row.model_time) for row in build(PROCESSES["sd"]).grid(10, spacing)[:-1]]
    assert notes == []


def test_defaults_are_those_of_each_class():
    for name, theirs in schedulers.KNOWN.items():
        if name in ("LMSDiscreteScheduler", "DPMSolverSDEScheduler") or theirs.sampler is None:
            continue  # some need packages that are not here
        default = getattr(diffusers, name)()
        process, _, spacing, _ = schedulers.read({"_class_name": name}, "scheduler")
        unusual = {"set_alpha_to_one", "skip_prk_steps", "clip_sample"} & default.config.keys()
        saved = {key: value for key, value in default.config.items() if key not in unusual}
        assert schedulers.read(saved | {"_class_name": name}, "scheduler")[3] == []  # its own defaults
        assert (process["beta_start"], process["beta_end"]) == (
            default.config.beta_start,
            default.config.beta_end,
        )
        assert schedulers.SPACINGS[default.config.timestep_spacing] == spacing


def test_a_solver_that_is_not_here_keeps_its_process():
    config = {"_class_name": "LMSDiscreteScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085}
    process, sampler, _, notes = schedulers.read(config, "scheduler")
    assert (process["schedule"], process["beta_start"]) == ("scaled_linear", 0.00085)
    assert sampler == known_samplers()["ddim"]
    assert notes == ["LMSDiscreteScheduler has no counterpart: pictures are drawn by ddim"]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"_class_name": "PNDMScheduler", "set_alpha_to_one": False}, "set_alpha_to_one=False"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "solver_order=3"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding"),
        ({"_class_name": "DDIMScheduler", "clip_sample": True}, "clip_sample=True"),
        ({"_class_name": "DDIMScheduler", "something": 1}, "something=1"),
        ({"_class_name": "EulerDiscreteScheduler", "sigma_max": 120}, "sigma_max=120"),
        ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, "use_beta_sigmas=True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True}, "use_lu_lambdas=True"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
            | {"lambda_min_clipped": -5.1},
            "lambda_min_clipped=-5.1",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_type": "heun"}, "solver_type=heun"),
        ({"_class_name": "UniPCMultistepScheduler", "final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
    ],
)
def test_what_is_otherwise_is_noted(fields, word):
    assert any(word in note for note in schedulers.read(fields, "scheduler")[3])


@pytest.mark.parametrize(
    "fields",
    [
        {"_class_name": "TCDScheduler"},
        {"_class_name": "EulerDiscreteScheduler", "sigma_max": 120, "timestep_type": "continuous"},
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
        {"_class_name": "DDIMScheduler", "prediction_type": "flow"},
        {"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"},
        {"_class_name": "DDIMScheduler", "timestep_spacing": "other"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
    ],
)
def test_what_is_not_here_is_refused(fields):
    name, value = list(fields.items())[-1]
    with pytest.raises(InputError, match=f"{name}='?{value}"):
        schedulers.read(fields, "scheduler")


@pytest.mark.parametrize(
    "process",
    [
        {"_target_": "ldm.diffusion.noise_scheduler.EDM"},
        {"_target_": schedulers.VP, "prediction_type": "flow"},
        {"_target_": schedulers.FLOW, "prediction_type": "v_prediction"},
    ],
)
def test_processes_that_diffusers_lacks_are_refused(process):
    with pytest.raises(InputError, match="noise_scheduler"):
        schedulers.written(process, None, "trailing")


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "unipc"])
def test_rectified_flows(sampler, shift):
    """Their solver of our config brings Gaussian latents as near to their mean as ours does."""
    process = {
        "_target_": schedulers.FLOW,
        "prediction_type": "flow",
        "num_train_timesteps": 1000,
        "shift": shift,
    }
    config, notes = schedulers.written(process, known_samplers()[sampler], "trailing")
    assert schedulers.read(config, "scheduler")[0] == process
    assert schedulers.written({"_target_": schedulers.FLOW}, None, "uniform")[0]["flow_shift"] == 1
    assert len(notes) == 1
    theirs, x = opened(config), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    mean, sd, ends = 0.3, 0.5, []
    theirs.set_timesteps(100)
    y = x.clone()
    for t in theirs.timesteps:
        sigma = float(theirs.sigmas[theirs.step_index or 0])
        y = theirs.step(velocity(y, 1 - sigma, sigma, mean, sd), t, y).prev_sample
    ends.append(y)
    ours = build(known_samplers()[sampler])
    grid = build(process).grid(100, "trailing")

    def denoise(z, row):
        return z - row.sigma * velocity(z, row.alpha, row.sigma, mean, sd)

    end = ours(denoise, x, grid, noise=lambda i: x)
    assert (end - y).abs().max() < 0.04 * end.abs().max()
    assert (end - (mean + sd * x)).abs().max() < 0.05


def velocity(x, alpha, sigma, mean, sd):
    """noise - latents that is expected at x, of latents N(mean, sd^2)."""
    variance = (alpha * sd) ** 2 + sigma**2
    latents = mean + alpha * sd**2 / variance * (x - alpha * mean)
    return (x - latents) / sigma


def test_flows_of_diffusers_are_read():
    process, sampler, spacing, _ = schedulers.read(
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "scheduler"
    )
    assert (process["_target_"], process["shift"], spacing) == (schedulers.FLOW, 3.0, "trailing")
    assert sampler == known_samplers()["ddim"]


@pytest.mark.parametrize(
    ("sampler", "spacing", "word"),
    [
        ("dpmpp_2m", "leading", "trailing are the same"),
        ("unipc", "uniform", "trailing are the same"),
        ("plms", "karras", "written as trailing"),
        ("heun_churn", "trailing", "churn"),
    ],
)
def test_notes_of_what_a_config_cannot_say(sampler, spacing, word):
    config, notes = schedulers.written(PROCESSES["sd"], known_samplers()[sampler], spacing)
    opened(config)
    assert any(word in note for note in notes)


def test_eta_between_is_noted_and_steps_offset_as_well():
    section = known_samplers()["ddim"] | {"eta": 0.5}
    process = PROCESSES["sd"] | {"steps_offset": 0}
    notes = schedulers.written(process, section, "leading")[1]
    assert any("eta=0.5" in note for note in notes)
    assert any("steps_offset" in note for note in notes)
