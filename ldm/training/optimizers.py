"""Optimizers that torch lacks: Muon for matrices, AdamW with 8-bit moments, schedule-free AdamW.

All state is plain tensors and numbers under the parameter, so that checkpoints keep it by name, and no step
waits for the device. Groups are those of `optim.parameter_groups`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.adamw import adamw

from ldm.training.sharding import local

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: singular values to about 1 in five rounds
BLOCK = 256  # values that share a scale
SMALLEST_8BIT = 4096  # parameters with fewer values keep float32 moments
Closure = Callable[[], Any] | None


class Optimizer(torch.optim.Optimizer):
    """Runs the closure, then `update(group, parameters)` on those of each group that have a gradient."""

    def step(self, closure: Closure = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                if parameters := [p for p in group["params"] if p.grad is not None]:
                    self.update(group, parameters)
        return loss

    def update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        raise NotImplementedError

    def adamw(self, group: Mapping[str, Any], parameters: list[Tensor]) -> None:
        """Torch's AdamW step, with its state."""
        for p in parameters:
            if not self.state[p]:
                moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                self.state[p] |= {"step": torch.zeros((), device="cpu"), **moments}
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            gradients_of(parameters),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def gradients_of(parameters: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


# ---- Muon ----------------------------------------------------------------------------------------------


class Muon(Optimizer):
    """Momentum whose singular values are set to about 1, for groups with `matrices`; AdamW for the others.

    Jordan et al. 2024; the step has the size of AdamW's, 0.2 sqrt(max(rows, columns)) (Liu et al. 2025), so
    one learning rate serves both. A kernel [o i h w] is the matrix [o, h w i]. Not torch.optim.Muon, which
    takes no kernels, makes its matrices one by one, and would need a second optimizer beside it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        rounds: int = 5,
    ) -> None:
        own = {"momentum": momentum, "rounds": rounds, "matrices": False}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **own})

    def update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        if not group["matrices"]:
            return self.adamw(group, parameters)
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        gradients = gradients_of(parameters)
        moments = [self.state[p]["momentum"] for p in parameters]
        torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, moments, group["momentum"])  # Nesterov's look ahead
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        for places in same_shape(updates):
            stack = torch.stack([updates[k].movedim(1, -1).flatten(1) for k in places])
            step = -0.2 * group["lr"] * max(stack.shape[1:]) ** 0.5
            for k, matrix in zip(places, orthogonal(stack, group["rounds"]), strict=True):
                kernel = updates[k].movedim(1, -1).shape
                parameters[k].add_(matrix.view(kernel).movedim(-1, 1), alpha=step)


def same_shape(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Places of tensors of one shape, together: they are one batched product."""
    found: dict[torch.Size, list[int]] = defaultdict(list)
    for k, tensor in enumerate(tensors):
        found[tensor.shape].append(k)
    return list(found.values())


def orthogonal(matrices: Tensor, rounds: int) -> Tensor:
    """bf16 [n r c]: U S V^T to about U V^T by Newton and Schulz's iteration, in bf16."""
    a, b, c = NEWTON_SCHULZ
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    x = x.to(torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(rounds):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).contiguous()


# ---- AdamW in 8 bits -----------------------------------------------------------------------------------


class AdamW8bit(Optimizer):
    """AdamW whose moments take a byte a value and a float32 scale for each 256 (Dettmers et al. 2022).

    Two changes: the second moment is kept as its root, which needs half the range, so that a small value
    beside a large one does not become 0 and its step huge; and a block follows the order in memory.
    Not bitsandbytes, which waits for the device at each tensor and has no such step on a CPU.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.codes: dict[tuple[torch.device, bool], Tensor] = {}

    def update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        small = [p for p in parameters if p.numel() < SMALLEST_8BIT]
        if small:
            self.adamw(group, small)
        for p in parameters:
            if p.numel() >= SMALLEST_8BIT:
                self._update_8bit(group, p)

    def _update_8bit(self, group: Mapping[str, Any], p: Tensor) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            blocks = -(-p.numel() // BLOCK)
            state["step"] = 0
            for name in ("mean", "root"):
                state[name] = torch.zeros_like(p, dtype=torch.uint8)
                state[f"{name}_scale"] = torch.zeros(blocks, device=p.device)
        state["step"] += 1
        assert p.grad is not None
        gradient = in_memory(torch.empty_like(p, dtype=torch.float32).copy_(p.grad))
        mean, root = (self._load(state, name) for name in ("mean", "root"))
        mean.lerp_(gradient, 1 - beta1)
        root.square_().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2).sqrt_()
        self._store(state, "mean", mean)
        self._store(state, "root", root)
        root.div_((1 - beta2 ** state["step"]) ** 0.5).add_(group["eps"])
        values = in_memory(p)
        values.mul_(1 - group["lr"] * group["weight_decay"])
        values.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1 ** state["step"]))

    def _codes(self, name: str, device: torch.device) -> Tensor:
        key = (device, name == "mean")
        if key not in self.codes:
            self.codes[key] = dynamic_codes(signed=name == "mean").to(device)
        return self.codes[key]

    def _load(self, state: Mapping[str, Any], name: str) -> Tensor:
        """float32 [numel], in the order of memory."""
        stored = in_memory(state[name])
        values = self._codes(name, stored.device)[stored.int()]
        scale = state[f"{name}_scale"].repeat_interleave(BLOCK, output_size=BLOCK * -(-len(values) // BLOCK))
        return values.mul_(scale[: len(values)])

    def _store(self, state: Mapping[str, Any], name: str, values: Tensor) -> None:
        codes = self._codes(name, values.device)
        blocks = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(1)
        blocks = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        nearest = torch.bucketize(blocks, (codes[1:] + codes[:-1]) / 2, out_int32=True, right=True)
        state[f"{name}_scale"].copy_(scale)
        in_memory(state[name]).copy_(nearest.flatten()[: len(values)])


def in_memory(tensor: Tensor) -> Tensor:
    """A dense tensor as the vector that lies in memory, whatever the order of its dimensions."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def dynamic_codes(signed: bool) -> Tensor:
    """float32 [256], ascending, in [-1, 1] or [0, 1]: 7 decades, each finer (Dettmers et al. 2022)."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1, dtype=torch.float64)
        middles = (10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2).tolist()
        values += [sign * middle for middle in middles for sign in ((1, -1) if signed else (1,))]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


# ---- schedule-free AdamW -------------------------------------------------------------------------------


class ScheduleFreeAdamW(Optimizer):
    """AdamW that needs no decaying schedule, because the average of its iterates is what counts.

    Defazio et al. 2024. The parameters are the points y at which gradients are taken; the state keeps the
    iterates z; the average is x = y + (z - y) (1 - 1 / beta1). `average_into` puts x in the place of the
    EMA, so validation, pictures and samples use it and nothing is switched to and fro.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        own = {"updates": 0, "lr_max": 0.0, "weight_sum": 0.0}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **own})

    def update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        group["updates"] += 1
        group["lr_max"] = max(lr, group["lr_max"])
        group["weight_sum"] += group["lr_max"] ** 2
        share = group["lr_max"] ** 2 / group["weight_sum"] if group["weight_sum"] else 0.0
        for p in parameters:
            if not self.state[p]:
                self.state[p] |= {"z": p.detach().clone(), "exp_avg_sq": torch.zeros_like(p)}
        gradients = gradients_of(parameters)
        z = [self.state[p]["z"] for p in parameters]
        squares = [self.state[p]["exp_avg_sq"] for p in parameters]
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        roots = torch._foreach_div(squares, 1 - beta2 ** group["updates"])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        steps = torch._foreach_div(gradients, roots)
        if group["weight_decay"]:
            torch._foreach_add_(steps, parameters, alpha=group["weight_decay"])
        torch._foreach_lerp_(parameters, z, share)
        torch._foreach_add_(parameters, steps, alpha=lr * (beta1 * (1 - share) - 1))
        torch._foreach_sub_(z, steps, alpha=lr)

    @torch.no_grad()
    def average_into(self, averages: Mapping[Tensor, Tensor]) -> None:
        """Fill the tensor beside each parameter with its x; beside a sharded one is this rank's rows."""
        for group in self.param_groups:
            known = [p for p in group["params"] if self.state[p] and p in averages]
            if known:
                found = [averages[p] for p in known]
                torch._foreach_copy_(found, [local(p) for p in known])
                z = [local(self.state[p]["z"]).to(averages[p].dtype) for p in known]
                torch._foreach_lerp_(found, z, 1 - 1 / group["betas"][0])
