"""Optimizer state by parameter name: tensors for safetensors, the rest for JSON, and back bit by bit.

torch numbers parameters by their place in the groups, so one more parameter shifts every state after it;
names do not shift. Tensors are `PARAMETER.KEY`; those of group I (a learning rate on the device) `@I.KEY`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ldm.errors import InputError

EXECUTION = (
    "params",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
)  # how, not what: the config's alone


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Parameter, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, document) of an optimizer whose every parameter has a name."""
    tensors: dict[str, Tensor] = {}
    groups, scalars = [], {}
    for i, group in enumerate(optimizer.param_groups):
        group_names = _names(group, names)
        settings = {key: value for key, value in group.items() if key not in EXECUTION}
        tensors |= {f"@{i}.{key}": value for key, value in settings.items() if isinstance(value, Tensor)}
        plain = {key: value for key, value in settings.items() if not isinstance(value, Tensor)}
        groups.append({**plain, "params": group_names})
        for parameter, name in zip(group["params"], group_names, strict=True):
            state = optimizer.state.get(parameter, {})
            tensors |= {f"{name}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
            rest = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
            if rest:
                scalars[name] = rest
    return tensors, {"type": type(optimizer).__name__, "groups": groups, "scalars": scalars}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Parameter, str],
    tensors: Mapping[str, Tensor],
    document: Mapping[str, Any],
) -> None:
    """Put back what `flatten_optimizer` took; raises InputError unless type, groups and names agree."""
    kind = type(optimizer).__name__
    if document["type"] != kind:
        raise InputError(
            "optimizer", f"is {kind}, the checkpoint has {document['type']}", "use the same optimizer"
        )
    saved = document["groups"]
    mine = [_names(group, names) for group in optimizer.param_groups]
    _check_names([name for group in mine for name in group], [n for group in saved for n in group["params"]])
    if mine != [group["params"] for group in saved]:
        raise InputError(
            "optimizer", "the checkpoint deals the same parameters into other groups", "undo that"
        )
    optimizer.state.clear()
    for i, (group, stored) in enumerate(zip(optimizer.param_groups, saved, strict=True)):
        for key, value in stored.items():
            if key not in EXECUTION:
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        for name in [name for name in tensors if name.startswith(f"@{i}.")]:
            _restore_setting(group, name.partition(".")[2], tensors[name])
        for parameter, name in zip(group["params"], mine[i], strict=True):
            state = dict(document["scalars"].get(name, {}))
            if state:
                optimizer.state[parameter] = state
    by_name = {name: (parameter, group) for parameter, name, group in _rows(optimizer, names)}
    for name, value in tensors.items():
        owner, _, key = name.rpartition(".")
        if owner in by_name:
            parameter, group = by_name[owner]
            optimizer.state[parameter][key] = _placed(value, parameter, key, group)


def _names(group: Mapping[str, Any], names: Mapping[Parameter, str]) -> list[str]:
    unnamed = [tuple(parameter.shape) for parameter in group["params"] if parameter not in names]
    if unnamed:
        raise ValueError(
            f"{len(unnamed)} parameters of the optimizer have no name; the first has shape {unnamed[0]}"
        )
    return [names[parameter] for parameter in group["params"]]


def _rows(optimizer: torch.optim.Optimizer, names: Mapping[Parameter, str]) -> Any:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter, names[parameter], group


def _check_names(mine: list[str], saved: list[str]) -> None:
    missing, extra = sorted(set(mine) - set(saved)), sorted(set(saved) - set(mine))
    if missing or extra:
        parts = [
            f"{what} {len(found)}: {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}"
            for what, found in (("lacks", missing), ("has unknown", extra))
            if found
        ]
        raise InputError(
            "optimizer", "the checkpoint " + " and ".join(parts), "use the config it was made with"
        )


def _restore_setting(group: dict[str, Any], key: str, value: Tensor) -> None:
    """In place where there is a tensor already, so that a captured graph goes on reading it."""
    if isinstance(group.get(key), Tensor):
        group[key].copy_(value)
    else:
        group[key] = value.clone()


def _placed(value: Tensor, parameter: Parameter, key: str, group: Mapping[str, Any]) -> Tensor:
    """A state tensor where the optimizer would make it: same device and, if of the same shape, strides."""
    if key == "step" and not (group.get("fused") or group.get("capturable")):
        return value.to("cpu", copy=True)
    if value.shape != parameter.shape:
        return value.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
