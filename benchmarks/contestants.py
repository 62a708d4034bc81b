"""What benchmarks.convergence compares: recipes for one and the same network, and how each is trained.

Pictures: the quickstart's emoji at 16 px. Latents: the first principal components of patches of 2 x 2
pixels, 8 x 8 of 4 channels, without an autoencoder to train. No text: one token says the object, one the
background. The first contestant has the defaults of diffusers' train_text_to_image.py: epsilon, uniform
times, AdamW at a constant 1e-4 with weight decay 0.01, norm of gradients at most 1, no EMA, batches of 16.
b batch, c channels, h w 8, d 12 numbers of a patch, k candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn

from ldm.backbones.unet import CrossAttentionUNet
from ldm.data.emoji import EmojiSet, Pair
from ldm.diffusion.denoiser import Denoiser, LogitNormal, MinSNR, Simple, Uniform, Unweighted
from ldm.diffusion.noise_scheduler import RectifiedFlow, VariancePreserving
from ldm.diffusion.process import Process
from ldm.diffusion.samplers import ddim, prior
from ldm.random import keyed_normal, keyed_uniform
from ldm.training.ema import EMA
from ldm.types import Conditioning, TimeDistribution, Weighting

SIZE, PATCH, CHANNELS = 16, 2, 4  # pixels, pixels a latent, channels of a latent
WIDTH = 32  # of a token
BATCH = 16  # of diffusers' script
LR, WARMUP = 1e-3, 50  # ours; steps
DECAY = 0.99  # of the moving average, as in the quickstart; diffusers' EMAModel warms up alike
LOG_SNRS = (-5.0, -3.0, -1.0, 1.0, 3.0, 5.0)  # where clean estimates are measured; all processes have them
STEPS = 20  # of DDIM
VALIDATION = 1 << 62  # added to the keys of pictures that are not trained on
Noises = Callable[[int, Tensor, Tensor], Tensor]  # (seed, n [b], latents [b c h w]) -> [b c h w]


@dataclass(frozen=True)
class Pictures:
    """Latents [n c 8 8], of mean 0 and variance 1 in each channel over the training pictures, and what each
    picture shows [n 2].
    """

    latents: Tensor
    shows: Tensor
    held_out: Tensor
    held_out_shows: Tensor
    mean: Tensor  # [12] of patches
    components: Tensor  # [c 12]: a patch of latents 1 in one channel and 0 in the others, less the mean
    objects: int
    backgrounds: int

    def bytes_of(self, latents: Tensor) -> Tensor:
        """uint8 [n 3 H W]."""
        patches = torch.einsum("nchw,cd->nhwd", latents, self.components) + self.mean
        images = rearrange(patches, "n h w (p q c) -> n c (h p) (w q)", p=PATCH, q=PATCH)
        return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def pictures(objects: int = 135, backgrounds: int = 8) -> Pictures:
    emoji = EmojiSet(SIZE, objects, backgrounds)

    def patches(pairs: list[Pair]) -> Tensor:
        images = torch.from_numpy(np.stack([emoji.picture(i, j) for i, j in pairs])).double() / 127.5 - 1
        return rearrange(images, "n (h p) (w q) c -> n h w (p q c)", p=PATCH, q=PATCH)

    train, held_out = patches(emoji.train_pairs), patches(emoji.held_out)
    mean = train.mean((0, 1, 2))
    variances, directions = torch.linalg.eigh(torch.cov((train - mean).flatten(0, 2).T))
    scale, directions = variances[-CHANNELS:].sqrt(), directions[:, -CHANNELS:]

    def encoded(patches: Tensor) -> Tensor:
        return torch.einsum("nhwd,dc->nchw", patches - mean, directions / scale).float()

    return Pictures(
        encoded(train),
        torch.tensor(emoji.train_pairs),
        encoded(held_out),
        torch.tensor(emoji.held_out),
        mean.float(),
        (directions * scale).T.float(),
        objects,
        backgrounds,
    )


# ---- noise


def independent(seed: int, n: Tensor, latents: Tensor) -> Tensor:
    return keyed_normal(seed, n, "noise", latents.shape[1:]).to(latents)


def assigned(seed: int, n: Tensor, latents: Tensor) -> Tensor:
    """The same noises, dealt within the batch so that the sum of squared distances to the latents is least
    (immiscible diffusion, 2406.12303): a picture's noise depends on the others of its batch.
    """
    noise = independent(seed, n, latents)
    distance = torch.cdist(latents.flatten(1), noise.flatten(1)).double() ** 2
    return noise[torch.from_numpy(assignment(distance.numpy()))]


def nearest(seed: int, n: Tensor, latents: Tensor, k: int = 8) -> Tensor:
    """The nearest of k noises of its own (2505.18521): still a function of (seed, n) and the picture."""
    noise = keyed_normal(seed, n, "noise", (k, *latents.shape[1:])).to(latents)
    choice = (noise - latents[:, None]).square().flatten(2).sum(2).argmin(1)
    return noise[torch.arange(len(n)), choice]


def assignment(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """The column of each row that makes the sum of a square matrix least (Kuhn 1955, by shortest paths)."""
    size = len(cost)
    rows, columns = (
        np.zeros(size + 1),
        np.zeros(size + 1),
    )  # potentials; index `size` is a place to start from
    row_of = np.full(size + 1, -1)
    for row in range(size):
        row_of[size], column = row, size
        least, before = np.full(size + 1, np.inf), np.full(size + 1, size)
        visited = np.zeros(size + 1, bool)
        while row_of[column] >= 0:
            visited[column] = True
            here = row_of[column]
            reduced = cost[here] - rows[here] - columns[:size]
            better = ~visited[:size] & (reduced < least[:size])
            least[:size][better], before[:size][better] = reduced[better], column
            nearest_column = int(np.where(visited[:size], np.inf, least[:size]).argmin())
            step = least[nearest_column]
            rows[row_of[visited]] += step
            columns[visited] -= step
            least[:size][~visited[:size]] -= step
            column = nearest_column
        while column != size:
            row_of[column] = row_of[before[column]]
            column = int(before[column])
    return row_of[:size].argsort()


# ---- recipes


@dataclass(frozen=True)
class Recipe:
    """`against` names the recipe that this one changes in one thing; `shares` the one whose training it is,
    looked at with other weights.
    """

    against: str
    process: Callable[[], Process]
    weighting: Weighting
    times: TimeDistribution = Uniform()
    noises: Noises = independent
    lr: float = LR
    warmup: int = WARMUP
    ema: bool = True
    shares: str = ""


def sd(prediction_type: str) -> Callable[[], Process]:
    """Stable Diffusion's table, as in configs/noise_scheduler/sd.yaml."""
    return lambda: VariancePreserving(prediction_type=prediction_type, steps_offset=1)


BASELINE, OURS = "diffusers' script", "rate and EMA"
SCRIPT = Recipe("", sd("epsilon"), Simple(), lr=1e-4, warmup=0, ema=False)
BETTER = Recipe("rate", sd("epsilon"), Simple())
VELOCITY = Recipe("v", sd("v_prediction"), Unweighted(), LogitNormal())
STRAIGHT = Recipe("flow", RectifiedFlow, Unweighted(), LogitNormal())
RECIPES = {
    BASELINE: SCRIPT,
    "EMA": replace(SCRIPT, against=BASELINE, ema=True, shares=BASELINE),
    "rate": replace(BETTER, against=BASELINE, ema=False, shares=OURS),
    OURS: BETTER,
    "min-SNR-5": replace(BETTER, against=OURS, weighting=MinSNR()),
    "immiscible in the batch": replace(BETTER, against=OURS, noises=assigned),
    "v": replace(VELOCITY, against=OURS, times=Uniform()),
    "v, min-SNR-5": replace(VELOCITY, weighting=MinSNR(), times=Uniform()),
    "v, logit-normal": VELOCITY,
    "the same, immiscible in the batch": replace(VELOCITY, against="v, logit-normal", noises=assigned),
    "the same, nearest of 8 noises": replace(VELOCITY, against="v, logit-normal", noises=nearest),
    "sample, logit-normal": replace(VELOCITY, against="v, logit-normal", process=sd("sample")),
    "flow": replace(STRAIGHT, against="v", times=Uniform()),
    "flow, logit-normal": STRAIGHT,
    "flow, logit-normal, nearest of 8": replace(STRAIGHT, against="flow, logit-normal", noises=nearest),
}


# ---- training


class Network(nn.Module):
    """(x, time, shows [b 2]) by the U-Net of the quickstart's kind; two tokens are its context."""

    def __init__(self, data: Pictures, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.unet = CrossAttentionUNet(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            block_out_channels=channels,
            layers_per_block=1,
            transformer_depth=[0] * (len(channels) - 1) + [1],
            mid_depth=1,
            head_dim=16,
            context_dim=WIDTH,
            linear_projection=True,
            norm_groups=8,
        )
        self.tokens = nn.Embedding(data.objects + data.backgrounds, WIDTH)
        self.first_background = data.objects

    def told(self, shows: Tensor) -> Conditioning:
        rows = shows + torch.tensor([0, self.first_background])
        return Conditioning(context=self.tokens(rows))


@dataclass(frozen=True)
class Mark:
    """Where a training has come to: what it took, not counting any measurement."""

    images: int
    cpu_seconds: float
    network: Network
    denoiser: Denoiser
    average: EMA


def order(seed: int, pass_: int, count: int) -> Tensor:
    """Which picture comes when in a pass over all."""
    return keyed_uniform(seed, torch.arange(count) + (pass_ << 32), "order").argsort(stable=True)


def train(
    recipe: Recipe, data: Pictures, seed: int, images: int, marks: list[int], channels: tuple[int, ...]
) -> Iterator[Mark]:
    """Train on `images` pictures, and stop at each mark. Order, weights and draws are the same for all."""
    torch.manual_seed(seed)
    network = Network(data, channels)
    process = recipe.process()
    denoiser = Denoiser(network.unet, process, recipe.weighting)
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr, weight_decay=0.01, fused=True)
    average = EMA(network, DECAY)
    spent, begun, count = 0.0, time.process_time(), len(data.latents)
    for step in range(images // BATCH):
        n = torch.arange(step * BATCH, (step + 1) * BATCH)
        index = torch.cat(
            [order(seed, int(p), count)[n[n // count == p] % count] for p in (n // count).unique()]
        )
        latents = data.latents[index]
        noise = recipe.noises(seed, n, latents)
        position = recipe.times(process, keyed_uniform(seed, n, "time"))
        told = network.told(data.shows[index])
        denoiser.loss(latents, noise, process.time_at(position), told).mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, (step + 1) / max(1, recipe.warmup))
        optimizer.step()
        optimizer.zero_grad()
        average.update(step)
        if (step + 1) * BATCH in marks:
            spent += time.process_time() - begun
            yield Mark((step + 1) * BATCH, spent, network, denoiser, average)
            begun = time.process_time()


# ---- what is measured


@torch.no_grad()
def errors(mark: Mark, data: Pictures) -> list[float]:
    """Mean squared error of the clean estimate at each of LOG_SNRS, of held-out pictures and fixed noise."""
    process, found = mark.denoiser.noise_scheduler, []
    noise = keyed_normal(0, torch.arange(len(data.held_out)) + VALIDATION, "noise", data.held_out.shape[1:])
    told = mark.network.told(data.held_out_shows)
    for log_snr in LOG_SNRS:
        t = process.time_of(torch.full((len(noise),), log_snr))
        alpha, sigma = (level.view(-1, 1, 1, 1) for level in (process.alpha(t), process.sigma(t)))
        clean = mark.denoiser(alpha * data.held_out + sigma * noise.to(data.held_out), t, told)
        found.append(float((clean - data.held_out).square().mean()))
    return found


@torch.no_grad()
def samples(mark: Mark, data: Pictures, steps: int = STEPS) -> Tensor:
    """One picture of each held-out pair by DDIM on a trailing grid, uint8; the same noise for all."""
    grid = mark.denoiser.noise_scheduler.grid(steps, "trailing")
    noise = keyed_normal(0, torch.arange(len(data.held_out)) + VALIDATION, "prior", data.held_out.shape[1:])
    told = mark.network.told(data.held_out_shows)
    x = prior(noise.to(data.held_out), grid)
    x = ddim(lambda x, row: mark.denoiser.at_row(x, row, told), x, grid, noise=lambda i: x)
    return data.bytes_of(x)
