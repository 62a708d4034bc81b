"""What the YAML says that a model of CompVis or Stability AI was trained by, in this house's words.

`model.params` of latent-diffusion and stablediffusion (`unet_config`, `first_stage_config`), of
generative-models (`network_config`, `denoiser_config`), and of a first stage alone (`ddconfig`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ldm.checkpoints.foreign.families import Schedule, Section
from ldm.errors import InputError

BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine"}  # theirs to ours
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SCALINGS = {"EpsScaling": "epsilon", "VScaling": "v_prediction"}  # others tell the network another time
ABSENT: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Original:
    """Facts of the YAML; what it does not say is None, or not in the mappings.

    unet, autoencoder  arguments of our networks, without those that it leaves open
    heads              {"num_heads": n} or {"head_dim": n}
    latent_size        side of the latents in training
    """

    where: str
    unet: Section = field(default_factory=dict)
    autoencoder: Section = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)
    prediction_type: str | None = None
    schedule: Schedule | None = None
    num_train_timesteps: int | None = None
    latent_scale: float | None = None
    latent_size: int | None = None

    def agree(self, said: Mapping[str, Any], found: Mapping[str, Any], network: str) -> None:
        """Raises InputError with both numbers where the tensors say something else."""
        for name, value in said.items():
            if name in found and found[name] != value:
                what = f"{name} of the {network} is {value} here, and {found[name]} in the tensors"
                raise InputError(self.where, what, "is it the YAML of this file?")


def read(path: Path, where: str) -> Original:
    """The facts of a YAML file, which `where` names; nothing in it can run. Raises InputError."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(where, " ".join(str(error).split())) from None
    params = _at(document, "model", "params")
    if not params:
        raise InputError(where, "has no model.params", "give the YAML that the model was trained by")
    try:
        return _facts(where, params)
    except InputError:
        raise
    except (TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
        what = f"is not such a YAML as CompVis and Stability AI write: {type(error).__name__} {error}"
        raise InputError(where, what) from None


def beside(path: Path) -> Path | None:
    """The YAML of the same name beside a file: AUTOMATIC1111's habit."""
    found = path.with_suffix(".yaml")
    return found if found.is_file() else None


def _at(node: Any, *keys: str) -> Any:
    """The value at a path of keys; an empty mapping where there is none."""
    for key in keys:
        node = node.get(key, ABSENT) if isinstance(node, Mapping) else ABSENT
    return ABSENT if node is None else node


def _last(target: Any) -> str:
    return str(target).rpartition(".")[2]


def _facts(where: str, params: Mapping[str, Any]) -> Original:
    network = _at(params, "unet_config", "params") or _at(params, "network_config", "params")
    stage = _at(params, "first_stage_config", "params") or (params if "ddconfig" in params else ABSENT)
    denoiser = _at(params, "denoiser_config", "params")
    chain = params if "linear_start" in params else _at(denoiser, "discretization_config", "params")
    schedule = params.get("beta_schedule", "linear")
    if schedule not in BETAS:
        raise InputError(where, f"beta_schedule {schedule} is none of {', '.join(BETAS)}")
    scaling = _last(_at(denoiser, "scaling_config", "target")) if denoiser else ""
    if scaling and scaling not in SCALINGS:
        raise InputError(where, f"scaling {scaling} is none of {', '.join(SCALINGS)}")
    parameterization = params.get("parameterization", "eps")
    if parameterization not in PREDICTIONS:
        raise InputError(where, f"parameterization {parameterization} is none of {', '.join(PREDICTIONS)}")
    prediction = SCALINGS[scaling] if scaling else PREDICTIONS[parameterization]
    sgm = "network_config" in params
    start, end = (
        float(chain.get("linear_start", 0.00085 if sgm else 1e-4)),
        float(chain.get("linear_end", 0.012 if sgm else 2e-2)),
    )
    size = params.get("image_size")
    return Original(
        where,
        unet=_unet(network) if network else {},
        autoencoder=_autoencoder(stage) if stage else {},
        heads=_heads(network),
        prediction_type=prediction if network else None,
        schedule=(BETAS[schedule], start, end) if network else None,
        num_train_timesteps=int(params.get("timesteps", denoiser.get("num_idx", 1000))) if network else None,
        latent_scale=float(params["scale_factor"]) if "scale_factor" in params else None,
        latent_size=size if isinstance(size, int) else None,
    )


def _unet(given: Mapping[str, Any]) -> Section:
    """Arguments of CrossAttentionUNet; `attention_resolutions` are factors by which a level is smaller."""
    multiples = list(given["channel_mult"])
    places = [2**i in given["attention_resolutions"] for i in range(len(multiples))]
    depth = given.get("transformer_depth", 1)
    depths = [depth] * len(multiples) if isinstance(depth, int) else list(depth)
    context, classes = given.get("context_dim"), given.get("num_classes")
    section = {
        "in_channels": given["in_channels"],
        "out_channels": given["out_channels"],
        "block_out_channels": [given["model_channels"] * multiple for multiple in multiples],
        "layers_per_block": _one(given["num_res_blocks"]),
        "transformer_depth": [there * level for there, level in zip(places, depths, strict=True)],
        "mid_depth": given.get("transformer_depth_middle") or depths[-1],
        "linear_projection": given.get("use_linear_in_transformer", False),
        "pooled_dim": given["adm_in_channels"] if classes == "sequential" else None,
        "num_classes": classes if isinstance(classes, int) else None,
    }
    return section | ({} if context is None else {"context_dim": _one(context)})


def _one(value: Any) -> Any:
    """A list of equal numbers as that number."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def _heads(given: Mapping[str, Any]) -> dict[str, int]:
    for theirs, ours in (("num_head_channels", "head_dim"), ("num_heads", "num_heads")):
        if given.get(theirs, -1) != -1:
            return {ours: given[theirs]}
    return {}


def _autoencoder(given: Mapping[str, Any]) -> Section:
    sizes = given["ddconfig"]
    multiples = list(sizes["ch_mult"])
    attention = [sizes["resolution"] // 2**i in sizes["attn_resolutions"] for i in range(len(multiples))]
    return {
        "in_channels": sizes["in_channels"],
        "out_channels": sizes["out_ch"],
        "latent_channels": sizes["z_channels"],
        "block_out_channels": [sizes["ch"] * multiple for multiple in multiples],
        "layers_per_block": sizes["num_res_blocks"],
        "attention_levels": attention,
        "mid_attention": sizes.get("attn_type", "vanilla") != "none",
    }
