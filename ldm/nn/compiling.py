"""Blocks compiled in place by Inductor, one by one: a small network's worth of compiling, names unchanged."""

from __future__ import annotations

import torch
from torch import nn

from ldm.nn.attention import PixelAttention, Transformer2D
from ldm.nn.resnet import ResnetBlock

BACKEND = "inductor"
BLOCKS = (ResnetBlock, Transformer2D, PixelAttention)
CHOICES = ("torch.nn.attention._backend_from_string", "torch.nn.attention._sdpa_kernel")  # of a kernel
SHAPES = 4096  # of one kind of block: a U-Net of SD's kind has about 20 of each, with each bucket's sizes


def cache_folder() -> str | None:
    """Where torch keeps compiled code for later processes; None if it is told not to."""
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir() if config.fx_graph_cache else None


def compile_blocks(network: nn.Module) -> int:
    """Compile each block of `network`, for the shapes it meets; blocks of equal shapes share the code.

    Returns how many there are. Beyond `SHAPES`, or where Python is not followed, it raises: Dynamo would
    quietly run the block as it is. Dynamo's limits are those of the process.
    """
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = SHAPES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    from torch._inductor import config  # takes seconds

    # What they are given is in the key of torch's cache, and they do nothing once a graph is traced.
    config.unsafe_marked_cacheable_functions |= dict.fromkeys(CHOICES, torch.__version__)
    blocks = [block for block in network.modules() if isinstance(block, BLOCKS)]
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, backend=BACKEND)
    return len(blocks)
