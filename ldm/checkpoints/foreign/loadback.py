"""An export, read again by our own reader and compared with what was meant: tensors, and what uses them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.foreign.fold import folded, one_scale, statistics
from ldm.checkpoints.foreign.names import is_local
from ldm.checkpoints.foreign.towers import Tower, blank, kind, towers
from ldm.checkpoints.lazy import LazyTensor
from ldm.checkpoints.model import NETWORKS, Model
from ldm.config import build
from ldm.errors import InputError

INSIDE = (int, float, str, bool, tuple)  # what a module computes with, beside tensors
IGNORED = {
    "training",
    "dropout",
    "p",
    "gradient_checkpointing",
    "grad_checkpointing",
    "output_tokens",
    "layers",
}


@dataclass(frozen=True)
class Compared:
    """A network: its tensors, the greatest difference of a number, that of all relative to their norm."""

    network: str
    tensors: int
    most: float
    relative: float


def compare(meant: Model, found: Model, weights: str, dtype: torch.dtype | None) -> list[Compared]:
    """What was exported with these options, against `meant`. Raises InputError for more than rounding."""
    compared = []
    for network in NETWORKS:
        if meant.config.get(network) is None:
            continue
        if found.config.get(network) is None:
            raise _wrong(network, "it is not in the export")
        ours, theirs = _values(meant, network, weights, found), _values(found, network, "raw", found)
        compared.append(_tensors(network, ours, theirs, dtype))
        _same_modules(network, meant, found)
    _same_process("noise_scheduler", meant.config.get("noise_scheduler"), found.config.get("noise_scheduler"))
    return compared


def compare_averages(meant: Model, found: Model, dtype: torch.dtype | None) -> Compared:
    """The averages of the U-Net that a full file has beside the weights."""
    both = [Model(m.config, m.tensors | m.ema).of("backbone") for m in (meant, found)]
    if not found.ema:
        raise _wrong("averages", "they are not in the export")
    return _tensors("averages", both[0], both[1], dtype)


def _wrong(network: str, what: str) -> InputError:
    return InputError(f"{network} of the export", what, "nothing was written; please report this")


# ---- tensors -------------------------------------------------------------------------------------------


def _values(model: Model, network: str, weights: str, found: Model) -> dict[str, LazyTensor]:
    """Tensors by names that do not depend on who wrote them; an autoencoder's for the scale in the export."""
    own = model.of(network, weights)
    if network == "autoencoder":
        there = one_scale(*statistics(found.of(network), found.config[network]))
        if there is None:
            raise _wrong(network, "its latents have more than one scale")
        own = folded(own, model.config[network], there, always="quant_conv.weight" in found.of(network))
    if network == "conditioner":
        return _conditioner(model, own)
    return {name: value for name, value in own.items() if not is_local(name)}


def _conditioner(model: Model, own: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    section = model.config["conditioner"]
    used = {}
    for i, tower in enumerate(towers(section, own)):
        for name in tower.names:
            if not tower.unused(name):
                used[f"{i}.{name}"] = own[tower.prefix + name]
    return used | {name: value for name, value in own.items() if name == "embedding.weight"}


def _tensors(
    network: str, meant: Mapping[str, LazyTensor], found: Mapping[str, LazyTensor], dtype: torch.dtype | None
) -> Compared:
    if meant.keys() != found.keys():
        name = min(meant.keys() ^ found.keys())
        raise _wrong(network, f"{name} is {'missing' if name in meant else 'more than there was'}")
    most, square, norm = 0.0, 0.0, 0.0
    for name, lazy in meant.items():
        ours, theirs = lazy.read(), found[name].read()
        stored = ours if dtype is None or not ours.is_floating_point() else ours.to(dtype)
        if ours.isfinite().all() and not stored.isfinite().all():
            what = f"{name} reaches {ours.abs().max():g}, which is beyond {dtype}"
            raise InputError(network, what, "use --dtype bf16 or fp32")
        if theirs.shape != stored.shape or not _equal(stored, theirs):
            raise _wrong(network, f"{name} is not what it was")
        difference = theirs.double() - ours.double()
        if difference.numel():
            most = max(most, difference.nan_to_num().abs().max().item())
            square += difference.nan_to_num().square().sum().item()
            norm += ours.double().nan_to_num().square().sum().item()
    return Compared(network, len(meant), most, math.sqrt(square / norm) if norm else 0.0)


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


# ---- what uses them ------------------------------------------------------------------------------------


def _same_modules(network: str, meant: Model, found: Model) -> None:
    """Heads, activations, sizes of groups: what no tensor shows and a network computes with."""
    ours, theirs = (_computes(network, model) for model in (meant, found))
    for name in ours.keys() & theirs.keys():
        (kind, facts), (their_kind, their_facts) = ours[name], theirs[name]
        common = facts.keys() & their_facts.keys()
        differing = [f"{key}={facts[key]}" for key in sorted(common) if facts[key] != their_facts[key]]
        if kind != their_kind:
            differing = [kind]
        if differing:
            raise _wrong(network, f"{name or network} was {', '.join(differing)}, and reads otherwise")


def _computes(network: str, model: Model) -> dict[str, tuple[str, dict[str, Any]]]:
    with torch.device("meta"):
        built = build(blank(model.config[network]))
    if network != "conditioner":
        return {name: value for name, value in _facts(built).items() if not name.startswith("quantize")}
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for i, tower in enumerate(towers(model.config[network], model.of(network))):
        inside = built.get_submodule(tower.prefix.removesuffix("."))
        found |= {
            f"{i}.{name}": facts for name, facts in _facts(inside).items() if not tower.unused(f"{name}.x")
        }
        found[f"{i}. as it is read"] = ("", _reading(tower))
    return found


def _facts(module: nn.Module) -> dict[str, tuple[str, dict[str, Any]]]:
    return {
        name: (
            type(part).__name__,
            {
                key: value
                for key, value in vars(part).items()
                if isinstance(value, INSIDE) and key not in IGNORED and not key.startswith("_")
            },
        )
        for name, part in module.named_modules()
    }


def _reading(tower: Tower) -> dict[str, Any]:
    section = tower.section
    return {
        "depth": tower.depth,
        "final_norm": section.get("final_norm", True),
        "padding": tower.padding,
        "pooled": "text_projection" in tower.names,
    }


def _same_process(where: str, ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None) -> None:
    """Two sections of noise schedulers: the same levels of noise at the same times, told the same way."""
    if ours is None:
        return
    if theirs is None:
        raise _wrong(where, "it is not in the export")
    seen = []
    for section in (ours, theirs):
        process = build(section)
        t = process.time_at(torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64))
        levels = process.alpha(t), process.sigma(t), process.model_time(t)
        seen.append(torch.stack([*levels, *process.coefficients(t)]))
    if not torch.allclose(seen[0], seen[1], rtol=1e-9, atol=1e-9):
        raise _wrong(where, f"it was {kind(ours)} {ours.get('prediction_type', '')}, and reads otherwise")
