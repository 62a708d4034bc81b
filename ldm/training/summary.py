"""What a run would be, before it runs: shapes, parameters, memory, epochs, the size of a checkpoint.

The networks are built on the meta device and the optimizer takes a step there: nothing is read or computed,
and what is counted is what training will make, whatever the networks and the optimizer are.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints.optimizer import flatten_optimizer
from ldm.config import build, plain
from ldm.errors import InputError
from ldm.training.adversarial_module import AdversarialAutoencoderModule
from ldm.training.assembly import NETWORKS, build_module
from ldm.training.callbacks.checkpoint import names_of
from ldm.training.module import TrainingModule
from ldm.types import Batch, Conditioning

WEIGHTS = ("pretrained", "weights")  # keys that name files of weights, of networks that can do without

log = logging.getLogger(__name__)


def summary(cfg: Mapping[str, Any]) -> list[str]:
    """Lines about one stage, of a resolved config; sizes in bytes of 1000s, for each device."""
    module = build_module(without_weights(cfg), device="meta")
    size = memory(module)
    batch, whose = _batch(cfg)
    steps, images = cfg["trainer"]["max_steps"], cfg["data"]["global_batch_size"]
    saved = size.pop("checkpoint")
    parts = ", ".join(f"{name} {_bytes(value)}" for name, value in size.items() if value)
    lines = [f"steps       {steps:,} of {images:,} images", *_shapes(cfg, module, batch, whose)]
    lines += [f"parameters  {line}" for line in parameters(module)]
    lines.append(f"memory      {parts}: {_bytes(sum(size.values()))} a device, before activations")
    lines.append(f"epoch       {_epoch(cfg)}")
    lines.append(f"checkpoint  {_bytes(saved)}")
    return lines


def log_summary(cfg: Mapping[str, Any]) -> None:
    """The summary into the log, if the config's `summary` asks for it."""
    if cfg.get("summary"):
        for line in summary(cfg):
            log.info("%s", line)


def comments(stages: Sequence[Any]) -> list[str]:
    """The summary of each config as lines of YAML that say nothing to YAML."""
    lines = []
    for cfg in stages:
        lines += [f"# {cfg.run_name} {cfg.stage}".rstrip(), *(f"#   {line}" for line in summary(plain(cfg)))]
    return lines


def parameters(module: TrainingModule) -> list[str]:
    """How many parameters each network has that are trained, and how many that are not."""
    everything = {**module.frozen, **vars(module), **dict(module.named_children())}
    networks = {name: part for name, part in everything.items() if isinstance(part, nn.Module)}
    seen: set[int] = set()
    lines = []
    for name in sorted(networks, key=lambda n: NETWORKS.index(n) if n in NETWORKS else len(NETWORKS)):
        own = {id(p): p for p in networks[name].parameters() if id(p) not in seen}
        seen |= own.keys()
        trained = sum(p.numel() for p in own.values() if p.requires_grad)
        rest = sum(p.numel() for p in own.values()) - trained
        counts = [f"{n:,} {what}" for n, what in ((trained, "trained"), (rest, "frozen")) if n]
        lines += [f"{name}: {', '.join(counts)}"] if counts else []
    return lines


def memory(module: TrainingModule) -> dict[str, int]:
    """Bytes by name of what stays on a device between steps, and of a checkpoint; `module` is on meta."""
    for name in ("make_optimizer", "make_discriminator_optimizer"):
        make: Any = getattr(module, name, None)
        if getattr(make, "keywords", {}).get("fused"):  # meta is no device for it
            setattr(module, name, functools.partial(make, fused=False))
    optimizer = module.configure_optimizers()
    trained = [p for p in module.parameters() if p.requires_grad]
    state = _stepped(optimizer, trained)
    if isinstance(module, AdversarialAutoencoderModule):
        assert module.discriminator_optimizer is not None
        judge = list(module.discriminator.parameters())
        state += _stepped(module.discriminator_optimizer, judge)
        trained += judge
    assert module.ema is not None
    profiles = [tensor for profile in module.ema.profiles.values() for tensor in profile]
    average, extra = _size([*module.ema.average, *profiles]), module.extra_state()[0]
    frozen = [p for network in module.frozen.values() for p in (*network.parameters(), *network.buffers())]
    frozen += [p for p in module.parameters() if not p.requires_grad]
    weights = _size(trained)
    found = {"weights": weights, "gradients": weights, "average": average, "optimizer": state}
    moments = flatten_optimizer(optimizer, names_of(module))[0]
    saved = [module.state_dict(), module.ema.state_dict(), moments, *extra.values()]
    return {
        **found,
        "frozen": _size(frozen),
        "checkpoint": sum(_size(tensors.values()) for tensors in saved),
    }


def _stepped(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> int:
    """Bytes of the optimizer's state after its first step."""
    for p in parameters:
        p.grad = torch.empty_like(p)
    optimizer.step()
    return _size(value for state in optimizer.state.values() for value in state.values())


def _size(values: Iterable[Any]) -> int:
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def without_weights(node: Any) -> Any:
    """The config with `random` where it names weights to read."""
    if isinstance(node, Mapping):
        return {
            key: "random" if key in WEIGHTS and value else without_weights(value)
            for key, value in node.items()
        }
    return [without_weights(value) for value in node] if isinstance(node, (list, tuple)) else node


def _batch(cfg: Mapping[str, Any]) -> tuple[int, str]:
    """Samples in a forward pass, and whose; of all devices together if their number is not known here."""
    trainer, data = cfg["trainer"], cfg["data"]
    devices = trainer["devices"]
    if devices in (-1, "-1", "auto"):
        devices = torch.cuda.device_count()
    count = len(devices) if isinstance(devices, (list, tuple)) else int(devices)
    if not count:
        return data["global_batch_size"], "of all devices"
    world = count * trainer["num_nodes"]
    even = data["global_batch_size"] // (world * trainer["accumulate_grad_batches"])
    return data.get("batch_size") or even, f"of each of {world} device{'s' if world > 1 else ''}"


def _shapes(cfg: Mapping[str, Any], module: TrainingModule, batch: int, whose: str) -> list[str]:
    autoencoder: Any = module.frozen.get("autoencoder") or getattr(module, "autoencoder", None)
    side = cfg["data"].get("image_size")
    shapes: dict[str, list[int]] = {"images": [batch, 3, side, side]}
    if autoencoder is not None and side:
        latent = side // autoencoder.factor
        shapes["latents"] = [batch, autoencoder.latent_channels, latent, latent]
    conditioner: Any = module.frozen.get("conditioner") or getattr(module, "conditioner", None)
    tokens = []
    if conditioner is not None:
        told: Conditioning = conditioner(one_sample(side or autoencoder.factor))
        given = {name: value for name, value in vars(told).items() if isinstance(value, Tensor)}
        shapes |= {name: [batch, *value.shape[1:]] for name, value in given.items()}
        if told.context is not None:
            length, everyone = told.context.shape[1], cfg["data"]["global_batch_size"]
            tokens = [f"tokens      {length:,} a caption, {length * everyone:,} a step"]
    text = ", ".join(f"{name} [{' '.join(map(str, shape))}]" for name, shape in shapes.items())
    return [f"shapes      {text} {whose}", *tokens]


def one_sample(side: int) -> Batch:
    """One on the meta device that says all that a conditioner may ask."""
    one, two = (torch.empty(shape, dtype=torch.int64, device="meta") for shape in ((1,), (1, 2)))
    image = torch.empty(1, 3, side, side, dtype=torch.uint8, device="meta")
    return Batch(one, one.float(), image=image, caption=[""], original_size=two, crop=two, label=one)


def _epoch(cfg: Mapping[str, Any]) -> str:
    try:
        images = build(cfg["data"]).known_size()
    except InputError as error:
        return f"not known: {error}"
    if not images:
        return "not known before the shards are packed and indexed"
    batch = cfg["data"]["global_batch_size"]
    passes = cfg["trainer"]["max_steps"] * batch / images
    return f"{images:,} images, {images / batch:,.1f} steps; the run is {passes:,.2f} epochs"
