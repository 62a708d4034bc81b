"""A CUDA graph's stand-in on the CPU: operations are noted once and run again, nothing of the host with them.

What a graph would get wrong is wrong here too: a number that Python read at the first time stays, a tensor
that is not written in place is the first one for ever.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = tree_map(alias, (args, kwargs or {}))  # shapes as they are now: some change in place
        out = operation(*args, **(kwargs or {}))
        self.operations.append((operation, *given, tree_map(alias, out)))
        return out

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, out in self.operations:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                in_place = not isinstance(old, torch.Tensor) or old.data_ptr() == new.data_ptr()  # or a view
                if not in_place:
                    old.copy_(new)


def alias(value):
    """The same memory, if it is a tensor."""
    return value.detach() if isinstance(value, torch.Tensor) else value


class Recorder:
    """In the place of `ldm.nn.graph.recorded`."""

    def __init__(self):
        self.tapes, self.replayed = [], 0

    def __call__(self, work, device):
        assert device.type == "cpu"
        work()  # a graph is warmed up
        tape = Tape()
        with tape:
            out = work()
        self.tapes.append(tape)

        def replay():
            tape.replay()
            self.replayed += 1
            return out

        return replay
