"""Which kernel computes an attention: on a GPU the one that is fastest at its shape, found by trying each.

torch has four: flash, cuDNN's, a memory-efficient one, and plain products. Which is fastest depends on the
shape, the GPU and versions (cuDNN's is up to twice as fast as flash on an H100, and slower on an A100), so
each is timed when a shape is first met, on random numbers laid out in memory as the real ones are. Under
`torch.compile` that is while Dynamo traces, which takes the answer for a constant. What was found is kept in
a file, by GPU, versions and shape. On a CPU nothing is chosen.

b batch, h heads, l queries, l' keys, w width of a head.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import statistics
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

log = logging.getLogger(__name__)

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
NAMES = ("default", "auto", *KERNELS)  # what `use_attention` takes
DEVICES = ("cuda",)  # where a kernel is chosen
FEW_SCORES = 1 << 24  # b h l l' up to which `auto` tries plain products, which keep all of them
WARM_UP, TURNS, EACH = 2, 3, 5  # calls before the clock runs; medians of so many times so many calls


class Shape(NamedTuple):
    """All that the time of an attention depends on; str() names it in the file."""

    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    query_row: int  # numbers in memory from one token to the next: more than h w where products are fused
    key_row: int
    dtype: torch.dtype
    masked: bool
    grad: bool  # a backward pass follows

    def __str__(self) -> str:
        sizes = "x".join(map(str, self[:5]))
        words = f"{sizes} rows {self.query_row} {self.key_row} {str(self.dtype).removeprefix('torch.')}"
        return words + (" masked" if self.masked else "") + (" with gradient" if self.grad else "")


Measure = Callable[[Shape, str], float | None]  # seconds; None: the kernel cannot; inf: no memory to try it


def fastest(seconds: Mapping[str, float]) -> str:
    """The name with the fewest seconds; "default" if none could be tried."""
    tried = {name: value for name, value in seconds.items() if math.isfinite(value)}
    return min(tried, key=tried.__getitem__) if tried else "default"


class Chooser:
    """Shape -> name of a kernel, or "default": of `names` the fastest by `measure`; each shape is tried once.

    `file` keeps what was found, under `section`. Several processes may share it: it is replaced whole, the
    last one wins, and a choice that is lost is made again. A file that cannot be read or written is ignored.
    """

    def __init__(
        self, names: Sequence[str], measure: Measure, file: Path | None = None, section: str = ""
    ) -> None:
        self.names, self.measure, self.file, self.section = tuple(names), measure, file, section
        self.known: dict[str, str] = {}
        for key, entry in _read(file).get(section, {}).items():
            if isinstance(entry, dict) and entry.get("chosen") in self.names:
                self.known[key] = entry["chosen"]

    def __call__(self, shape: Shape) -> str:
        key = str(shape)
        if key not in self.known:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return "default"  # a graph would keep the trials; known shapes are as ever
            found = {
                name: self.measure(shape, name) for name in self.names if _worth(shape, name, self.names)
            }
            seconds = {name: value for name, value in found.items() if value is not None}
            self.known[key] = fastest(seconds)
            times = {name: round(1e3 * value, 4) for name, value in seconds.items() if math.isfinite(value)}
            said = ", ".join(f"{name} {value} ms" for name, value in times.items())
            log.info("attention %s: %s (%s)", key, self.known[key], said or "none of the kernels takes it")
            if times and len(times) == len(seconds):
                self._keep(key, {"chosen": self.known[key], "ms": times})
        return self.known[key]

    def _keep(self, key: str, entry: dict[str, Any]) -> None:
        if self.file is None:
            return
        document = _read(self.file)
        document.setdefault(self.section, {})[key] = entry
        beside = self.file.with_name(f"{self.file.name}.{uuid.uuid4().hex}")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(document, indent=1) + "\n")
            beside.replace(self.file)
        except OSError:
            log.debug("%s: choices of attention are not kept", self.file, exc_info=True)
            with contextlib.suppress(OSError):
                beside.unlink()


def _worth(shape: Shape, name: str, names: Sequence[str]) -> bool:
    """Plain products of many scores are slow, and may not leave memory for what is to come."""
    few = shape.batch * shape.heads * shape.queries * shape.keys <= FEW_SCORES
    return name != "math" or few or len(names) == 1


def _read(file: Path | None) -> dict[str, dict[str, Any]]:
    """Entries by section and key; {} if the file is not there or is not one of ours."""
    try:
        document = json.loads(file.read_text()) if file is not None else {}
    except (OSError, ValueError):
        return {}
    whole = isinstance(document, dict) and all(isinstance(part, dict) for part in document.values())
    return document if whole else {}


# ---- measuring -----------------------------------------------------------------------------------------


def attempt(shape: Shape, name: str, device: str = "cuda") -> Callable[[], Any]:
    """A function that computes such an attention once by kernel `name`, with its gradients if asked for."""
    generator = torch.Generator(device).manual_seed(0)  # the global one is the training's

    def tensor(tokens: int, row: int) -> Tensor:
        inner = shape.heads * shape.width
        whole = torch.empty(shape.batch, tokens, max(row, inner), dtype=shape.dtype, device=device)
        part = whole.normal_(generator=generator)[..., :inner]
        return part.unflatten(-1, (shape.heads, shape.width)).transpose(1, 2).requires_grad_(shape.grad)

    q = tensor(shape.queries, shape.query_row)
    k, v = (tensor(shape.keys, shape.key_row) for _ in range(2))
    mask = None
    if shape.masked:
        mask = torch.ones(shape.batch, 1, 1, shape.keys, dtype=torch.bool, device=device)
    up = torch.ones(shape.batch, shape.queries, shape.heads, shape.width, dtype=shape.dtype, device=device)

    def compute() -> Any:
        with sdpa_kernel(KERNELS[name]):
            out = F.scaled_dot_product_attention(q, k, v, mask)
        return torch.autograd.grad(out, [q, k, v], up.transpose(1, 2)) if shape.grad else out

    return compute


def seconds_of(
    shape: Shape,
    name: str,
    device: str = "cuda",
    clock: Callable[[], float] = time.perf_counter,
) -> float | None:
    """Median seconds of an attention, forward and, with `shape.grad`, backward. See `Measure`.

    Waits for the device: at the first steps of a run, never later.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # torch says why a kernel cannot
            torch.inference_mode(False),
            torch.set_grad_enabled(shape.grad),
            torch.autocast(device, enabled=False),
        ):
            compute = attempt(shape, name, device)
            for _ in range(WARM_UP):
                compute()
            found = []
            for _ in range(TURNS):
                wait()
                began = clock()
                for _ in range(EACH):
                    compute()
                wait()
                found.append((clock() - began) / EACH)
            return statistics.median(found)
    except torch.OutOfMemoryError:
        return math.inf
    except RuntimeError:  # "No available kernel"
        return None


# ---- what the networks call ----------------------------------------------------------------------------

_name = "default"
_chooser: Chooser | None = None  # made at the first shape: a process must not touch other GPUs than its own


def use_attention(name: str) -> None:
    """From now on GPUs compute attention by the kernel `name`, where it takes the shape; "auto": the fastest.

    "default": torch's own choice. ValueError for other names than `NAMES`.
    """
    global _name, _chooser
    if name not in NAMES:
        raise ValueError(f"attention={name} is none of {', '.join(NAMES)}")
    _name, _chooser = name, None
    if name != "default":
        torch.compiler.assume_constant_result(chosen)


def cache_file() -> Path | None:
    """In the user's folder for caches; None if there is no such folder."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # a user without a home
        return None
    return root / "ldm" / "attention.json"


def about_device() -> str:
    """What a choice is good for."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return f"{gpu}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"


def chosen(*shape: Any) -> str:
    """The kernel for a `Shape`. Dynamo calls it while it traces and keeps what it says."""
    global _chooser
    if _chooser is None and _name == "auto":
        _chooser = Chooser(list(KERNELS), seconds_of, cache_file(), about_device())
    elif _chooser is None:
        _chooser = Chooser([_name], seconds_of)
    return _chooser(Shape(*shape))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k' / sqrt w) v: [b h l w], twice [b h l' w] -> [b h l w]; `mask` bool, False: ignored.

    `mask` broadcasts to [b h l l'].
    """
    if _name == "default" or q.device.type not in DEVICES:
        return F.scaled_dot_product_attention(q, k, v, mask)
    batch, heads, queries, width = q.shape
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    name = chosen(
        *(batch, heads, queries, k.shape[2], width, q.stride(2), k.stride(2)),
        *(q.dtype, mask is not None, grad),
    )
    if name == "default":
        return F.scaled_dot_product_attention(q, k, v, mask)
    with sdpa_kernel(KERNELS[name]):
        return F.scaled_dot_product_attention(q, k, v, mask)
