from __future__ import annotations

import math

import pytest
import torch

from ldm.nn.embeddings import EmbeddingMLP, sinusoid


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_sinusoid_is_cosines_then_sines(dtype: torch.dtype, tolerance: float) -> None:
    times, width = [0.0, 0.5, 17.0, 999.0], 10
    out = sinusoid(torch.tensor(times, dtype=dtype), width, dtype)
    angles = [[t * 10000.0 ** (-i / 5) for i in range(5)] for t in times]
    expected = [[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angles]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=dtype), rtol=0, atol=tolerance)
    assert out.dtype == dtype


def test_sinusoid_in_bfloat16_is_rounded_only_at_the_end() -> None:
    time = torch.tensor([3.0, 987.0])
    out = sinusoid(time, 16, torch.bfloat16)
    assert torch.equal(out, sinusoid(time, 16).bfloat16())


def test_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match="7.*1"):
        sinusoid(torch.zeros(1), 7)


def test_embedding_mlp() -> None:
    mlp = EmbeddingMLP(3, 5)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    hidden = x @ mlp.linear_1.weight.T + mlp.linear_1.bias
    expected = (hidden * hidden.sigmoid()) @ mlp.linear_2.weight.T + mlp.linear_2.bias
    torch.testing.assert_close(mlp(x), expected)
