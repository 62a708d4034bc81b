"""Numbers and vectors to embeddings: b batch, d width."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_PERIOD = 10000.0


def sinusoid(time: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[b] numbers -> [b d], cosines then sines at geometric frequencies 1 .. 1/10000 (Ho et al. 2020).

    Computed in float64 if `dtype` is float64 and in float32 otherwise: angles go to 1000 radians, of which
    bfloat16 would leave nothing.
    """
    if width % 2:
        raise ValueError(
            f"sinusoid of width {width}: {width} % 2 = 1, a cosine and a sine need an even width"
        )
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    index = torch.arange(width // 2, dtype=exact, device=time.device)
    angle = time.to(exact)[:, None] * torch.exp(index * (-math.log(MAX_PERIOD) / (width // 2)))
    return torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)


class EmbeddingMLP(nn.Module):
    """Linear, SiLU, linear: [b d_in] -> [b d]."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))
