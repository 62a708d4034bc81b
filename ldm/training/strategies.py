"""How several processes train one model: DDP, or FSDP2 where weights and their moments outgrow a device.

What `trainer.strategy` names. Both are Lightning's DDPStrategy underneath, for its processes and collectives;
its FSDP strategies want GPUs or refuse bf16-mixed and 64-true, wrap modules, and bring their own checkpoints.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from ldm.autoencoder.vq import EMAVectorQuantizer
from ldm.conditioning.base import ConditionerModule
from ldm.errors import InputError
from ldm.training.adversarial_module import AdversarialAutoencoderModule
from ldm.training.autoencoder_module import AutoencoderModule
from ldm.training.module import TrainingModule
from ldm.training.one_pass import OnePassAdamW
from ldm.training.optimizers import AdamW8bit, Muon
from ldm.training.sharding import roots, shard

DTYPES = ("float32", "bfloat16")
INSTEAD = "use trainer=ddp"


def ddp(
    bucket_cap_mb: float = 288,
    reduce_dtype: str = "auto",
    static_graph: bool | str = "auto",
    find_unused_parameters: bool = False,
    timeout: float = 600,
    first_timeout: float = 3600,
) -> DDP:
    """Every rank has all; gradients are averaged in buckets while backward runs. Options: configs/trainer."""
    _check("reduce_dtype", reduce_dtype, ("auto", *DTYPES))
    _check("static_graph", static_graph, ("auto", True, False))
    options = {"bucket_cap_mb": bucket_cap_mb, "find_unused_parameters": find_unused_parameters}
    return DDP(reduce_dtype, static_graph, timeout, first_timeout, **options)


def fsdp(reduce_dtype: str = "float32", timeout: float = 600, first_timeout: float = 3600) -> FSDP:
    """Every rank has its rows of the weights, their averages and the optimizer's state."""
    _check("reduce_dtype", reduce_dtype, DTYPES)
    return FSDP(getattr(torch, reduce_dtype), timeout, first_timeout)


def named(trainer: Mapping[str, Any], processes: int) -> DDP | FSDP | None:
    """What the strategy of a trainer section is if it is a word of ours; None for any other: Lightning's."""
    word = trainer.get("strategy", "auto")
    if word == "ddp" or (word == "auto" and processes > 1):
        return ddp()
    return fsdp() if word == "fsdp" else None


def _check(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        words = ", ".join(str(word).lower() for word in known)
        raise InputError(f"trainer.strategy.{name}={value}", "no such choice", f"it takes: {words}")


class Processes(DDPStrategy):
    """Lightning's processes, with more patience until the first optimizer step is over.

    That step waits for indices, compilation and the first batch; later a rank that is late by `timeout`
    seconds hangs, and the others end instead of holding their devices.
    """

    def __init__(self, timeout: float, first_timeout: float, **options: Any) -> None:
        super().__init__(timeout=timedelta(seconds=first_timeout), **options)
        self._patience = first_timeout, timeout
        self._first = True

    def setup_distributed(self) -> None:
        """The group may be there since another stage, which has ended its patience."""
        super().setup_distributed()
        wait(self._patience[0])

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().optimizer_step(*args, **kwargs)
        if self._first:
            wait(self._patience[1])
            self._first = False
        return result

    @property
    def trained(self) -> TrainingModule:
        return cast(TrainingModule, self.lightning_module)

    def mixed_bf16(self) -> bool:
        plugin = self.precision_plugin
        return isinstance(plugin, MixedPrecision) and plugin.precision == "bf16-mixed"


def wait(seconds: float) -> None:
    """How long collectives wait from now on."""
    change = getattr(distributed_c10d, "set_timeout", None) or distributed_c10d._set_pg_timeout
    change(timedelta(seconds=seconds), torch.distributed.group.WORLD)


class DDP(Processes):
    """DistributedDataParallel, set up by what is trained."""

    def __init__(
        self,
        reduce_dtype: str,
        static_graph: bool | str,
        timeout: float,
        first_timeout: float,
        **options: Any,
    ) -> None:
        # No buffer differs between ranks: latent scale and running means of a codebook come from all of them.
        known = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options |= {"gradient_as_bucket_view": True, name: False}
        super().__init__(timeout, first_timeout, **options)
        self.reduce_dtype, self.static_graph = reduce_dtype, static_graph

    def configure_ddp(self) -> None:
        """A graph is static in stage 2: in stage 1 a discriminator joins, and takes gradients of its own."""
        static = self.static_graph
        if static == "auto":
            whole = self.trained.trainer.accumulate_grad_batches == 1
            static = whole and not isinstance(self.trained, AutoencoderModule)
        self._ddp_kwargs["static_graph"] = static
        loop: Any = self.trained.trainer.fit_loop.epoch_loop
        working = getattr(loop, "working", None)  # gradients are those of working weights, if there are any
        with nullcontext() if working is None else working.held():
            super().configure_ddp()
        narrow = self.reduce_dtype == "bfloat16" or (self.reduce_dtype == "auto" and self.mixed_bf16())
        if narrow:  # Lightning registers hooks on GPUs alone
            cast(Any, self.model).register_comm_hook(None, bf16_compress_hook)


class FSDP(Processes):
    """`fully_shard` over all ranks: weights are gathered and gradients reduced once an optimizer step.

    In bf16-mixed stage 2 gathers its weights in bf16 (rows, averages and optimizer keep float32), autocast
    goes on deciding what is computed in what; stage 1 gathers float32, since it measures latents without it.
    """

    def __init__(self, reduce_dtype: torch.dtype, timeout: float, first_timeout: float) -> None:
        super().__init__(timeout, first_timeout)
        self.reduce_dtype = reduce_dtype

    def configure_ddp(self) -> None:
        """In the place of wrapping: the module stays itself, its networks are sharded."""
        module = self.trained
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.contiguous()
            torch.distributed.broadcast(tensor.data, 0)  # rows of one model, whatever each rank drew
        narrow = self.mixed_bf16() and not isinstance(module, AutoencoderModule)
        double = any(p.dtype == torch.float64 for p in module.parameters())
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if narrow else None,
            reduce_dtype=None if double else self.reduce_dtype,
            cast_forward_inputs=False,  # times and latents would be rounded
        )
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        for network in _networks(module):
            shard(network, mesh, policy)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """A micro-batch that is not the last: its gradient stays here, and the weights stay gathered."""
        parts = roots(self.trained)
        for part in parts:
            part.set_requires_gradient_sync(False)
            part.set_reshard_after_backward(False)
        try:
            yield
        finally:
            for part in parts:
                part.set_requires_gradient_sync(True)
                part.set_reshard_after_backward(True)

    def teardown(self) -> None:
        """Lightning's, but that nothing sharded is moved: a DTensor on a CPU has no mesh there."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def check(trainer: pl.Trainer, module: TrainingModule) -> None:
    """Raise an InputError for what the trainer's strategy cannot train; before anything is written."""
    strategy, shares = trainer.strategy, trainer.accumulate_grad_batches
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    if isinstance(strategy, FSDP):
        require_shardable(module, scaled)
    if scaled:
        require_scalable(module, bool(trainer.gradient_clip_val))
    if isinstance(strategy, DDP) and strategy.static_graph is True and shares > 1:
        # torch 2.15 ends in an internal error, in the first backward that is not reduced
        what = f"goes with no trainer.accumulate_grad_batches={shares}"
        raise InputError("trainer.strategy.static_graph=true", what, "set it to auto")


def require_scalable(module: TrainingModule, clips: bool) -> None:
    """Raise an InputError for optimizers that would see a gradient of fp16 as its scaler made it."""
    made: Any = getattr(module.make_optimizer, "func", module.make_optimizer)
    if made is OnePassAdamW:
        what = "adamw_one_pass does not unscale fp16 gradients"
        raise InputError("optimizer", what, "use optimizer=adamw, or trainer.precision=bf16-mixed")
    if clips and getattr(module.make_optimizer, "keywords", {}).get("fused"):  # it unscales after clipping
        what = "true cannot clip fp16 gradients"
        raise InputError("optimizer.fused", what, "set it false, or use trainer.precision=bf16-mixed")


def require_shardable(module: TrainingModule, scaled: bool) -> None:
    """Raise an InputError for what is not the same, or does not work, when each rank has some rows."""
    made: Any = getattr(module.make_optimizer, "func", module.make_optimizer)
    if made in (Muon, AdamW8bit):
        what = f"{made.__name__} needs whole matrices, and fsdp gives each rank some rows"
        raise InputError("optimizer", what, "use optimizer=adamw or trainer=ddp")
    if scaled:
        what = "16-mixed looks for overflow in the gradients of one rank"
        raise InputError("trainer.precision", what, "use bf16-mixed or 32-true with fsdp")
    if isinstance(module, AdversarialAutoencoderModule):
        what = "the discriminator's weight is measured within backward, where fsdp gathers and reduces"
        raise InputError("trainer.strategy", what, INSTEAD)
    if any(isinstance(part, EMAVectorQuantizer) for part in module.modules()):
        what = "this codebook moves by running means, which fsdp would not see"
        raise InputError("trainer.strategy", what, INSTEAD)
    single = [name for name, p in module.named_parameters() if p.ndim == 0]
    if single:
        raise InputError("trainer.strategy", f"{single[0]} is one number, and fsdp deals rows", INSTEAD)


def _networks(module: TrainingModule) -> Iterator[nn.Module]:
    """What is called as a whole: of conditioners the towers, since a Conditioning tells hooks no tensors."""
    waiting = list(module.children())
    while waiting:
        network = waiting.pop()
        if isinstance(network, (ConditionerModule, nn.ModuleDict)):
            waiting += network.children()
        elif any(p.requires_grad for p in network.parameters()):
            yield network
