"""What a config asks of a GPU: operations, activations, bytes that stay. Nothing is computed or stored.

The networks are built without memory and take a training step of fake tensors that pretend to be on a CPU,
for which torch has fused attention, as a GPU has; what autocast keeps in float32 on a GPU is kept so here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop

from ldm.cluster.forecast import Work
from ldm.errors import InputError
from ldm.nn.attention import Transformer2D
from ldm.nn.resnet import ResnetBlock
from ldm.training.adversarial_module import AdversarialAutoencoderModule
from ldm.training.assembly import NETWORKS, build_module
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.module import TrainingModule
from ldm.training.summary import memory, without_weights
from ldm.types import Batch

FUSED_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
IN_FLOAT32 = (F.group_norm, F.layer_norm, F.softmax, F.mse_loss)  # by autocast on a GPU, not on a CPU
NOT_KERNELS = ("aten._to_copy", "aten._unsafe_view", "aten.empty", "aten.detach", "prim.")
# Passes of a network that is trained (forward, and backward for inputs and weights), of LPIPS' (both pictures
# forward are in the count, backward for one of them), and of the discriminator: on both pictures to train it,
# on one to judge, through which the gradient comes back.
TRAINED, PERCEPTUAL, DISCRIMINATOR = 3, 2, 9
RESERVE = 1.5e9  # bytes of the CUDA context and the libraries' workspaces
FRAGMENTS = 1.05  # of what the allocator holds to what is used
JPEG = 50e3  # bytes of a picture with caption and json (laion2B-en at 384 px: 403 MB a shard of 8,000)
OTHER = "other"


@dataclass(frozen=True)
class Workload:
    """One stage of a run. Bytes are of one device."""

    work: Work
    tflop: Mapping[str, float]  # a picture, by network, all passes
    static: Mapping[str, int]  # bytes by name, between steps
    checkpoint: int  # bytes
    fixed: float  # bytes of a micro-batch that do not grow with it: weights cast for autocast
    each: float  # bytes that a picture keeps for the backward pass
    block: float  # bytes a picture needs while a block is computed again
    picture_bytes: float  # as it is read
    gathered: float | None = None  # bytes of the weights as FSDP gathers them for a step; None: it is DDP

    def stays(self, gpus: int) -> float:
        """Bytes on each GPU between steps: DDP keeps gradients twice, FSDP the rows of a GPU."""
        whole, frozen = sum(self.static.values()), self.static.get("frozen", 0)
        if self.gathered is not None:
            return frozen + (whole - frozen) / gpus
        return whole + (self.static["gradients"] if gpus > 1 else 0)

    def memory(self, pictures: float, gpus: int) -> float:
        """Bytes at the end of a forward pass of so many pictures."""
        weights = self.fixed if self.gathered is None else self.gathered
        return FRAGMENTS * (self.stays(gpus) + weights + (self.each + self.block) * pictures) + RESERVE

    def fits(self, capacity: float, gpus: int) -> int:
        """The most pictures that a device of `capacity` bytes can take at once; 0: not even one."""
        rest = capacity - self.memory(0, gpus)
        return max(0, int(rest / (FRAGMENTS * (self.each + self.block))))


def workload(cfg: Mapping[str, Any]) -> Workload:
    """Of a resolved config."""
    module = build_module(without_weights(cfg), device="meta")
    static = memory(module)
    checkpoint = static.pop("checkpoint")
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    side, dtype = side_of(cfg), autocast_of(cfg["trainer"])
    one, two = (trace(module, side, count, dtype) for count in (1, 2))
    each = two.saved - one.saved
    block = 0.0
    recompute = bool(getattr(getattr(module, "backbone", None), "gradient_checkpointing", False))
    if recompute:
        assert isinstance(module.backbone, nn.Module)
        vars(module.backbone)["gradient_checkpointing"] = False
        block = trace(module, side, 1, dtype).largest
        vars(module.backbone)["gradient_checkpointing"] = True
    two.flops.subtract(one.flops)  # less what is once a batch, as an empty caption's context
    flops = {name: count * passes(module, name, recompute, cfg) for name, count in two.flops.items()}
    flops = {name: count for name, count in flops.items() if count and name != OTHER}
    gathered = None
    if strategy_of(cfg) == "fsdp":  # in bf16, or else in float32 and what is cast besides
        narrow = dtype is torch.bfloat16 and not isinstance(module, AutoencoderModule)
        gathered = 2.0 * trained if narrow else static["weights"] + one.saved - each
    networks = trained_networks(module)
    ops = sum(one.ops[name] for name in networks)
    frozen = sum(one.ops.values()) - ops
    return Workload(
        Work(sum(flops.values()), ops, trained, frozen),
        {name: count / 1e12 for name, count in flops.items()},
        static,
        checkpoint,
        one.saved - each,
        each,
        block,
        picture_bytes(cfg, module),
        gathered,
    )


def strategy_of(cfg: Mapping[str, Any]) -> str:
    """auto, ddp, fsdp or another word of a resolved config."""
    strategy = cfg["trainer"].get("strategy", "auto")
    name = strategy.get("_target_", "") if isinstance(strategy, Mapping) else strategy
    return str(name).rpartition(".")[2]


def is_cached(cfg: Mapping[str, Any]) -> bool:
    return str(cfg["data"]["_target_"]).endswith("CachedDataModule")


def passes(module: TrainingModule, name: str, recompute: bool, cfg: Mapping[str, Any]) -> int:
    """How often a step does the work of a forward pass of the network, as it was traced."""
    if name == "discriminator":
        return DISCRIMINATOR
    if name == "perceptual":
        return PERCEPTUAL
    if name in trained_networks(module):
        return TRAINED + (recompute and name == "backbone")
    text = cfg["data"].get("text", True)
    return 0 if is_cached(cfg) and (name == "autoencoder" or (name == "conditioner" and text)) else 1


def trained_networks(module: TrainingModule) -> list[str]:
    own = dict(module.named_children())
    found = [n for n in NETWORKS if n in own and any(p.requires_grad for p in own[n].parameters())]
    return found + (["discriminator"] if isinstance(module, AdversarialAutoencoderModule) else [])


def side_of(cfg: Mapping[str, Any]) -> int:
    side = cfg["data"].get("image_size")
    if not side:
        raise InputError("data.image_size", "not set, and the work of a step depends on it", "set it")
    return int(side)


def autocast_of(trainer: Mapping[str, Any]) -> torch.dtype | None:
    """What the trainer's precision computes in, if that is not how weights are stored."""
    kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return kinds.get(str(trainer.get("precision")))


def picture_bytes(cfg: Mapping[str, Any], module: TrainingModule) -> float:
    """A JPEG, or half-precision moments of its latents and 77 int64 tokens or what towers made of them."""
    if not is_cached(cfg):
        return JPEG
    autoencoder: Any = module.frozen["autoencoder"]
    context = getattr(module.frozen.get("conditioner"), "context_dim", None) or 0
    text = 77 * (2 * context if cfg["data"].get("text", True) else 8)
    return 2 * 2 * autoencoder.latent_channels * (side_of(cfg) / autoencoder.factor) ** 2 + text


# ---- a step of tensors that are not there ---------------------------------------------------------------


@dataclass
class Trace:
    """A forward pass: operations and FLOPs by network, bytes that autograd keeps, most within one block."""

    ops: Counter[str]
    flops: Counter[str]
    saved: int
    largest: int


class Counting(TorchDispatchMode):
    """Counts what reaches the device, for the network that `stack` ends with."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.stack = [OTHER]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and not str(func).startswith(NOT_KERNELS):
            self.ops[self.stack[-1]] += 1
        packet = func._overloadpacket
        if packet is FUSED_ON_CPU:
            self.flops[self.stack[-1]] += sdpa_flop(*(x.shape for x in args[:3]))
        elif packet in flop_registry:
            self.flops[self.stack[-1]] += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


class LikeGPU(TorchFunctionMode):
    """Autocast's list of float32 functions is longer on a GPU than on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in IN_FLOAT32:
            args = tuple(x.float() if isinstance(x, Tensor) else x for x in args)
        return func(*args, **(kwargs or {}))


class Saved:
    """Bytes of the storages that autograd keeps, each once, those of `known` tensors left out."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.kept: list[Tensor] = []  # so that no storage's place is taken by another
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.kept.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


def trace(module: TrainingModule, side: int, pictures: int, dtype: torch.dtype | None) -> Trace:
    """One training step of `pictures` pictures up to its loss; afterwards `module` is fake."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        imitate(module)
        return traced(module, lambda: loss(module, sample(pictures, side)), dtype)


def traced(module: TrainingModule, run: Callable[[], Any], dtype: torch.dtype | None) -> Trace:
    """What `run` does on the CPU, real or fake."""
    counting, saved = Counting(), Saved(parameters(module))
    spans: list[int] = [0]
    gpu = LikeGPU() if dtype is not None else nullcontext()
    casting = torch.autocast("cpu", dtype=dtype) if dtype is not None else nullcontext()
    keeping = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor)
    with watched(module, counting.stack, saved, spans), casting, gpu, counting, keeping:
        run()
    module.recorded.clear()
    return Trace(counting.ops, counting.flops, saved.bytes, max(spans))


def networks(module: TrainingModule) -> dict[str, nn.Module]:
    """All that a step runs, the frozen ones too."""
    found = {**module.frozen, **dict(module.named_children()), **vars(module)}
    return {name: found[name] for name in NETWORKS if isinstance(found.get(name), nn.Module)}


def parameters(module: TrainingModule) -> list[Tensor]:
    return [p for network in networks(module).values() for p in (*network.parameters(), *network.buffers())]


@contextmanager
def watched(module: TrainingModule, stack: list[str], saved: Saved, spans: list[int]) -> Iterator[None]:
    """Within it `stack` ends with the network that runs, and `spans` gets what each block kept."""
    handles, before = [], []

    def enter(name: str, part: nn.Module) -> None:
        stack.append(name)
        if isinstance(part, (ResnetBlock, Transformer2D)):
            before.append(saved.bytes)

    def leave(part: nn.Module) -> None:
        stack.pop()
        if isinstance(part, (ResnetBlock, Transformer2D)):
            spans.append(saved.bytes - before.pop())

    for name, network in networks(module).items():
        for part in network.modules():
            handles.append(part.register_forward_pre_hook(lambda p, args, name=name: enter(name, p)))
            handles.append(part.register_forward_hook(lambda p, args, out: leave(p)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def imitate(module: TrainingModule) -> None:
    """Parameters and buffers on the CPU, fake ones, in place of those on meta; shared ones stay shared."""
    made: dict[int, Any] = {}

    def like(tensor: Tensor) -> Any:
        new = torch.empty_like(tensor, device="cpu")
        return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new

    for network in networks(module).values():
        for part in network.modules():
            for table in (part._parameters, part._buffers):
                for name, tensor in table.items():
                    if tensor is not None and tensor.is_meta:
                        if id(tensor) not in made:
                            made[id(tensor)] = like(tensor)
                        table[name] = made[id(tensor)]
    module.train()


def sample(pictures: int, side: int, device: str = "cpu") -> Batch:
    """A batch that says all that a conditioner may ask, of empty pictures and captions."""
    n = torch.arange(pictures, device=device)
    size = torch.full((pictures, 2), side, device=device)
    image = torch.zeros(pictures, 3, side, side, dtype=torch.uint8, device=device)
    text = [""] * pictures
    weight = torch.ones(pictures, device=device)
    return Batch(n, weight, image=image, caption=text, original_size=size, crop=0 * size, label=0 * n)


def loss(module: Any, batch: Batch) -> Tensor:
    """The loss of a batch; with a discriminator also what it makes of two pictures for each."""
    if not hasattr(module, "reconstruct_and_judge"):
        found: Tensor = module.training_step(batch, 0)
        return found
    images, _, found = module.reconstruct_and_judge(batch)
    if isinstance(module, AdversarialAutoencoderModule):
        module.discriminator(images)
    return found
