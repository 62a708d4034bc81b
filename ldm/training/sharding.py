"""Networks of which each rank keeps some rows (FSDP2), and how rows and whole tensors become each other.

A sharded tensor is a DTensor of one mesh dimension, split along dim 0 as torch.chunk does: the first ranks
have ceil(n / world) rows, later ones fewer or none, and the pieces in the order of ranks are the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ldm.checkpoints.optimizer import restore_optimizer

BLOCKS = ("down_blocks", "mid_block", "up_blocks")  # of U-Nets, encoders and decoders

# ---- networks ------------------------------------------------------------------------------------------


def shard(network: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Shard `network`, which is used by calling it: each level is one all-gather, the rest another.

    Weights stay gathered between forward and backward: they are what DDP would have, and gathering them
    twice would cost more than it saves. Names and shapes stay. FSDP2 takes contiguous parameters alone.
    """
    for part in (*_levels(network), network):
        fully_shard(part, mesh=mesh, reshard_after_forward=False, mp_policy=policy)


def _levels(network: nn.Module) -> Iterator[nn.Module]:
    for module in network.modules():
        for name in BLOCKS:
            found = getattr(module, name, None)
            levels: Any = found if isinstance(found, nn.ModuleList) else [found] if found is not None else []
            yield from (level for level in levels if any(True for _ in level.parameters()))


def sharded_parts(module: nn.Module) -> list[FSDPModule]:
    """All that gathers weights of its own."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def roots(module: nn.Module) -> list[FSDPModule]:
    """The outermost of them, whose settings reach those within."""
    found = sharded_parts(module)
    inner = {id(child) for part in found for child in part.modules() if child is not part}  # type: ignore[attr-defined]
    return [part for part in found if id(part) not in inner]


@contextmanager
def whole(parts: Sequence[FSDPModule]) -> Iterator[None]:
    """Inside, every rank has all weights, and computing asks no other rank: it need not compute at all."""
    for part in parts:
        part.reshard()  # what was gathered before may be older than the rows
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


# ---- tensors -------------------------------------------------------------------------------------------


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This rank's rows, which share the memory of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut(value: Any, like: Tensor) -> Tensor:
    """This rank's rows of a whole tensor that is to become one like `like`; `value` may be read lazily."""
    value = value.read() if hasattr(value, "read") else value
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return value[rows_of(len(value), like.device_mesh.get_local_rank(), like.device_mesh.size())]


def rows_of(length: int, rank: int, world: int) -> slice:
    """The rows that a rank has of so many."""
    share = -(-length // world)
    return slice(min(rank * share, length), min((rank + 1) * share, length))


def sharded(rows: Tensor, like: Tensor) -> Tensor:
    """These rows of this rank as part of a tensor with the shape of `like`; as they are if that is whole."""
    if not isinstance(like, DTensor):
        return rows
    layout: dict[str, Any] = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    return DTensor.from_local(rows, like.device_mesh, like.placements, **layout)


@torch.no_grad()
def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Norm of all values together, over all ranks if the tensors are sharded: then a collective call."""
    found = list(tensors)
    norm = torch.nn.utils.get_total_norm([local(tensor) for tensor in found])
    if any(isinstance(tensor, DTensor) for tensor in found):
        square = norm.square()
        torch.distributed.all_reduce(square)
        norm = square.sqrt()
    return norm


@torch.no_grad()
def clip_norm(parameters: Sequence[Tensor], largest: float) -> Tensor:
    """Scale sharded gradients to a norm of `largest` at most, as torch's clip_grad_norm_; that before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = total_norm(gradients)
    torch._foreach_mul_([local(g) for g in gradients], (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm


# ---- state, for checkpoints ----------------------------------------------------------------------------


@torch.no_grad()
def local_state(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this rank has to write of a module, or of tensors by name: its rows of the sharded ones.

    Maybe none of them: shape [0, ...]. What every rank has whole (buffers, counters) is rank 0's alone, so
    the pieces of a name, in the order of ranks along dim 0, are the tensor wherever there are several.
    """
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    tensors = source.state_dict() if isinstance(source, nn.Module) else source
    return {name: local(value) for name, value in tensors.items() if first or isinstance(value, DTensor)}


def gathered(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The whole tensors, sharded ones put together on every rank's CPU one by one: a collective call."""
    found = {}
    for name, value in tensors.items():
        value = value.to(dtype) if dtype is not None else value
        found[name] = value.full_tensor().cpu() if isinstance(value, DTensor) else value
    return found


@torch.no_grad()
def load_local(module: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Put whole tensors, of the names of the module's state dict, into this rank's rows of them."""
    for part in sharded_parts(module):
        part.reshard()
    for name, own in module.state_dict().items():
        local(own).copy_(cut(tensors[name], own))


def load_local_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[nn.Parameter, str],
    tensors: Mapping[str, Any],
    document: Mapping[str, Any],
) -> None:
    """`restore_optimizer` from whole tensors, whether or not the parameters are sharded."""
    owners = {name: parameter for parameter, name in names.items()}
    placed = {}
    for name, value in tensors.items():
        like, rows = owners.get(name.rpartition(".")[0]), value.shape
        if isinstance(like, DTensor) and rows == like.shape:
            piece = cut(value, like).to(like.device, copy=True, memory_format=torch.contiguous_format)
            placed[name] = sharded(piece, like)
        else:
            placed[name] = value.read() if hasattr(value, "read") else value
    restore_optimizer(optimizer, names, placed, document)
