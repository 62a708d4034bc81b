"""Build the networks of an opened checkpoint, filled with its weights or with other averages of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode

from ldm.checkpoints.lazy import LazyTensor
from ldm.checkpoints.model import NETWORKS, Model
from ldm.checkpoints.posthoc import combine
from ldm.config import build
from ldm.errors import InputError

RANDOM = {"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_"}


def averaged(model: Model, length: float, where: str) -> Model:
    """A run's checkpoint with the average of that length, out of the run's snapshots, as its averages."""
    if model.facts["format"] != "ldm":
        raise InputError(where, "only a run has snapshots of its averages", "pass weights=ema or weights=raw")
    average = combine(model.facts["path"], length, where=where)
    ema = {name: LazyTensor.of(tensor) for name, tensor in average.tensors()}
    return Model(model.config, model.tensors, ema, model.facts)


def networks(model: Model, weights: str = "raw") -> dict[str, Any]:
    """The networks that the checkpoint has, with its weights; `weights` ema: the averages where there are."""
    return {name: filled(model, name, weights) for name in NETWORKS if model.config.get(name) is not None}


def filled(model: Model, name: str, weights: str = "raw") -> Any:
    """One network, built by its config section and filled from the checkpoint; raises InputError.

    A network of which the checkpoint holds nothing was frozen, and brought its own weights.
    """
    own = model.of(name, weights)
    if not own:
        network = build(model.config[name])
        if any(getattr(part, "unfilled", False) for part in network.modules()):
            what = f"neither holds the weights of its {name} nor says where they are"
            raise InputError(
                f"checkpoint={model.facts['path']}", what, f"set {name}.pretrained in its config"
            )
        return network
    with Unfilled():
        network = build(model.config[name])
    kinds = {key: value.dtype for key, value in network.state_dict().items()}
    tensors = {key: value.to(kinds.get(key, value.dtype)).read() for key, value in own.items()}
    try:
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        what = f"its weights do not fit its {name}: {str(error).splitlines()[1].strip()}"
        raise InputError(f"checkpoint={model.facts['path']}", what) from None
    return network


class Unfilled(TorchFunctionMode):
    """Random initial weights are not drawn: the memory is taken, and left as it is until it is filled."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in RANDOM:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
