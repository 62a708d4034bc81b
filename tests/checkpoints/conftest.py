"""A small checkpoint, as every test of this folder wants one."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    return {
        "model": {
            "plain": base,
            "view": base[1:3],  # shares the storage of `plain`
            "tied": base,
            "strided": torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last),
            "transposed": base.t(),
            "scalar": torch.tensor(3.5, dtype=torch.float64),
            "empty": torch.zeros(0, 3),
            "count": torch.arange(5),
            "mask": torch.tensor([True, False]),
            "half": torch.randn(3, generator=generator).to(torch.bfloat16),
            "parameter": torch.nn.Parameter(torch.ones(2)),
        },
        "optimizer": {"w.exp_avg": torch.randn(7, generator=generator)},
    }


@pytest.fixture
def documents():
    return {"state.json": {"step": 12, "lr": 0.1 + 0.2, "none": None}, "config.yaml": "a: 1\n# as it is\n"}
