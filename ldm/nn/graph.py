"""A network's forward pass as a CUDA graph: one launch in the place of some thousand, where the host is late.

For each set of shapes the pass is recorded once, on tensors that stay; a call copies its inputs there and
replays. Random numbers of the host and sizes that change have no place in it, and gradients neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ldm.types import Conditioning

MOST = 8  # graphs that are kept; each holds the memory of its pass
WARM_UP = 3  # passes before it is recorded: kernels are chosen and compiled then

Work = Callable[[], Any]


def recorded(work: Work, device: torch.device) -> Work:
    """`work` as a CUDA graph; the tensors that it gives are the same at each replay.

    Autocast keeps no casts of weights meanwhile: a cast from before the graph would never be made again.
    """
    kind = device.type
    cast = torch.autocast(
        kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
    )
    with torch.cuda.device(device), cast:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = work()

    def replay() -> Any:
        with torch.cuda.device(device):
            graph.replay()
        return out

    return replay


class Graphed:
    """A backbone (ldm.types.Backbone) under no_grad. `record` is `recorded`, or what stands in for it."""

    def __init__(self, network: Any, record: Callable[[Work, torch.device], Work] = recorded) -> None:
        self.network, self.record = network, record
        self.graphs: dict[Any, tuple[list[Tensor], Work]] = {}

    def __call__(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """What the network gives, in a tensor of its own."""
        told = {f.name: getattr(conditioning, f.name) for f in fields(conditioning)}
        given = [x, time, *(value for value in told.values() if value is not None)]
        low = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        names = tuple(name for name, value in told.items() if value is not None)
        key = (names, low, tuple((t.shape, t.stride(), t.dtype) for t in given))
        if key not in self.graphs:
            if len(self.graphs) == MOST:
                self.graphs.pop(next(iter(self.graphs)))
            own = [t.clone() for t in given]
            like = Conditioning(**dict(zip(names, own[2:], strict=True)))
            self.graphs[key] = own, self.record(lambda: self.network(own[0], own[1], like), x.device)
        kept, replay = self.graphs[key]
        for mine, value in zip(kept, given, strict=True):
            mine.copy_(value)
        out: Tensor = replay().clone()
        return out
