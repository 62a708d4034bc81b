"""AdamW that clips and averages in the pass that it makes anyway: `optimizer=adamw_one_pass`.

On a GPU `ldm/nn/kernels/adamw.py`; elsewhere, and where parameters of a group have had unequally many
gradients, the same in separate passes. Its state is torch's AdamW's, name for name. `TrainingModule` leaves
clipping and the average to an optimizer that has `clip_to` and `average_with`.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ldm.errors import InputError


class OnePassAdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True), clip_grad_norm_ and a moving average."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        if any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            what = "one pass over whole tensors, and trainer.strategy=fsdp keeps rows of them"
            raise InputError("optimizer", what, "use optimizer=adamw")
        self._take_over()
        self._norm: Tensor | None = None
        self._limit: float | None = None
        self._averages: Mapping[Tensor, Tensor] = {}
        self._decay = 0.0
        self._tables: dict[int, Any] = {}
        self._together: dict[int, list[Tensor]] = {}  # of each group: those that have had each step

    def _take_over(self) -> None:
        """What torch's AdamW has in its groups and state, as this one needs it."""
        for group in self.param_groups:
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise InputError(f"optimizer.{name}", "is not part of one pass", "use optimizer=adamw")
            group["fused"] = not any(p.is_meta for p in group["params"])  # on paper there is no such kernel
        for p, state in self.state.items():
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(p.device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._take_over()
        self._together = {}

    def clip_to(self, norm: Tensor, limit: float | None) -> None:
        """For the next step: `norm` of the whole gradient; to be clipped to `limit`, None: not at all.

        A norm that is not finite makes the step change nothing (in separate passes the average comes nearer).
        """
        self._norm, self._limit = norm, limit

    def average_with(self, averages: Mapping[Tensor, Tensor], decay: float) -> None:
        """For the next step: the average of each parameter becomes decay * average + (1 - decay) * p."""
        self._averages, self._decay = averages, decay

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        alike = [self._alike(k, parameters) for k, parameters in enumerate(groups)]
        if all(alike) and all(map(_fits, filter(None, groups))):
            for k, parameters in enumerate(groups):
                if parameters:
                    self._one_pass(k, parameters)
        else:
            self._passes([p for parameters in groups for p in parameters])
        self._norm, self._averages = None, {}
        return loss

    def _alike(self, k: int, parameters: list[Tensor]) -> bool:
        """Whether these, of group `k`, have had equally many steps; the device is asked at the first."""
        if k not in self._together:
            counts = [float(self.state[p].get("step", 0)) for p in parameters]
            self._together[k] = [p for p, n in zip(parameters, counts, strict=True) if n == max(counts)]
        known = self._together[k]
        return len(known) == len(parameters) and all(map(operator.is_, known, parameters))

    def _passes(self, parameters: list[Tensor]) -> None:
        for p in parameters:
            p.grad = _like(cast(Tensor, p.grad), p)  # torch's kernel does not look at the order
        if self._norm is not None and self._limit:
            gradients = [cast(Tensor, p.grad) for p in parameters]
            torch._foreach_mul_(gradients, self._factor(self._norm))
        super().step()
        averaged = [p for p in parameters if p in self._averages]
        if averaged:
            averages = [self._averages[p] for p in averaged]
            torch._foreach_lerp_(
                averages, [p.to(a.dtype) for p, a in zip(averaged, averages, strict=True)], 1 - self._decay
            )

    def _factor(self, norm: Tensor) -> Tensor:
        """As clip_grad_norm_ has it."""
        return (self._limit / (norm + 1e-6)).clamp(max=1.0) if self._limit else torch.ones_like(norm)

    def _one_pass(self, k: int, parameters: list[Tensor]) -> None:
        from ldm.nn.kernels.adamw import Table  # late: it needs Triton

        group, averaged = self.param_groups[k], [p for p in parameters if p in self._averages]
        if averaged and len(averaged) < len(parameters):
            raise ValueError(f"{len(parameters) - len(averaged)} parameters of a group have no average")
        steps = self._steps(parameters)
        gradients = [_like(cast(Tensor, p.grad), p) for p in parameters]
        moments = [[self._moment(p, name) for p in parameters] for name in ("exp_avg", "exp_avg_sq")]
        averages = [self._averages[p] for p in averaged]
        norm = torch.zeros((), device=steps[0].device) if self._norm is None else self._norm
        finite = torch.isfinite(norm)
        torch._foreach_add_(steps, finite.float())
        first, second = (1 - beta ** steps[0].double() for beta in group["betas"])
        told = torch.stack([t.float() for t in (finite, self._factor(norm), first, second.sqrt())])
        self._tables[k] = table = Table.of([parameters, gradients, *moments, averages], self._tables.get(k))
        scalars = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        table.step(told, *scalars, 1 - self._decay if averages else None)

    def _steps(self, parameters: list[Tensor]) -> list[Tensor]:
        """How many steps each has had, on the device; all of a group as many."""
        for p in parameters:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        return [self.state[p]["step"] for p in parameters]

    def _moment(self, p: Tensor, name: str) -> Tensor:
        state = self.state[p]
        if name not in state:
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state[name] = _like(state[name], p)  # a checkpoint may hold another order
        return state[name]


def _like(t: Tensor, p: Tensor) -> Tensor:
    """`t` in the order of memory that `p` has."""
    return t if t.stride() == p.stride() else torch.empty_like(p).copy_(t)


def _fits(parameters: list[Tensor]) -> bool:
    """float32 on a GPU; on a CPU under Triton's interpreter, for tests."""
    told = os.environ.get("TRITON_INTERPRET") == "1"
    where = parameters[0].is_cuda or (told and parameters[0].device.type == "cpu")
    return where and find_spec("triton") is not None and all(p.dtype == torch.float32 for p in parameters)
