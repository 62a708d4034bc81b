"""What an optimizer is told: learning-rate schedules, and groups of parameters that are treated alike.

A schedule is a pure function of the optimizer step; the optimizers of our own are in `optimizers.py`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from ldm.errors import InputError

NORMS = (nn.GroupNorm, nn.LayerNorm, nn.Embedding)

# ---- groups of parameters ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterRule:
    """How to treat the parameters whose name holds the regular expression `match`."""

    match: str
    lr: float = 1.0  # factor on the optimizer's learning rate
    weight_decay: float | None = None  # None: the optimizer's on matrices and kernels, 0 on the rest
    train: bool = True  # False: kept as they are, without gradient, average or optimizer state


def parameter_rules(section: Sequence[Mapping[str, Any]]) -> list[ParameterRule]:
    """The rules of the config's `parameter_groups`; raises InputError."""
    rules, known = [], [field.name for field in fields(ParameterRule)]
    for i, values in enumerate(section):
        where = f"parameter_groups[{i}]"
        unknown = next((key for key in values if key not in known), None)
        if unknown is not None or "match" not in values:
            what = f"unknown key {unknown}" if unknown is not None else "has no match"
            raise InputError(where, what, f"it takes: {', '.join(known)}")
        rule = ParameterRule(**values)
        try:
            re.compile(rule.match)
        except re.error as error:
            raise InputError(f"{where}.match={rule.match!r}", f"not a regular expression ({error})") from None
        if rule.lr <= 0:
            raise InputError(f"{where}.lr={rule.lr}", "a factor must be above 0", "train: false freezes")
        rules.append(rule)
    return rules


def deal(names: Sequence[str], rules: Sequence[ParameterRule]) -> dict[str, int]:
    """Parameter name -> its rule's place, the first that matches, or -1; an idle rule is an InputError."""
    places = {
        name: next((i for i, rule in enumerate(rules) if re.search(rule.match, name)), -1) for name in names
    }
    for i, rule in enumerate(rules):
        if i in places.values():
            continue
        where = f"parameter_groups[{i}].match={rule.match!r}"
        taken = next((name for name in names if re.search(rule.match, name)), None)
        if taken is not None:
            first = rules[places[taken]].match
            raise InputError(where, f"is left nothing by {first!r}", "the first match wins: put it earlier")
        words = dict.fromkeys(word for name in names for word in (name, *name.split(".")))
        near = difflib.get_close_matches(rule.match, words, n=3, cutoff=0.5) or [*names[:1], "..."]
        raise InputError(where, "matches no parameter", f"names near it: {', '.join(near)}")
    return places


def freeze(module: nn.Module, rules: Sequence[ParameterRule]) -> None:
    """Take what the rules do not train out of the gradient, before anyone counts parameters."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for name, place in deal(list(parameters), rules).items():
        if place >= 0 and not rules[place].train:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in module.parameters()):
        raise InputError("parameter_groups", "nothing is left to train", "give fewer of them train: false")


def parameter_groups(
    module: nn.Module, weight_decay: float, rules: Sequence[ParameterRule] = (), lr: float | None = None
) -> list[dict[str, Any]]:
    """Two groups, and two more a rule: matrices and kernels, with weight decay; the rest, without.

    `matrices` says which kind a group is, for optimizers that treat them differently. `lr`: the optimizer's.
    """
    spared = {
        id(p)
        for m in module.modules()
        for p in m.parameters(recurse=False)
        if isinstance(m, NORMS) or p.ndim < 2
    }
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    places = deal([name for name, _ in module.named_parameters()], rules)
    groups: list[dict[str, Any]] = []
    for place in range(-1, len(rules)):
        rule = rules[place] if place >= 0 else ParameterRule("")
        for matrices in (True, False):
            decay = weight_decay if matrices else 0.0
            group: dict[str, Any] = {
                "params": [
                    p
                    for n, p in trainable.items()
                    if places[n] == place and (id(p) not in spared) == matrices
                ],
                "weight_decay": decay if rule.weight_decay is None else rule.weight_decay,
                "matrices": matrices,
            }
            if lr is not None:
                group["lr"] = lr * rule.lr
            groups.append(group)
    return [group for group in groups if group["params"]]


# ---- schedules -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Linear warm-up over `warmup` optimizer steps, then 1."""

    warmup: int = 0

    def __call__(self, step: int) -> float:
        return self.shape(step) * (min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0)

    def shape(self, step: int) -> float:
        """The factor without warm-up."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Cosine(Constant):
    """Linear warm-up, then half a cosine from 1 down to `final` at step `total`; `final` after it."""

    total: int
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup >= self.total:
            raise ValueError(f"warmup={self.warmup} must be below total={self.total} steps")

    def shape(self, step: int) -> float:
        done = min(1.0, max(0, step - self.warmup) / (self.total - self.warmup))
        return self.final + (1 - self.final) * self.curve(done)

    def curve(self, done: float) -> float:
        """From 1 to 0 as `done` goes from 0 to 1."""
        return 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True, kw_only=True)
class Linear(Cosine):
    """Linear warm-up, then a straight line from 1 to `final` at step `total`; `final` after it."""

    def curve(self, done: float) -> float:
        return 1 - done


@dataclass(frozen=True, kw_only=True)
class InverseSquareRoot(Constant):
    """Linear warm-up times 1 / sqrt(max(step / reference, 1)), as in EDM2 (Karras et al. 2024)."""

    reference: int

    def __post_init__(self) -> None:
        if self.reference < 1:
            raise ValueError(f"reference={self.reference} must be a number of optimizer steps from 1")

    def shape(self, step: int) -> float:
        return 1 / math.sqrt(max(step / self.reference, 1))
