"""The next batch goes to the GPU while the step computes: copies on a stream of their own.

Lightning's fetcher holds the next batch already, to know which one is the last: nothing more is taken from
the loader, and what counts as consumed are steps (`ldm/data/state.py`). Large tensors come pinned from the
loader's thread. Small ones do not: their copy waits for all that its stream does, which on the step's own
stream would be the step, and here is nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from ldm.types import Batch


class Prefetch:
    """Batches to `device`, one ahead. `cuda` is torch.cuda, or what stands in for it in a test."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device, self.cuda = device, cuda
        self.stream = cuda.Stream(device)
        self.ahead: tuple[Batch, Batch, Any] | None = None  # on the host, on the device, copied when

    def start(self, batch: Batch) -> None:
        """Begin to copy the batch that `take` is asked for next."""
        with self.cuda.stream(self.stream):
            moved = batch.to(self.device, non_blocking=True)
            self.ahead = batch, moved, self.stream.record_event()

    def take(self, batch: Batch) -> Batch:
        """The batch on the device, for the current stream: as `start` copied it, or copied now."""
        ahead, self.ahead = self.ahead, None
        if ahead is None or ahead[0] is not batch:
            return batch.to(self.device, non_blocking=True)
        _, moved, copied = ahead
        current = self.cuda.current_stream(self.device)
        current.wait_event(copied)
        for tensor in moved.tensors().values():
            tensor.record_stream(current)  # else the next copy may get its memory while it is still read
        return moved
