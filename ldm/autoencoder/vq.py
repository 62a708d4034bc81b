"""The autoencoder whose latents are entries of a codebook, learnt by gradients or as running means.

van den Oord, Vinyals and Kavukcuoglu, "Neural discrete representation learning" (VQ-VAE), 2017; as stage 1 of
latent diffusion: Esser et al. 2021, Rombach et al. 2022. The diffusion model works on z before it is
quantised, and `decode` quantises. State-dict names are those of diffusers' VQModel.

b batch, c latent channels, h w latent size, n vectors = b*h*w, k codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.autoencoder.base import ConvAutoencoder
from ldm.random import keyed_uniform

DISTANCES = 2**25  # computed at a time: 256 MB
LAPLACE = 1e-5  # of the smoothed counts (VQ-VAE, appendix A.1)


def nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    """Index of the code at the least distance from each vector: [n c], [k c] -> int64 [n].

    In float64: neither autocast nor TF32 touch it, and |e|^2 - 2 z.e loses nothing that float32 had.
    """
    codes = codes.double()
    norms = codes.square().sum(1)
    parts = vectors.double().split(max(1, DISTANCES // len(codes)))
    return torch.cat([torch.addmm(norms, part, codes.T, alpha=-2).argmin(1) for part in parts])


def usage_terms(indices: Tensor, num_codes: int, batch: int) -> dict[str, Tensor]:
    """Share of the codes that these [n] use, and exp of the entropy of how often: each as [batch], to log.

    Of the batch on one device: where n is below a few times num_codes, no codebook could show full usage.
    """
    counts = torch.zeros(num_codes, device=indices.device)
    counts.index_add_(0, indices, torch.ones_like(indices, dtype=counts.dtype))
    share = counts / len(indices)
    perplexity = torch.special.entr(share).sum().exp()
    return {"usage": (counts > 0).float().mean().expand(batch), "perplexity": perplexity.expand(batch)}


class VectorQuantizer(nn.Module):
    """Codebook trained by the gradient of |sg(z) - e|^2 + beta * |z - sg(e)|^2, a mean over values.

    beta weighs the commitment of z to its code, as in the paper (taming-transformers' default weighs the
    other term). z's gradient is that of its code, straight through.
    """

    def __init__(self, num_codes: int, dim: int, beta: float = 0.25) -> None:
        super().__init__()
        self.num_codes, self.dim, self.beta = num_codes, dim, beta
        self.embedding = nn.Embedding(num_codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)

    def forward(self, z: Tensor, weight: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """[b c h w] -> codes with z's gradient, and {"codebook", "usage", "perplexity"}, each [b].

        `weight` [b]: 0 for pictures that must not move the codebook; None: all count.
        """
        indices = self.indices(z)
        codes = self.codes(indices)
        exact = z.to(torch.promote_types(z.dtype, torch.float32))
        commitment = _mean((codes.detach() - exact).square())
        terms = {"codebook": self.loss(codes, exact.detach(), commitment)}
        terms |= usage_terms(indices.flatten(), self.num_codes, len(z))
        if self.training and torch.is_grad_enabled():
            weight = exact.new_ones(len(z)) if weight is None else weight
            self.update(exact.detach(), indices, weight)
        straight = codes.detach() + (exact - exact.detach())  # bit for bit the code
        return straight.to(z.dtype), terms

    def update(self, z: Tensor, indices: Tensor, weight: Tensor) -> None:
        """What a training step does beside the loss: here nothing, the optimizer moves the codes."""

    def loss(self, codes: Tensor, z: Tensor, commitment: Tensor) -> Tensor:
        """The term of the codebook [b], given that of the commitment [b]."""
        return _mean((codes - z).square()) + self.beta * commitment

    def indices(self, z: Tensor) -> Tensor:
        """[b c h w] -> int64 [b h w]."""
        if z.shape[1] != self.dim:
            raise ValueError(f"latents of {z.shape[1]} channels, but the codes have {self.dim}")
        with torch.no_grad():
            vectors = z.permute(0, 2, 3, 1)
            return nearest(vectors.flatten(0, 2), self.embedding.weight).view(vectors.shape[:3])

    def codes(self, indices: Tensor) -> Tensor:
        """int64 [b h w] -> [b c h w], channels last."""
        return self.embedding(indices).permute(0, 3, 1, 2)


class EMAVectorQuantizer(VectorQuantizer):
    """Codebook of running means of the vectors that chose each code; trained by beta * commitment alone.

    Each forward pass in training mode (each micro-batch) moves the means by 1 - `decay`; the sums are over
    all ranks, so the codebooks stay equal. A code chosen less often than `restart` times the average takes
    the place of a vector of the batch, drawn by its number and the number of updates before (0: never); the
    first batch so places all codes. Restarts depend on how a batch is dealt to ranks. VQ-VAE, appendix A.1;
    restarts as in Jukebox (Dhariwal et al. 2020).
    """

    counts: Tensor  # float32 [k], running mean of the choices a batch
    sums: Tensor  # float32 [k c], running mean of the sum of the vectors
    updates: Tensor  # int64 []

    def __init__(
        self, num_codes: int, dim: int, beta: float = 0.25, decay: float = 0.99, restart: float = 0.1
    ) -> None:
        super().__init__(num_codes, dim, beta)
        if not 0 < decay < 1 or not 0 <= restart < 1:
            raise ValueError(f"decay={decay} must be in (0, 1), and restart={restart} in [0, 1)")
        self.decay, self.restart = decay, restart
        self.embedding.requires_grad_(False)
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("sums", self.embedding.weight.detach().clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_pre_hook(_start_means)

    def loss(self, codes: Tensor, z: Tensor, commitment: Tensor) -> Tensor:
        return self.beta * commitment

    @torch.no_grad()
    def update(self, z: Tensor, indices: Tensor, weight: Tensor) -> None:
        """One step of the means, by z [b c h w], its codes [b h w] and the pictures' weights [b].

        Never asks the device for a value.
        """
        k = self.num_codes
        counted = (weight > 0).to(self.sums).repeat_interleave(indices[0].numel())[:, None]
        vectors = z.permute(0, 2, 3, 1).flatten(0, 2).to(self.sums)
        world, rank = 1, 0
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed:
            world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        code = torch.arange(k, device=z.device)
        draw = (keyed_uniform(k, self.updates * k + code, "restart") * len(vectors)).long()
        rows = torch.cat([counted, vectors * counted], 1)  # whether it counts, and the vector
        facts = rows.new_zeros(k, 1 + self.dim)  # choices, sum of vectors
        facts.index_add_(0, indices.flatten(), rows)
        offered = rows[draw.clamp_max(len(rows) - 1)] * (code % world == rank)[:, None]
        facts = torch.cat([facts, offered], 1)
        if distributed:
            torch.distributed.all_reduce(facts)
        chosen, sums, usable, offered = facts.split([1, self.dim, 1, self.dim], 1)
        self.counts.lerp_(chosen[:, 0], 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        if self.restart:
            average = chosen.sum() / k
            dead = ((self.counts < self.restart * average) | (self.updates == 0)) & (usable[:, 0] > 0)
            self.counts.copy_(torch.where(dead, average, self.counts))
            self.sums.copy_(torch.where(dead[:, None], offered * average, self.sums))
        total = self.counts.sum()
        smoothed = (self.counts + LAPLACE) / (total + k * LAPLACE) * total
        self.embedding.weight.copy_(self.sums / smoothed[:, None])
        self.updates += 1


class AutoencoderVQ(ConvAutoencoder):
    """`moments` [b c h w] are z before it is quantised; `decode` quantises. Options: `ConvAutoencoder`.

    `quantizer(dim=latent_channels)` makes the codebook.
    """

    moments_per_latent = 1

    def __init__(
        self, quantizer: Callable[..., VectorQuantizer], latent_channels: int = 3, **options: Any
    ) -> None:
        super().__init__(latent_channels=latent_channels, **options)
        self.quantize = quantizer(dim=latent_channels)

    def forward(
        self, images: Tensor, noise: Tensor | None = None, weight: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction [b 3 H W], and the quantizer's terms; there is nothing to sample with `noise`."""
        codes, terms = self.quantize(self.sample(self.moments(images), noise), weight)
        return self._decode(codes), terms

    def sample(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        return moments.to(torch.promote_types(moments.dtype, torch.float32))

    def decode(self, latents: Tensor) -> Tensor:
        """[b c h w] -> [b 3 H W], about [-1, 1] but not clamped, from the codes nearest to the latents."""
        return self._decode(self.quantize.codes(self.quantize.indices(self._unscaled(latents))))


def _mean(x: Tensor) -> Tensor:
    """[b c h w] -> [b], without the copies of `mean` of a flat tensor."""
    return x.sum((1, 2, 3)) / x[0].numel()


def _start_means(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
    """A codebook without running means (of diffusers, or trained by gradients) starts them at its codes."""
    weight = state_dict.get(f"{prefix}embedding.weight")
    if weight is not None and f"{prefix}counts" not in state_dict:
        start = {
            "counts": torch.ones(len(weight)),
            "sums": weight.float().clone(),
            "updates": torch.tensor(1),
        }
        state_dict.update({prefix + name: value for name, value in start.items()})  # type: ignore[attr-defined]
