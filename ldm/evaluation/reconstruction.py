"""What the autoencoder loses: signal-to-noise ratio, structural similarity, edge energy (blur lowers it).

All are taken on uint8 levels, on what a viewer gets. n pictures, H W picture size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.pictures import to_uint8

ROUNDING = 1 / 12  # squared levels: the error that rounding to uint8 hides anyway; caps a picture at 58.9 dB
WINDOW, SIGMA = 11, 1.5  # pixels, of SSIM's Gaussian window


@dataclass(frozen=True)
class ReconstructionScore:
    """`psnr` is the mean over pictures, as the field reports it; `psnr_pooled` of the mean error."""

    psnr: float  # dB
    psnr_pooled: float  # dB; never above psnr
    edge_energy: float  # of the reconstructions over that of the originals; 1 is as sharp
    pictures: int

    def line(self) -> str:
        return f"PSNR {self.psnr:.1f} dB (pooled {self.psnr_pooled:.1f}), edge energy {self.edge_energy:.2f}"


def squared_errors(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean squared error of each picture in squared levels, at least ROUNDING; [n 3 H W] -> float64 [n]."""
    if originals.shape != reconstructions.shape:
        raise ValueError(
            f"originals {tuple(originals.shape)}, reconstructions {tuple(reconstructions.shape)}"
        )
    difference = originals.to(torch.float64) - reconstructions.to(torch.float64)
    return difference.square().flatten(1).mean(1).clamp(min=ROUNDING)


def edge_energy(images: Tensor) -> float:
    """Sum of squared differences of neighbouring pixels, both ways, all pictures together."""
    x = images.to(torch.float64)
    return float((x[..., 1:] - x[..., :-1]).square().sum() + (x[..., 1:, :] - x[..., :-1, :]).square().sum())


def ssim(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity, mean over channels and windows that fit; levels [n 3 H W] -> float32 [n].

    Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004, eq. 13.
    """
    if min(originals.shape[2:]) < WINDOW:
        raise ValueError(f"ssim: pictures of {tuple(originals.shape[2:])} pixels, the window has {WINDOW}")
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weights = (window / window.sum()).tolist()
    x, y = originals.double() / 255, reconstructions.double() / 255  # differences of squares follow
    maps = torch.stack([x, y, x * x, y * y, x * y])
    for axis in (-1, -2):  # a sum of shifts: convolutions may be TF32 or autocast
        shifts = maps.unfold(axis, WINDOW, 1).unbind(-1)
        weighted = (weight * shift for weight, shift in zip(weights, shifts, strict=True))
        maps = sum(weighted, start=torch.zeros_like(shifts[0]))
    mean_x, mean_y, xx, yy, xy = maps
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    variance_x, variance_y = xx - mean_x**2, yy - mean_y**2
    structure = (2 * (xy - mean_x * mean_y) + 0.03**2) / (variance_x + variance_y + 0.03**2)
    return (luminance * structure).flatten(1).mean(1).float()


def score_reconstructions(originals: Tensor, reconstructions: Tensor) -> ReconstructionScore:
    """Compare uint8 pictures [n 3 H W] with their reconstructions; ValueError if no original has an edge."""
    errors = squared_errors(originals, reconstructions)
    reference = edge_energy(originals)
    if reference == 0:
        raise ValueError("the originals have no edges: the edge-energy ratio is undefined")
    return ReconstructionScore(
        psnr=float((10 * torch.log10(255**2 / errors)).mean()),
        psnr_pooled=float(10 * torch.log10(255**2 / errors.mean())),
        edge_energy=edge_energy(reconstructions) / reference,
        pictures=len(originals),
    )


@torch.no_grad()
def reconstruct(autoencoder: Any, images: Tensor, batch_size: int = 45) -> Tensor:
    """uint8 [n 3 H W] through the mode of the posterior and back, on its own device, in eval mode."""
    parameter = next(autoencoder.parameters())
    was_training = autoencoder.training
    autoencoder.eval()
    try:
        parts = []
        for part in images.split(batch_size):
            x = part.to(parameter.device).to(parameter.dtype) / 127.5 - 1
            parts.append(to_uint8(autoencoder.decode(autoencoder.encode(x))).cpu())
    finally:
        autoencoder.train(was_training)
    return torch.cat(parts)


def evaluate_reconstruction(autoencoder: Any, images: Tensor, batch_size: int = 45) -> ReconstructionScore:
    """Reconstruct uint8 pictures [n 3 H W] and compare."""
    return score_reconstructions(images, reconstruct(autoencoder, images, batch_size))
