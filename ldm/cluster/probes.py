"""What a rank finds out about itself and its host: plain numbers and words; nothing is judged here."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

RIGHT = 256  # side of the matrices that are compared with float64
SIDES = {"cuda": 8192, "cpu": 768}  # of those that are timed: bf16 on a GPU, float32 on a CPU
REPEATS = 5  # the fastest counts: others may use the machine


def facts_of(rank: int, host: str, devices: Sequence[torch.device]) -> dict[str, Any]:
    """All of this rank that needs no other rank."""
    return {
        "rank": rank,
        "host": host,
        "versions": versions(),
        "visible": torch.cuda.device_count(),
        "devices": [device_facts(device) for device in devices],
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "shared_memory": free_bytes("/dev/shm"),
        "memory": available_memory(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def versions() -> dict[str, str]:
    """Of what must be the same everywhere; `-` for what is not there."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["CUDA"] = torch.version.cuda or "-"
    found["driver"] = found["NCCL"] = "-"
    with contextlib.suppress(OSError):
        words = Path("/proc/driver/nvidia/version").read_text().split()
        found["driver"] = next((word for word in words if word[:1].isdigit() and "." in word), "-")
    if torch.cuda.is_available():
        with contextlib.suppress(AttributeError, RuntimeError):  # a build without it
            found["NCCL"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    return found


# ---- the device ----------------------------------------------------------------------------------------


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name, memory in bytes, error and speed of matrix products; `broken` says what it failed with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts: dict[str, Any] = {"name": name, "index": device.index or 0}
    try:
        facts["error"] = compute_error(device)
        facts["rate"] = compute_rate(device)
        if device.type == "cuda":
            facts["memory"], facts["memory_total"] = torch.cuda.mem_get_info(device)
    except RuntimeError as error:  # whatever a driver or a full device raises
        facts["broken"] = " ".join(str(error).split())[:200]
    return facts


def compute_error(device: torch.device) -> float:
    """Greatest error of a float32 product, relative to the greatest value, against float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(RIGHT, RIGHT, dtype=torch.float64, generator=generator) for _ in range(2))
    exact, found = a @ b, (a.float().to(device) @ b.float().to(device)).cpu().double()
    return float((found - exact).abs().max() / exact.abs().max())


def compute_rate(device: torch.device) -> float:
    """FLOP/s of a large product: bf16 on a GPU, float32 on a CPU."""
    side = SIDES.get(device.type, 1024)
    x = torch.ones(
        side, side, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device
    )
    best = min(_timed(lambda: x @ x, device) for _ in range(REPEATS + 1))
    return 2 * side**3 / best


def _timed(work: Any, device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- memory and files ----------------------------------------------------------------------------------


def free_bytes(folder: str) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def available_memory() -> int | None:
    """Bytes of RAM that a new process may take: of the machine, or of the container if that has less."""
    found = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        found.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return min(found, default=None)


def missing_files(paths: Sequence[str]) -> list[str]:
    """Which of the paths this host does not see."""
    return [path for path in paths if not os.path.exists(path)]


def wrong_shards(shards: Sequence[tuple[str, int]]) -> list[str]:
    """Of (path, bytes) those that are missing here or have another size."""
    found = []
    for path, size in shards:
        try:
            here = os.stat(path).st_size
        except OSError as error:
            found.append(f"{path}: {error.strerror}")
            continue
        if here != size:
            found.append(f"{path}: {here:,} bytes, {size:,} on rank 0")
    return found
