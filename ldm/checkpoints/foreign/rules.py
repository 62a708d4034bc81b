"""Rules that say which tensors elsewhere hold ours, and what they do: `taken` reads by them, `given` writes.

o channels out, i channels in.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ldm.checkpoints.lazy import FORMAT_OF, LazyTensor, dtype_of
from ldm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One native tensor, and what elsewhere holds it.

    theirs  its name there; several: ours is theirs in this order, joined along the first dimension
    kind    same | linear (both [o i]) | pointwise (theirs is a 1x1 convolution [o i 1 1], ours [o i]) |
            transposed (theirs [i o]); linear and pointwise are read from either shape
    older   what some files call `theirs`, in the same order; read and never written
    """

    ours: str
    theirs: tuple[str, ...]
    kind: str = "same"
    older: tuple[str, ...] = ()


def under(rules: Iterable[Rule], ours: str = "", theirs: str = "") -> list[Rule]:
    """The same rules with prefixes, such as `backbone.` and `model.diffusion_model.`."""
    return [
        replace(
            rule,
            ours=ours + rule.ours,
            theirs=tuple(theirs + name for name in rule.theirs),
            older=tuple(theirs + name for name in rule.older),
        )
        for rule in rules
    ]


def _their_shapes(rule: Rule, shape: Shape) -> list[Shape]:
    """Shapes that each of a rule's foreign tensors may have, that which is written first."""
    if rule.kind == "transposed":
        return [shape[::-1]]
    if rule.kind in ("linear", "pointwise"):
        both = [shape, (*shape, 1, 1)]
        return both if rule.kind == "linear" else both[::-1]
    return [(shape[0] // len(rule.theirs), *shape[1:])] if len(rule.theirs) > 1 else [shape]


def taken(
    rules: Sequence[Rule],
    shapes: Mapping[str, Shape],
    found: Mapping[str, LazyTensor],
    where: str,
    known: Callable[[str], bool] = lambda name: False,
) -> dict[str, LazyTensor]:
    """Our tensors, of our `shapes`, out of `found`; nothing is read.

    Raises one InputError that tells what is missing, of another shape, or foreign, with the nearest known
    name; names that `known` accepts may be there and are left out.
    """
    result: dict[str, LazyTensor] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    used: set[str] = set()
    for rule in rules:
        names = [
            old if old in found and name not in found else name
            for name, old in zip(rule.theirs, rule.older or rule.theirs, strict=True)
        ]
        used.update(names)
        absent = [name for name in names if name not in found]
        missing += absent
        if absent:
            continue
        shape = tuple(shapes[rule.ours])
        fitting = _their_shapes(rule, shape)
        wrong = [
            f"{name} is {list(found[name].shape)} where {list(fitting[0])} is needed"
            for name in names
            if found[name].shape not in fitting
        ]
        misshapen += wrong
        if not wrong:
            result[rule.ours] = _ours(rule, shape, [found[name] for name in names])
    foreign = [name for name in found if name not in used and not known(name)]
    if missing or misshapen or foreign:
        raise InputError(where, *_differences(rules, missing, misshapen, foreign))
    return result


def _differences(
    rules: Sequence[Rule], missing: Sequence[str], misshapen: Sequence[str], foreign: Sequence[str]
) -> tuple[str, str]:
    """What an InputError says, and its advice."""
    known = [name for rule in rules for name in rule.theirs]
    parts, fix = [], "is it another kind of model, or a part of one?"
    if missing:
        parts.append(f"{len(missing)} of {len(known)} tensors missing ({_first(missing)})")
    if misshapen:
        parts.append(f"{len(misshapen)} of another shape ({misshapen[0]})")
    if foreign:
        parts.append(f"{len(foreign)} foreign ({_first(foreign, 1)})")
        near = difflib.get_close_matches(foreign[0], known, n=1, cutoff=0.5)
        fix = f"did you mean {near[0]}?" if near else fix
    return ", ".join(parts), fix


def _first(names: Sequence[str], count: int = 2) -> str:
    return ", ".join([*names[:count], *["..."] * (len(names) > count)])


def _ours(rule: Rule, shape: Shape, theirs: Sequence[LazyTensor]) -> LazyTensor:
    if len(theirs) == 1 and theirs[0].shape == shape and rule.kind != "transposed":
        return theirs[0]

    def read() -> Tensor:
        if rule.kind == "transposed":
            return theirs[0].read().T.contiguous()
        parts = [part.read() for part in theirs]
        return (parts[0] if len(parts) == 1 else _joined(parts)).reshape(shape)

    return LazyTensor(shape, functools.reduce(_wider, [part.format for part in theirs]), read)


def _joined(parts: list[Tensor]) -> Tensor:
    import torch

    return torch.cat(parts)


def _wider(a: str, b: str) -> str:
    """The number format that has the values of both, as joining them gives."""
    if a == b:
        return a
    import torch

    return FORMAT_OF[str(torch.promote_types(dtype_of(a), dtype_of(b)))]


def given(rules: Sequence[Rule], tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The other way: their tensors out of all of ours."""
    return {
        name: _theirs(rule, i, tensors[rule.ours]) for rule in rules for i, name in enumerate(rule.theirs)
    }


def _theirs(rule: Rule, index: int, ours: LazyTensor) -> LazyTensor:
    """Their `index`-th tensor of a rule."""
    shape = _their_shapes(rule, ours.shape)[0]
    if len(rule.theirs) == 1 and shape == ours.shape and rule.kind != "transposed":
        return ours

    def read() -> Tensor:
        if rule.kind == "transposed":
            return ours.read().T.contiguous()
        part = ours.read().chunk(len(rule.theirs))[index]
        return part.clone().reshape(shape)

    return LazyTensor(shape, ours.format, read)
