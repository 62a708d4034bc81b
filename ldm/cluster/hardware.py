"""What GPUs and the wires between them can do at best: data sheets, in FLOP/s, bytes and bytes/s.

Peaks are of dense bf16. `domain` is how many GPUs share the fast links, `network` what all network cards of
one such domain carry together. Sources: NVIDIA's data sheets of A100, H100, H200, HGX B200 and GB200 NVL72;
cards as in DGX machines, one a GPU of 200 (A100) or 400 Gbit/s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

# What collectives reach of a line's rate. NCCL's large all-reduces: about 230 of 300 GB/s on NVLink of A100,
# 350 of 400 GB/s on eight cards of H100.
LINE_SHARE = 0.8
LATENCY = 10e-6  # seconds a collective takes for each doubling of the GPUs, there and back


@dataclass(frozen=True)
class GPU:
    """One GPU and its place among others."""

    name: str
    flops: float  # FLOP/s
    memory: float  # bytes that a process can have
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to the others of its domain, one direction
    network: float  # bytes/s out of its domain, all cards together
    domain: int = 8


GPUS = {
    "a100": GPU("A100", 312e12, 84.9e9, 2.04e12, 300e9, 8 * 25e9),
    "h100": GPU("H100", 989e12, 84.9e9, 3.35e12, 450e9, 8 * 50e9),
    "h200": GPU("H200", 989e12, 149e9, 4.8e12, 450e9, 8 * 50e9),
    "b200": GPU("B200", 2250e12, 180e9, 8e12, 900e9, 8 * 50e9),
    "gb200": GPU("GB200", 2500e12, 186e9, 8e12, 900e9, 72 * 50e9, domain=72),
}


@dataclass(frozen=True)
class Cluster:
    """So many of one kind of GPU, in domains that a network joins."""

    gpu: GPU
    gpus: int

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpu.domain)

    @property
    def line(self) -> float:
        """bytes/s of the narrowest line that a ring through all GPUs crosses, of what it reaches."""
        rate = self.gpu.link if self.nodes == 1 else min(self.gpu.link, self.gpu.network)
        return LINE_SHARE * rate

    def of(self, gpus: int) -> Cluster:
        return replace(self, gpus=gpus)

    def all_reduce(self, size: float) -> float:
        """Seconds to sum `size` bytes on every GPU: a ring sends each byte 2 (N - 1) / N times."""
        return 2 * self.reduce_scatter(size)

    def reduce_scatter(self, size: float) -> float:
        """Half an all-reduce; an all-gather takes as long."""
        if self.gpus == 1:
            return 0.0
        share = (self.gpus - 1) / self.gpus
        return share * size / self.line + LATENCY * math.log2(self.gpus)

    def inside(self) -> Cluster:
        """The GPUs of one node, which the fast links join."""
        return self.of(min(self.gpus, self.gpu.domain, 8))
