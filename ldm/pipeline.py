"""A checkpoint that makes pictures: prompt -> context -> noise -> sampler -> latents -> decoded picture.

`pipe = ldm.load(PATH); pipe(["a red apple"], num_steps=30, guidance_scale=5, seed=0)` gives PIL images, each
with its recipe in `image.info["parameters"]`. Picture i of seed s is the picture of seed s + i: its noise is
keyed by that seed alone, so it does not depend on the batch size, the device or the other prompts.
b batch, c latent channels, h w latent size, H W picture size.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.autoencoder.tiling import tiled_decode, tiled_encode
from ldm.checkpoints.building import averaged, networks
from ldm.checkpoints.model import Model
from ldm.checkpoints.opening import content_hash, open_model
from ldm.config import build
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import guided
from ldm.diffusion.inpainting import keep_known
from ldm.diffusion.samplers import prior
from ldm.errors import InputError
from ldm.nn.compiling import compile_blocks
from ldm.nn.graph import Graphed
from ldm.nn.norm import fused
from ldm.pictures import read_picture, to_pil, to_uint8
from ldm.random import keyed_normal
from ldm.sampling.recipes import recipe_of
from ldm.sampling.request import Request, Source, request_of, soft_edge, whole
from ldm.types import Batch, Conditioning, Denoise, Sampler

WEIGHTS = re.compile(r"raw|ema(:(\d*\.\d+))?")
BATCH_SIZE = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Pipeline:
    """Networks in evaluation mode, and the settings that their checkpoint samples with.

    One of a first stage has the autoencoder alone, and draws nothing.
    sampler   see `__call__`
    sampling  the defaults num_steps, spacing, guidance_scale, height, width, and others of `request`
    dtype     what the networks compute in (autocast); weights, latents and solver stay in float32
    name, digest, weights   of the checkpoint, for the recipes
    speed     compile, fused_norm, cuda_graph: as in configs/sample.yaml; they change the last bits
    """

    def __init__(
        self,
        autoencoder: Any,
        conditioner: Any = None,
        backbone: Any = None,
        noise_scheduler: Any = None,
        sampler: str | Mapping[str, Any] | Sampler = "ddim",
        sampling: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        name: str = "",
        digest: str = "",
        weights: str = "ema",
        speed: Mapping[str, bool] | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype or torch.float32
        if conditioner is not None:
            conditioner.use_autoencoder(autoencoder)
        for network in (autoencoder, conditioner, backbone):
            if network is not None:
                network.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.autoencoder, self.conditioner, self.backbone = autoencoder, conditioner, backbone
        self.noise_scheduler = noise_scheduler
        self.speed = {"compile": False, "fused_norm": False, "cuda_graph": False, **(speed or {})}
        self.denoiser = Denoiser(self._quickened(), noise_scheduler)
        self.sampler, self.sampling = sampler, {"guidance_rescale": 0.0, **(sampling or {})}
        self.name, self.digest, self.weights = name, digest, weights

    @classmethod
    def of(cls, model: Model, weights: str = "ema", **options: Any) -> Pipeline:
        """The pipeline of an opened checkpoint: its networks, filled, and its settings."""
        config, path = model.config, Path(model.facts["path"])
        size = config["data"]["image_size"]
        drawn = config.get("backbone") is not None
        for name in ("autoencoder", "conditioner"):
            if drawn and config.get(name) is None:
                raise InputError(
                    f"checkpoint={path}", f"holds no {name}", "give a checkpoint that is complete"
                )
        return cls(
            **networks(model, "raw" if weights == "raw" else "ema"),
            noise_scheduler=build(config["noise_scheduler"]) if drawn else None,
            sampler=config["sampler"] if config.get("sampler") is not None else "ddim",
            sampling={"height": size, "width": size, **(config.get("sampling") or {})},
            name=f"{config.get('run_name') or path.parent.name} {path.name}",
            weights=weights,
            **options,
        )

    def _quickened(self) -> Any:
        """The backbone as `speed` asks for it; raises InputError where there is no GPU for it."""
        if self.speed["cuda_graph"] and not self._may_record():
            raise InputError("speed.cuda_graph", "there is no GPU to record one on", "leave it false")
        if self.speed["compile"]:
            for network in (self.autoencoder, self.backbone):
                if network is not None:
                    compile_blocks(network)
        return Graphed(self.backbone) if self.speed["cuda_graph"] else self.backbone

    def _may_record(self) -> bool:
        return self.device.type == "cuda"

    @property
    def multiple(self) -> int:
        """What height and width are multiples of: the autoencoder's factor, doubled by each further level."""
        levels = len(getattr(self.backbone, "down_blocks", "x"))
        return int(self.autoencoder.factor * 2 ** (levels - 1))

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        num_images: int = 1,
        seed: int | Sequence[int] = 0,
        batch_size: int | None = None,
        progress: bool | Callable[[], None] = False,
        **options: Any,
    ) -> list[Image.Image]:
        """`num_images` pictures of each prompt, prompt after prompt; picture i has the seed `seed` + i.

        seed        or one for each picture
        batch_size  pictures at a time: changes memory and speed, and of pictures only the last bits
        progress    a bar on stderr, or what is to be called after each step
        options     those of `request`: negative_prompt, num_steps, guidance_scale, height, init_image, ...
        Raises InputError for what cannot be drawn, before any work.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = [text for text in texts for _ in range(whole("num_images", num_images, 1))]
        if not texts:
            raise InputError("prompt", "there is none", 'give one: prompt="a red apple"')
        seeds = [seed + i for i in range(len(texts))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(texts):
            raise InputError("seed", f"{len(seeds)} for {len(texts)} pictures", "give one, or one for each")
        request = self.request(**options)
        size = whole("batch_size", BATCH_SIZE if batch_size is None else batch_size, 1)
        pictures: list[Image.Image] = []
        with bar(math.ceil(len(texts) / size) * (len(request.grid) - 1), progress) as advance:
            for first in range(0, len(texts), size):
                part, its_seeds = texts[first : first + size], seeds[first : first + size]
                drawn = to_pil(to_uint8(self._draw(part, its_seeds, request, advance)))
                for k, picture in enumerate(drawn):
                    place = (len(part), k)
                    text = recipe_of(request, part[k], its_seeds[k], place, self._model())
                    picture.info["parameters"] = text
                pictures += drawn
        return pictures

    def request(
        self,
        *,
        negative_prompt: str = "",
        num_steps: int | None = None,
        sampler: str | Mapping[str, Any] | Sampler | None = None,
        spacing: str | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        guidance_interval: Sequence[float] | None = None,
        height: int | None = None,
        width: int | None = None,
        init_image: Source | None = None,
        mask_image: Source | None = None,
        strength: float | None = None,
        prompt_weights: bool = False,
        clip_skip: int = 1,
        tile: int | None = None,
    ) -> Request:
        """The settings of a call, checked; what is None comes from the checkpoint. Raises InputError.

        sampler            name of a file in configs/sampler, the section of such a config, or a function
        guidance_interval  (low, high): guidance acts at low < sigma / alpha <= high alone
        init_image         picture to start from, cut to height and width, or for an upscaler the small one
        strength           share of the steps that are made, in (0, 1], from noise over init_image; 1 keeps
                           next to nothing of it. By default 0.8, and 1 where the network is shown the
                           picture: that starts from noise alone, as in training
        mask_image         where init_image is drawn anew: white. Pixels farther than a latent cell from white
                           stay as they are, bit for bit
        prompt_weights     read (word:1.3), [word], BREAK, prompts of any length: conditioning/prompts.py
        clip_skip          which text layer: 1 the one trained with, 2 the one before it, ...
        tile               pixels: encode and decode in overlapping squares of that side, to save memory
        """
        if self.backbone is None:
            fix = "give a run whose diffusion stage has saved a checkpoint"
            what = "holds an autoencoder alone, which draws nothing"
            raise InputError(f"checkpoint={self.name}", what, fix)
        given = {
            "num_steps": num_steps,
            "sampler": sampler,
            "spacing": spacing,
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
            "guidance_interval": guidance_interval,
            "height": height,
            "width": width,
        }
        defaults = {
            "sampler": self.sampler,
            "guidance_rescale": 0.0,
            "guidance_interval": None,
            **self.sampling,
        }
        shown = self.conditioner.source_scale
        if init_image is None and self.conditioner.needs_source:
            raise InputError("init_image", "this checkpoint draws from a picture", "give it: init_image=FILE")
        if shown and shown > 1 and init_image is not None and height is None and width is None:
            given["width"], given["height"] = (side * shown for side in read_picture(init_image).size)
        settings: dict[str, Any] = {
            name: defaults.get(name) if value is None else value for name, value in given.items()
        }
        return request_of(
            self.noise_scheduler,
            self.multiple,
            negative_prompt=negative_prompt,
            init_image=init_image,
            mask_image=mask_image,
            strength=(1.0 if shown else 0.8) if strength is None else strength,
            prompt_weights=prompt_weights,
            clip_skip=clip_skip,
            tile=tile,
            source_scale=shown,
            **settings,
        )

    def _model(self) -> dict[str, str | None]:
        """The recipe's fields of the checkpoint; those that say the usual are None."""
        names = {dtype: name for name, dtype in DTYPES.items() if dtype != torch.float32}
        return {
            "name": self.name,
            "hash": self.digest[:10],
            "weights": None if self.weights == "ema" else self.weights,
            "precision": names.get(self.dtype),
        }

    def _draw(
        self, prompts: Sequence[str], seeds: Sequence[int], request: Request, advance: Callable[[], None]
    ) -> Tensor:
        """Images [b 3 H W], about [-1, 1]; row i depends on prompts[i] and seeds[i] alone."""
        factor = self.autoencoder.factor
        shape = (self.autoencoder.latent_channels, request.height // factor, request.width // factor)
        noise = partial(self._noise, seeds, shape)
        low = self.dtype != torch.float32
        computing = torch.autocast(self.device.type, dtype=self.dtype if low else None, enabled=low)
        with computing, fused(self.speed["fused_norm"]):
            denoise, latents = self._guided(prompts, seeds, request), None
            encode, decode = self._codec(request.tile)
            alone = request.source is not None and request.strength == 1  # the network is shown the picture
            if request.start is not None:
                image = request.start.to(self.device, torch.float32) / 127.5 - 1
                if not alone:
                    latents = encode(image.contiguous(memory_format=torch.channels_last))
            if request.mask is not None and request.source is None:
                assert latents is not None
                cells = torch.nn.functional.max_pool2d(request.mask.to(self.device, torch.float32), factor)
                denoise = keep_known(denoise, latents, cells)
                if request.strength == 1:  # what is under the mask does not count
                    latents = (1 - cells) * latents
            x = prior(noise("noise"), request.grid, latents)
            x = x.contiguous(memory_format=torch.channels_last)
            fresh, after = (lambda i: noise(f"step-{i}")), (lambda i, denoised: advance())
            latents = request.sampler(denoise, x, request.grid, noise=fresh, callback=after)
            images = decode(latents)
        if request.mask is None:
            return images
        share = soft_edge(request.mask, factor).to(self.device)
        return torch.lerp(image.expand_as(images), images.float(), share.expand_as(images))

    def _guided(self, prompts: Sequence[str], seeds: Sequence[int], request: Request) -> Denoise:
        conditioning, null = self._conditioning(prompts, seeds, request)
        scale, rescale = request.guidance_scale, request.guidance_rescale
        return guided(self.denoiser, conditioning, null, scale, rescale, interval=request.guidance_interval)

    def _codec(self, tile: int | None) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """The autoencoder's encode and decode; in tiles of so many pixels that overlap by an eighth."""
        if tile is None:
            return self.autoencoder.encode, self.autoencoder.decode
        cells = tile // self.autoencoder.factor
        overlap = min(-(-cells // 8), cells // 2) * self.autoencoder.factor
        given = {"tile": tile, "overlap": overlap}
        return (
            partial(tiled_encode, self.autoencoder, **given),
            partial(tiled_decode, self.autoencoder, **given),
        )

    def _noise(self, seeds: Sequence[int], shape: Sequence[int], purpose: str) -> Tensor:
        """Noise [b c h w] that is a function of each picture's seed and the purpose alone."""
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        return torch.cat([keyed_normal(seed, zero, purpose, shape) for seed in seeds])

    def _conditioning(
        self, prompts: Sequence[str], seeds: Sequence[int], request: Request
    ) -> tuple[Conditioning, Conditioning | None]:
        """That of the prompts, and what guidance pushes away from: nothing said, or the negative prompt."""
        b, conditioner, device = len(prompts), self.conditioner, self.device
        if request.prompt_weights or request.clip_skip != 1:
            conditioner = conditioner.reading(request.prompt_weights, request.clip_skip)
        size = torch.tensor([[request.height, request.width]], device=device).expand(b, -1)
        n = torch.tensor([seed % 2**63 for seed in seeds], device=device)
        batch = Batch(n, torch.ones(b, device=device), caption=list(prompts), original_size=size)
        batch = replace(batch, crop=torch.zeros_like(size), target_size=size)
        if request.source is not None:  # what an upscaler enlarges, and an inpainting network fills in
            source = request.source.to(device).expand(b, -1, -1, -1)
            batch = replace(batch, source=source)
            if request.mask is not None:
                mask = request.mask.to(device).expand(b, -1, -1, -1)
                batch = replace(batch, image=source, mask=mask)
        conditioning: Conditioning = conditioner(batch)
        if request.guidance_scale == 1:
            return conditioning, None
        if request.negative_prompt:
            return conditioning, conditioner(replace(batch, caption=[request.negative_prompt] * b))
        return conditioning, conditioner.null(conditioning)


@contextlib.contextmanager
def bar(total: int, shown: bool | Callable[[], None]) -> Iterator[Callable[[], None]]:
    """A progress bar of solver steps on stderr, with the time left; yields what moves it by one.

    With a function for `shown`, that is what counts the steps.
    """
    if not shown or callable(shown):
        yield shown or (lambda: None)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("sampling", total=total)
        yield lambda: progress.advance(task)


def load(
    path: str | os.PathLike[str],
    weights: str = "ema",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    speed: Mapping[str, bool] | None = None,
) -> Pipeline:
    """The pipeline of a run, a stage, a checkpoint directory, a diffusers folder or a single file.

    weights: ema, where there are averages; ema:0.08, that of this length out of the run's snapshots
    (checkpoints/posthoc.py); or raw, those the optimizer last left. dtype: also as fp32, bf16, fp16. Nothing
    in a stranger's checkpoint can run code: pickles are read for tensors alone (checkpoints/pickles.py), and
    a config builds only what `ldm.build` allows.
    """
    choice = WEIGHTS.fullmatch(weights)
    if choice is None:
        raise InputError(f"weights={weights}", "no such option", "have: ema, raw, ema:LENGTH as in ema:0.08")
    length = choice[2]
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise InputError(f"precision={dtype}", "no such option", f"have: {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    model = open_model(path)
    if length:
        model = averaged(model, float(length), where=f"weights={weights}")
    digest = content_hash(model, "raw" if weights == "raw" else "ema")
    if length:
        digest = hashlib.sha256(f"{digest}:{length}".encode()).hexdigest()
    return Pipeline.of(model, weights, device=device, dtype=dtype, digest=digest, speed=speed)
