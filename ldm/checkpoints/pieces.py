"""Tensors that several ranks wrote: NAME.rank-00003-of-00008.safetensors, one file a rank.

One rule reads them all: the pieces of a tensor, in the order of ranks along dim 0, are the tensor. So ranks
that all have everything write each some of the tensors, and ranks that have rows (FSDP2) write those.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ldm.checkpoints.lazy import LazyTensor, open_safetensors
from ldm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

PIECE = re.compile(r"(.+)\.rank-(\d{5})-of-(\d{5})\.safetensors")

T = TypeVar("T")


def file_name(name: str, rank: int = 0, ranks: int = 1) -> str:
    """Of what `rank` of so many writes of the tensors called `name`."""
    return f"{name}.safetensors" if ranks == 1 else f"{name}.rank-{rank:05d}-of-{ranks:05d}.safetensors"


def files_of(folder: Path, name: str) -> list[Path]:
    """The files that hold `name`, in the order of ranks, or none. Raises InputError if one is missing."""
    if (folder / f"{name}.safetensors").is_file():
        return [folder / f"{name}.safetensors"]
    found = sorted(folder.glob(f"{name}.rank-*.safetensors"))
    found = [path for path in found if (match := PIECE.fullmatch(path.name)) and match[1] == name]
    if found:
        ranks = int(found[0].name[-len("00000.safetensors") : -len(".safetensors")])
        wanted = [folder / file_name(name, rank, ranks) for rank in range(ranks)]
        if missing := [path for path in wanted if path not in found]:
            raise InputError(f"{missing[0]}", "not found, though other ranks' files are there")
    return found


def open_pieces(folder: Path, name: str) -> dict[str, LazyTensor]:
    """All tensors of `name`, whole, read one at a time; empty if the folder has no such files."""
    pieces: dict[str, list[LazyTensor]] = {}
    for path in files_of(folder, name):
        for key, tensor in open_safetensors(path)[0].items():
            pieces.setdefault(key, []).append(tensor)
    return {key: joined(found) for key, found in pieces.items()}


def joined(pieces: Sequence[LazyTensor]) -> LazyTensor:
    """One tensor of pieces along dim 0."""
    first = pieces[0]
    if len(pieces) == 1:
        return first

    def read() -> Tensor:
        import torch

        return torch.cat([piece.read() for piece in pieces])

    def raw() -> bytes:
        return b"".join(piece.raw() for piece in pieces if piece.raw is not None)

    rows = sum(piece.shape[0] for piece in pieces)
    return LazyTensor((rows, *first.shape[1:]), first.format, read, raw)


def shares(sizes: Mapping[T, int], ranks: int) -> dict[T, int]:
    """Which rank writes what, about equal bytes each, neighbours together: the same on every rank."""
    total, before, found = max(1, sum(sizes.values())), 0, {}
    for key, size in sizes.items():
        found[key] = min(ranks - 1, (2 * before + size) * ranks // (2 * total))
        before += size
    return found
