"""Noise scheduler, sampler and spacing here, and diffusers' scheduler_config.json, which is all three in one.

A class of theirs is a solver; the process that the network was trained for is among its options. What one
side cannot say of the other comes back as notes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.checkpoints.foreign.documents import refuse_others
from ldm.errors import InputError

VERSION = "0.42.0"  # of diffusers, whose layout is written
TABLES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
SPACINGS = {"leading": "leading", "trailing": "trailing", "linspace": "uniform"}
LEVELS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "log_snr",
}  # spacings that are switches there
PREDICTIONS = ("epsilon", "v_prediction", "sample")
# What a file may say of a sampler that is ours, whatever its class; other values are noted.
USUAL = {
    "clip_sample": False, "thresholding": False, "use_beta_sigmas": False, "use_lu_lambdas": False,
    "final_sigmas_type": "zero", "sigma_min": None, "sigma_max": None, "lambda_min_clipped": -math.inf,
    "lower_order_final": True, "euler_at_final": False, "interpolation_type": "linear", "variance_type": None,
    "disable_corrector": [], "solver_p": None,
}  # fmt: skip
READ = {  # elsewhere, or of no effect but by one of the above
    "num_train_timesteps", "beta_schedule", "beta_start", "beta_end",
    "rescale_betas_zero_snr", "prediction_type", "steps_offset", "timestep_spacing", "trained_betas", "shift",
    "flow_shift", "use_flow_sigmas", "timestep_type", "use_dynamic_shifting", "shift_terminal",
    "invert_sigmas", "stochastic_sampling", "algorithm_type", "solver_order", "clip_sample_range",
    "dynamic_thresholding_ratio", "sample_max_value", "base_shift", "max_shift", "base_image_seq_len",
    "max_image_seq_len", "time_shift_type", *LEVELS,
}  # fmt: skip
VP, FLOW = "ldm.diffusion.noise_scheduler.VariancePreserving", "ldm.diffusion.noise_scheduler.RectifiedFlow"


HOME = "ldm.diffusion.samplers."
DDIM = {"_target_": HOME + "ddim", "_partial_": True, "eta": 0.0}
ANCESTRAL = {"_target_": HOME + "ddim", "_partial_": True, "eta": 1.0}
HEUN, PLMS = {"_target_": HOME + "heun", "_partial_": True}, {"_target_": HOME + "plms", "_partial_": True}
DPMPP = {"_target_": HOME + "dpmpp_2m", "_partial_": True, "eta": 0.0}
UNIPC = {"_target_": HOME + "unipc", "_partial_": True, "order": 2}


@dataclass(frozen=True)
class Theirs:
    """One of their solvers.

    sampler   ours; None: there is none like it
    spacing   what it uses if the file does not say
    betas     its own beta_start and beta_end
    same      options by which it is our sampler
    """

    sampler: Mapping[str, Any] | None = None
    spacing: str = "linspace"
    betas: tuple[float, float] = (0.0001, 0.02)
    same: Mapping[str, Any] = field(default_factory=dict)


MIDPOINT = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
KDIFFUSION = (0.00085, 0.012)
KNOWN = {
    "DDIMScheduler": Theirs(DDIM, "leading", same={"set_alpha_to_one": True}),
    "DDPMScheduler": Theirs(ANCESTRAL, "leading", same={"variance_type": "fixed_small"}),
    "PNDMScheduler": Theirs(PLMS, "leading", same={"skip_prk_steps": True, "set_alpha_to_one": True}),
    "EulerDiscreteScheduler": Theirs(DDIM),
    "EulerAncestralDiscreteScheduler": Theirs(ANCESTRAL),
    "HeunDiscreteScheduler": Theirs(HEUN, betas=KDIFFUSION),
    "DPMSolverMultistepScheduler": Theirs(DPMPP, same=MIDPOINT),
    "UniPCMultistepScheduler": Theirs(UNIPC, same={"solver_type": "bh2", "predict_x0": True}),
    "LMSDiscreteScheduler": Theirs(),
    "DEISMultistepScheduler": Theirs(),
    "DPMSolverSinglestepScheduler": Theirs(),
    "DPMSolverSDEScheduler": Theirs(betas=KDIFFUSION),
    "KDPM2DiscreteScheduler": Theirs(betas=KDIFFUSION),
    "KDPM2AncestralDiscreteScheduler": Theirs(betas=KDIFFUSION),
}
FLOW_CLASS = "FlowMatchEulerDiscreteScheduler"


def read(found: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any], str, list[str]]:
    """(noise_scheduler, sampler, spacing, notes) of a config; raises InputError without a counterpart."""
    name = str(found.get("_class_name"))
    theirs = KNOWN.get(name, Theirs())
    if found.get("prediction_type") == "flow_prediction" or name == FLOW_CLASS:
        process, spacing = _flow(found, where), "trailing"
    elif name in KNOWN:
        process = _table(found, theirs, where)
        spacing = SPACINGS[found.get("timestep_spacing", theirs.spacing)]
    else:
        fix = f"have: {', '.join([*KNOWN, FLOW_CLASS])}"
        raise InputError(f"{where}: _class_name={name}", "no noise scheduler here is its counterpart", fix)
    spacing = next((ours for switch, ours in LEVELS.items() if found.get(switch)), spacing)
    sampler, notes, same = dict(theirs.sampler or DDIM), [], USUAL | dict(theirs.same)
    if theirs.sampler is None and name != FLOW_CLASS:
        notes.append(f"{name} has no counterpart: pictures are drawn by ddim")
    if found.get("algorithm_type") == "sde-dpmsolver++":
        sampler["eta"], same["algorithm_type"] = 1.0, "sde-dpmsolver++"
    known = {key: value for key, value in found.items() if not key.startswith("_")}
    other = [k for k, value in known.items() if (value != same[k] if k in same else k not in READ)]
    if other and theirs.sampler is not None:
        notes.append(f"the sampler is {name}'s but for {', '.join(f'{k}={found[k]}' for k in other)}")
    if "order" in sampler:
        sampler["order"] = found.get("solver_order", 2)
    return process, sampler, spacing, notes


def _table(found: Mapping[str, Any], theirs: Theirs, where: str) -> dict[str, Any]:
    same = {"trained_betas": None, "prediction_type": PREDICTIONS, "timestep_type": "discrete"}
    refuse_others(found, same | {"use_flow_sigmas": (False, None)}, where)
    for key in ("num_train_timesteps", "steps_offset"):
        if not isinstance(found.get(key, 1), int):
            raise InputError(where, f"{key}={found[key]!r} is no whole number")
    schedule = found.get("beta_schedule", "linear")
    if schedule not in TABLES:
        fix = f"have: {', '.join(TABLES)}"
        raise InputError(f"{where}: beta_schedule={schedule}", "no noise scheduler here has it", fix)
    if found.get("timestep_spacing", "leading") not in SPACINGS:
        fix = f"have: {', '.join(SPACINGS)}"
        raise InputError(f"{where}: timestep_spacing={found['timestep_spacing']}", "no such spacing", fix)
    betas = (
        {}
        if TABLES[schedule] == "cosine"
        else dict(zip(("beta_start", "beta_end"), theirs.betas, strict=True))
    )
    return {
        "_target_": VP,
        "num_train_timesteps": found.get("num_train_timesteps", 1000),
        "schedule": TABLES[schedule],
        **{key: found.get(key, value) for key, value in betas.items()},
        "zero_terminal_snr": found.get("rescale_betas_zero_snr", False),
        "prediction_type": found.get("prediction_type", "epsilon"),
        "steps_offset": found.get("steps_offset", 0),
    }


def _flow(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    same = {"use_dynamic_shifting": False, "shift_terminal": None, "invert_sigmas": False}
    refuse_others(found, same | {"stochastic_sampling": False}, where)
    return {
        "_target_": FLOW,
        "shift": float(found.get("shift", found.get("flow_shift", 1.0))),
        "prediction_type": "flow",
        "num_train_timesteps": found.get("num_train_timesteps", 1000),
    }


def written(
    process: Mapping[str, Any], sampler: Mapping[str, Any] | None, spacing: str
) -> tuple[dict[str, Any], list[str]]:
    """(scheduler_config.json, notes); raises InputError for a process that diffusers does not have.

    `ddim` stands for Euler as well, and `ddpm` for ancestral Euler: the same function here.
    """
    sampler = sampler or DDIM
    target = process["_target_"]
    prediction = process.get("prediction_type", "flow" if target == FLOW else "epsilon")
    if target == FLOW and prediction == "flow":
        return _written_flow(process, sampler)
    if target != VP or prediction not in PREDICTIONS:
        kind = target.rpartition(".")[2]
        what = f"a {kind} with prediction_type={prediction} is none of diffusers' schedulers"
        raise InputError("noise_scheduler", what, "--format autoencoder exports the autoencoder alone")
    config, notes = _solver(sampler, spacing, prediction)
    if process.get("zero_terminal_snr"):
        if config["_class_name"] in ("PNDMScheduler", "HeunDiscreteScheduler"):
            notes.append(f"{config['_class_name']} knows no zero terminal SNR: written as DDIMScheduler")
            config, _ = _solver(DDIM, spacing, prediction)
        config["rescale_betas_zero_snr"] = True
    names = {ours: theirs for theirs, ours in TABLES.items()}
    config |= {
        "num_train_timesteps": process.get("num_train_timesteps", 1000),
        "beta_schedule": names[process.get("schedule", "scaled_linear")],
        "beta_start": process.get("beta_start", 0.00085),
        "beta_end": process.get("beta_end", 0.012),
        "prediction_type": prediction,
        "steps_offset": process.get("steps_offset", 0),
    }
    if config["timestep_spacing"] == "leading" and not config["steps_offset"]:
        notes.append("diffusers' pipelines raise steps_offset to 1 when they draw on leading grids")
    return config, notes


def _solver(sampler: Mapping[str, Any], spacing: str, prediction: str) -> tuple[dict[str, Any], list[str]]:
    """Class and options of the solver, and its spacing."""
    function, eta, notes = sampler["_target_"].rpartition(".")[2], sampler.get("eta", 0.0), list[str]()
    switch = next((theirs for theirs, ours in LEVELS.items() if ours == spacing), None)
    name, options = SOLVERS.get((function, float(eta)), SOLVERS.get((function, 0.0), SOLVERS["ddim", 0.0]))
    if (function, 0.0) not in SOLVERS:
        notes.append(f"sampler {function} is none of diffusers': written as {name}")
    if 0 < eta < 1:
        notes.append(f"eta={eta} is not in diffusers' files: give it to the call")
    if sampler.get("s_churn"):
        notes.append("churn is not in diffusers' files")
    if name == "PNDMScheduler" and prediction == "sample":
        notes.append("PNDMScheduler takes no prediction_type=sample: written as DDIMScheduler")
        return _solver(DDIM, spacing, prediction)[0], notes
    if switch and name == "DDIMScheduler":
        name, options = "EulerDiscreteScheduler", {}  # the same step, on levels
    elif switch and name in ("DDPMScheduler", "PNDMScheduler"):
        notes.append(f"{name} has no spacing {spacing}: written as trailing")
        spacing, switch = "trailing", None
    if options.items() >= MULTISTEP.items() and spacing in ("leading", "uniform"):
        notes.append(f"{name} places the times of {spacing} otherwise; those of trailing are the same")
    names = {ours: theirs for theirs, ours in SPACINGS.items()}
    config = {"_class_name": name, "_diffusers_version": VERSION, **options}
    config["timestep_spacing"] = names.get(spacing, "linspace")
    if "order" in sampler:
        config["solver_order"] = sampler["order"]
    return config | ({switch: True} if switch else {}), notes


MULTISTEP = {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"}
DPM = "DPMSolverMultistepScheduler"
SOLVERS: dict[tuple[str, float], tuple[str, dict[str, Any]]] = {  # by function and eta
    ("ddim", 0.0): ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
    ("ddim", 1.0): ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}),
    ("heun", 0.0): ("HeunDiscreteScheduler", {}),
    ("plms", 0.0): ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
    ("dpmpp_2m", 0.0): (DPM, {"algorithm_type": "dpmsolver++", **MULTISTEP}),
    ("dpmpp_2m", 1.0): (DPM, {"algorithm_type": "sde-dpmsolver++", **MULTISTEP}),
    ("unipc", 0.0): ("UniPCMultistepScheduler", {"solver_type": "bh2", **MULTISTEP}),
}


def _written_flow(process: Mapping[str, Any], sampler: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Multistep solvers alone: diffusers' Euler of flows does not run in its Stable Diffusion pipelines."""
    function = sampler["_target_"].rpartition(".")[2]
    config, _ = _solver(sampler if function in ("dpmpp_2m", "unipc") else DPMPP, "trailing", "flow")
    config |= {
        "num_train_timesteps": process.get("num_train_timesteps", 1000),
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": process.get("shift", 1.0),
    }
    return config, [f"written as {config['_class_name']} with use_flow_sigmas, which rounds times down"]
