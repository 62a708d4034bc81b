"""A checkpoint that makes pictures: prompt -> context -> noise -> sampler -> latents -> decoded picture.

`pipe = ldm.load(PATH); pipe(["a red apple"], num_steps=30, guidance_scale=5, seed=0)` gives PIL images, each
with its recipe in `image.info["parameters"]`. Picture i of seed s is the picture of seed s + i: its noise is
keyed by that seed alone, so it does not depend on the batch size, the device or the other prompts.
b batch, c latent channels, h w latent size, H W picture size.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import ldm
from ldm.checkpoints.native import MANIFEST, load_document, load_tensors, resolve
from ldm.checkpoints.networks import load_network
from ldm.config import CONFIG_DIR, build, from_yaml, plain
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import guided
from ldm.diffusion.samplers import prior, truncate
from ldm.errors import InputError
from ldm.pictures import open_picture, recipe, to_pil, to_tensor, to_uint8
from ldm.random import keyed_normal
from ldm.types import Batch, Conditioning, Grid, Sampler

NETWORKS = ("autoencoder", "conditioner", "backbone")
MAX_STEPS = 1000
BATCH_SIZE = 8
SAMPLERS = {"euler": "Euler", "euler_ancestral": "Euler a", "heun": "Heun", "dpmpp_2m": "DPM++ 2M"}
FIELD_NAMES = {
    **SAMPLERS,
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "karras": "Karras",
    "uniform": "Uniform",
}  # of recipes


@dataclass(frozen=True)
class Request:
    """One call's settings, checked and with the checkpoint's defaults filled in."""

    negative_prompt: str
    num_steps: int
    sampler: Sampler
    sampler_name: str
    spacing: str
    guidance_scale: float
    guidance_rescale: float
    height: int
    width: int
    grid: Grid  # shortened for image to image
    start: Tensor | None  # uint8 [1 3 H W], the picture to start from
    strength: float


class Pipeline:
    """Networks in evaluation mode, and the settings that their checkpoint samples with.

    One of a first stage has the autoencoder alone, and draws nothing.
    sampler   see `__call__`
    sampling  the defaults num_steps, spacing, guidance_scale, guidance_rescale, height, width
    dtype     what the networks compute in (autocast); weights, latents and solver stay in float32
    name, digest   of the checkpoint, for the recipes
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
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype or torch.float32
        for network in (autoencoder, conditioner, backbone):
            if network is not None:
                network.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.autoencoder, self.conditioner, self.backbone = autoencoder, conditioner, backbone
        self.noise_scheduler = noise_scheduler
        self.denoiser = Denoiser(backbone, noise_scheduler)
        self.sampler, self.sampling = sampler, {"guidance_rescale": 0.0, **(sampling or {})}
        self.name, self.digest = name, digest

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
        negative_prompt: str = "",
        num_images: int = 1,
        num_steps: int | None = None,
        sampler: str | Mapping[str, Any] | Sampler | None = None,
        spacing: str | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        init_image: str | os.PathLike[str] | Image.Image | None = None,
        strength: float = 0.8,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> list[Image.Image]:
        """`num_images` pictures of each prompt, prompt after prompt; picture i has the seed `seed` + i.

        sampler     name of a file in configs/sampler, the section of such a config, or a function
        init_image  picture to start from, cut to height and width; `strength` in (0, 1] is the share of the
                    steps that are made, from noise laid over it: 1 keeps next to nothing of it
        batch_size  pictures at a time: changes memory and speed, not pictures
        What is None comes from the checkpoint. Raises InputError for what cannot be drawn.
        """
        if self.backbone is None:
            fix = "give a run whose diffusion stage has saved a checkpoint"
            raise InputError(
                f"checkpoint={self.name}", "holds an autoencoder alone, which draws nothing", fix
            )
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        texts = [text for text in texts for _ in range(whole("num_images", num_images, 1))]
        if not texts:
            raise InputError("prompt", "there is none", 'give one: prompt="a red apple"')
        given: dict[str, Any] = {"num_steps": num_steps, "spacing": spacing, "height": height, "width": width}
        given |= {"guidance_scale": guidance_scale, "guidance_rescale": guidance_rescale}
        request = self._request(negative_prompt, sampler, init_image, strength, given)
        size = whole("batch_size", BATCH_SIZE if batch_size is None else batch_size, 1)
        pictures: list[Image.Image] = []
        with bar(math.ceil(len(texts) / size) * (len(request.grid) - 1), progress) as advance:
            for first in range(0, len(texts), size):
                part = texts[first : first + size]
                seeds = [seed + first + k for k in range(len(part))]
                drawn = to_pil(to_uint8(self._draw(part, seeds, request, advance)))
                for picture, text, its_seed in zip(drawn, part, seeds, strict=True):
                    picture.info["parameters"] = self._recipe(text, its_seed, request)
                pictures += drawn
        return pictures

    def _request(
        self, negative_prompt: str, sampler: Any, init_image: Any, strength: float, given: dict[str, Any]
    ) -> Request:
        """Check every setting before any work."""
        given = self.sampling | {name: value for name, value in given.items() if value is not None}
        steps = whole("num_steps", given["num_steps"], 1, MAX_STEPS)
        height, width = (self._multiple_of(name, given[name]) for name in ("height", "width"))
        scale = number("guidance_scale", given["guidance_scale"])
        rescale = number("guidance_rescale", given["guidance_rescale"], 0, 1)
        function, name = sampler_of(self.sampler if sampler is None else sampler)
        spacing, start = given["spacing"], None
        try:
            grid = self.noise_scheduler.grid(steps, spacing)
        except ValueError as error:
            raise InputError("sampling", str(error)) from None
        if init_image is not None:
            if number("strength", strength, 0, 1) == 0:
                raise InputError(f"strength={strength}", "need more than 0 and at most 1")
            grid = truncate(grid, strength)
            start = to_tensor([open_picture(init_image, height, width)])
        shared = (negative_prompt, steps, function, name, spacing, scale, rescale)
        return Request(*shared, height, width, grid, start, strength)

    def _multiple_of(self, name: str, value: Any) -> int:
        multiple = self.multiple
        size = whole(name, value, 1)
        if size % multiple:
            below = size // multiple * multiple
            near = ", ".join(str(s) for s in (below, below + multiple) if s)
            raise InputError(f"{name}={size}", f"must be a multiple of {multiple}", f"nearest: {near}")
        return size

    def _draw(
        self, prompts: Sequence[str], seeds: Sequence[int], request: Request, advance: Callable[[], None]
    ) -> Tensor:
        """Images [b 3 H W], about [-1, 1]; row i depends on prompts[i] and seeds[i] alone."""
        factor = self.autoencoder.factor
        shape = (self.autoencoder.latent_channels, request.height // factor, request.width // factor)
        noise = partial(self._noise, seeds, shape)
        low = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype if low else None, enabled=low):
            conditioning, null = self._conditioning(prompts, request)
            denoise = guided(
                self.denoiser, conditioning, null, request.guidance_scale, request.guidance_rescale
            )
            latents = None
            if request.start is not None:
                image = request.start.to(self.device, torch.float32) / 127.5 - 1
                latents = self.autoencoder.encode(image.contiguous(memory_format=torch.channels_last))
            x = prior(noise("noise"), request.grid, latents)
            x = x.contiguous(memory_format=torch.channels_last)
            fresh, after = (lambda i: noise(f"step-{i}")), (lambda i, denoised: advance())
            latents = request.sampler(denoise, x, request.grid, noise=fresh, callback=after)
            return self.autoencoder.decode(latents)

    def _noise(self, seeds: Sequence[int], shape: Sequence[int], purpose: str) -> Tensor:
        """Noise [b c h w] that is a function of each picture's seed and the purpose alone."""
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        return torch.cat([keyed_normal(seed, zero, purpose, shape) for seed in seeds])

    def _conditioning(
        self, prompts: Sequence[str], request: Request
    ) -> tuple[Conditioning, Conditioning | None]:
        """That of the prompts, and what guidance pushes away from: nothing said, or the negative prompt."""
        b = len(prompts)
        size = torch.tensor([[request.height, request.width]], device=self.device).expand(b, -1)
        n, weight = torch.arange(b, device=self.device), torch.ones(b, device=self.device)

        def condition(captions: Sequence[str]) -> Conditioning:
            batch = Batch(n, weight, caption=captions, original_size=size, crop=torch.zeros_like(size))
            found: Conditioning = self.conditioner(batch)
            return found

        if request.guidance_scale == 1:
            return condition(prompts), None
        if request.negative_prompt:
            return condition(prompts), condition([request.negative_prompt] * b)
        return condition(prompts), self.conditioner.null(b)

    def _recipe(self, prompt: str, seed: int, request: Request) -> str:
        """What the picture is made of; entries that are None are left out."""
        settings: dict[str, object] = {
            "Steps": request.num_steps,
            "Sampler": FIELD_NAMES.get(request.sampler_name, request.sampler_name),
            "Schedule type": FIELD_NAMES.get(request.spacing, request.spacing),
            "CFG scale": f"{request.guidance_scale:g}",
            "CFG rescale": f"{request.guidance_rescale:g}" if request.guidance_rescale else None,
            "Seed": seed,
            "Size": f"{request.width}x{request.height}",
            "Model hash": self.digest[:10] or None,
            "Model": self.name or None,
            "Denoising strength": None if request.start is None else f"{request.strength:g}",
            "Version": f"ldm {ldm.__version__}",
        }
        given = {name: value for name, value in settings.items() if value is not None}
        return recipe(prompt, request.negative_prompt, given)


def sampler_of(sampler: str | Mapping[str, Any] | Sampler) -> tuple[Sampler, str]:
    """A sampling function and its name, from a name, a config section or the function itself."""
    files = sorted((CONFIG_DIR / "sampler").glob("*.yaml"))
    known = {file.stem: plain(from_yaml(file.read_text(encoding="utf-8"))) for file in files}
    if isinstance(sampler, str):
        if sampler not in known:
            raise InputError(f"sampler={sampler}", "no such option", f"have: {', '.join(known)}")
        return build(known[sampler]), sampler
    if isinstance(sampler, Mapping):
        section = plain(sampler)
        last = str(section.get("_target_")).rpartition(".")[2]
        names = [name for name, its in known.items() if its == section]
        return build(section), last if last in names or not names else names[0]
    function = sampler.func if isinstance(sampler, partial) else sampler
    return sampler, str(getattr(function, "__name__", type(function).__name__))


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` if it is a whole number in the range; raises InputError."""
    good = isinstance(value, int) and not isinstance(value, bool)
    if not good or value < low or (high is not None and value > high):
        raise InputError(f"{name}={value}", f"need {low} or more" if high is None else f"need {low}..{high}")
    return int(value)


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` if it is a finite number in the range; raises InputError."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high:
        raise InputError(
            f"{name}={value}", "need a number" + (f" in {low}..{high}" if high < math.inf else "")
        )
    return float(value)


@contextlib.contextmanager
def bar(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """A progress bar of solver steps on stderr, with the time left; yields what moves it by one."""
    if not shown:
        yield lambda: None
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
    dtype: torch.dtype | None = None,
) -> Pipeline:
    """The pipeline of a run, a stage or a checkpoint directory, rebuilt from the config that is stored in it.

    weights: ema, or raw for those the optimizer last left. Nothing in a stranger's checkpoint can run code:
    tensors are safetensors and the config builds only what `ldm.build` allows.
    """
    if weights not in ("ema", "raw"):
        raise InputError(f"weights={weights}", "no such option", "have: ema, raw")
    folder = resolve(Path(path))
    config = from_yaml(load_document(folder, "config.yaml"), f"{folder / 'config.yaml'}")
    tensors, used = load_tensors(folder, "model"), "model.safetensors"
    if weights == "ema":
        used = "ema.safetensors"
        if not (folder / used).is_file():
            raise InputError(f"weights={weights}", f"no EMA weights in {folder.name}", "pass weights=raw")
        tensors |= load_tensors(folder, "ema")
    present = [name for name in NETWORKS if config.get(name) is not None]
    networks = {name: restore(name, config, tensors, folder) for name in present}
    rest = {"noise_scheduler": build(config["noise_scheduler"])} if "backbone" in networks else {}
    size = config["data"]["image_size"]
    return Pipeline(
        **networks,
        **rest,
        sampler=plain(config["sampler"]) if config.get("sampler") is not None else "ddim",
        sampling={"height": size, "width": size, **plain(config.get("sampling") or {})},
        device=device,
        dtype=dtype,
        name=f"{config.get('run_name') or folder.parent.name} {folder.name}",
        digest=load_document(folder, MANIFEST)["files"][used]["sha256"],
    )


def restore(name: str, config: Any, tensors: Mapping[str, Tensor], folder: Path) -> Any:
    """The network `name`: the frozen one that state.json names, that of `tensors`, or a pretrained one."""
    entry = load_document(folder, "state.json").get("networks", {}).get(name)
    if entry is not None:
        own, text = load_network(folder, entry)
        network = build(from_yaml(text, f"networks/{entry['sha256'][:8]}.../config.yaml"))
    else:
        own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        network = build(config[name])
    if own or any(p.requires_grad for p in network.parameters()):  # else it is frozen and brought its weights
        try:
            network.load_state_dict(own)
        except RuntimeError as error:
            what = f"its weights do not fit its {name}: {str(error).splitlines()[1].strip()}"
            raise InputError(f"checkpoint={folder}", what) from None
    return network
