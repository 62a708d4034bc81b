"""A model as one safetensors file in the names of CompVis and Stability AI, as A1111 and ComfyUI open it.

What has no place in one (`granted.py`) is refused before a byte is written.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoints.files import sync
from ldm.checkpoints.foreign.buffers import added, chain, sigmas
from ldm.checkpoints.foreign.families import FAMILIES, LATENT_SCALES, Family
from ldm.checkpoints.foreign.fold import folded, one_scale, statistics
from ldm.checkpoints.foreign.granted import (
    BOTH,
    PREDICTIONS,
    TOWERS,
    check_autoencoder,
    family_in,
    prediction_of,
)
from ldm.checkpoints.foreign.names import (
    ema_name,
    given,
    is_local,
    open_clip_text,
    original_autoencoder,
    original_unet,
    transformers_text,
)
from ldm.checkpoints.foreign.towers import Tower, kind, parts, towers
from ldm.checkpoints.lazy import LazyTensor, Tensors, write_safetensors
from ldm.checkpoints.model import Model
from ldm.config import build
from ldm.errors import InputError

UNET, AUTOENCODER = "model.diffusion_model.", "first_stage_model."
ARCHITECTURES = {  # ModelSpec's word for the published sizes
    "sd1": "stable-diffusion-v1",
    "sd1_inpaint": "stable-diffusion-v1-inpainting",
    "sd2": "stable-diffusion-v2-512",
    "sd2_inpaint": "stable-diffusion-v2-inpainting",
    "sd2_depth": "stable-diffusion-v2-depth",
    "upscaler": "stable-diffusion-v2-x4-upscaler",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl_inpaint": "stable-diffusion-xl-v1-inpainting",
}
NO_HASH = "0x" + 64 * "0"
SD_SCALE = 0.18215  # of the autoencoder that shared files of one replace


def write(
    model: Model, out: Path, dtype: torch.dtype | None = None, weights: str = "ema", full: bool = False
) -> None:
    """Write the file. Raises InputError, before anything is written, for what has no place in one.

    dtype    of the networks' tensors; None: as they are. Tables stay float32, position_ids int64
    weights  ema: averages where there are; raw: those the optimizer last left
    full     raw weights of the U-Net in its own place and the averages in model_ema.*, as a training run of
             the original saved them; the other networks' are `weights`
    """
    family, published = family_in(model)
    architecture = ARCHITECTURES.get(family.slug) if published else None
    if architecture == "stable-diffusion-v2-512" and prediction_of(model) == "v_prediction":
        architecture = "stable-diffusion-v2-768-v"
    tensors = contents(model, dtype, weights, full)
    _store(out, tensors, model, architecture or f"latent-diffusion/{family.slug}")


def contents(
    model: Model, dtype: torch.dtype | None = None, weights: str = "ema", full: bool = False
) -> dict[str, LazyTensor]:
    """The tensors of the file by their names in it; raises InputError as `write` does."""
    family, _ = family_in(model)
    return _cast(_networks(model, family, weights, full), dtype) | _tables(model, family, full)


def _cast(tensors: Tensors, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    return {name: value if dtype is None else value.to(dtype) for name, value in tensors.items()}


def write_autoencoder(
    model: Model, out: Path, dtype: torch.dtype | None = None, weights: str = "ema"
) -> None:
    """Write the autoencoder alone, in the original names without a prefix, as files of one are shared."""
    check_autoencoder(model.config.get("autoencoder"))
    tensors = original_tensors(model, weights, autoencoder_scale(model))
    _store(out, _cast(tensors, dtype), model, "stable-diffusion-v1/vae")


def autoencoder_scale(model: Model) -> float:
    """The number that users of the autoencoder's file multiply its latents by.

    Its own, if it is one number and a published one; else that of its model's family, or Stable Diffusion's.
    """
    section = model.config["autoencoder"]
    known = [*(family.latent_scale for family in FAMILIES), *LATENT_SCALES.values()]
    own = one_scale(*statistics(model.of("autoencoder"), section))
    published = next((scale for scale in known if torch.tensor(scale).item() == own), None)
    if published is not None:
        return published
    try:
        return family_in(model)[0].latent_scale
    except InputError:
        return 1.0 if kind(section) == "AutoencoderVQ" else SD_SCALE


# ---- tensors -------------------------------------------------------------------------------------------


def _networks(model: Model, family: Family, weights: str, full: bool) -> dict[str, LazyTensor]:
    """All networks' tensors by their names in the file."""
    found: dict[str, LazyTensor] = {}
    averages = model.of("backbone", "ema")
    unet = model.of("backbone") if full else model.of("backbone", weights)
    found |= _under(UNET, given(original_unet(unet), unet))
    if full:
        if not any(name.startswith("backbone.") for name in model.ema):
            raise InputError("--full", "the checkpoint has no averages", "leave it out")
        theirs = given(original_unet(averages), averages)
        found |= {ema_name(UNET + name): value for name, value in theirs.items()}
    if model.config.get("autoencoder") is not None:
        found |= _under(AUTOENCODER, original_tensors(model, weights, family.latent_scale))
    conditioner = model.of("conditioner", weights)
    own = towers(model.config.get("conditioner"), conditioner)
    places = () if model.config.get("conditioner") is None else TOWERS[family.slug]
    for tower, place in zip(own, places, strict=True):
        tensors = {name: conditioner[tower.prefix + name] for name in tower.names}
        found |= _under(place, _tower(tower, tensors, place.endswith("transformer."), family))
    for name, value in conditioner.items():
        if name.endswith("embedding.weight") and ".token_" not in name:  # of a class
            found["cond_stage_model.embedding.weight"] = value
    return found


def original_tensors(model: Model, weights: str, factor: float) -> dict[str, LazyTensor]:
    """The autoencoder's in the original names, for readers that multiply its latents by `factor`."""
    check_autoencoder(model.config.get("autoencoder"))
    tensors = folded(model.of("autoencoder", weights), model.config["autoencoder"], factor, always=True)
    return given(original_autoencoder(tensors), {n: v for n, v in tensors.items() if not is_local(n)})


def _tower(tower: Tower, tensors: Tensors, quick: bool, family: Family) -> dict[str, LazyTensor]:
    if quick:
        positions = torch.arange(tensors["positional_embedding"].shape[0])[None]
        ids = {"text_model.embeddings.position_ids": LazyTensor.of(positions)}
        return given(transformers_text(tensors), tensors) | ids
    if tower.depth == tower.layers:
        tensors = _filled_up(tower, tensors)
    return given(open_clip_text(tensors), tensors)


def _filled_up(tower: Tower, tensors: Tensors) -> dict[str, LazyTensor]:
    """With one more block, of zeros, which readers have and do not run: diffusers stores none."""
    last, new = (f"transformer.resblocks.{i}." for i in (tower.layers - 1, tower.layers))
    more = {n.replace(last, new): _zeros(v) for n, v in tensors.items() if n.startswith(last)}
    return dict(tensors) | more


def _zeros(like: LazyTensor) -> LazyTensor:
    return LazyTensor(like.shape, like.dtype, lambda: torch.zeros(like.shape, dtype=like.dtype))


def _tables(model: Model, family: Family, full: bool) -> dict[str, LazyTensor]:
    """Buffers beside the networks; v_pred and ztsnr, empty, say what no table of such files does."""
    found: dict[str, Tensor] = {}
    section = model.config.get("noise_scheduler")
    if section is not None:
        scheduler = build(section)
        if scheduler.zero_terminal_snr:
            found["ztsnr"] = torch.zeros(0)
        if family.prediction_type == "epsilon" and prediction_of(model) == "v_prediction":
            found["v_pred"] = torch.zeros(0)
        if TOWERS[family.slug] == BOTH:
            found["denoiser.sigmas"] = sigmas(scheduler)
        else:
            found |= chain(scheduler)
    for part in parts(model.config.get("conditioner")).values():
        if kind(part) == "Upscaling":
            tables = added(build(part["noise_scheduler"]))
            found |= {f"low_scale_model.{name}": table for name, table in tables.items()}
    if full:
        decay = (model.config.get("module") or {}).get("ema_decay", 0.9999)  # of the original, if not known
        found["model_ema.decay"] = torch.tensor(decay, dtype=torch.float32)
        found["model_ema.num_updates"] = torch.tensor(model.facts.get("step") or 0, dtype=torch.int32)
    return {name: LazyTensor.of(table) for name, table in found.items()}


def _under(prefix: str, tensors: Tensors) -> dict[str, LazyTensor]:
    return {prefix + name: value for name, value in tensors.items()}


# ---- the file ------------------------------------------------------------------------------------------


def _store(out: Path, tensors: Tensors, model: Model, architecture: str) -> None:
    write_safetensors(out, tensors, _metadata(model, architecture, out.stem.partition(".tmp-")[0]))
    _put_hash(out)


def _metadata(model: Model, architecture: str, title: str) -> dict[str, str]:
    """ModelSpec 1.0.1; what is not known is left out."""
    facts, size = model.facts, (model.config.get("data") or {}).get("image_size")
    prediction = PREDICTIONS.get(prediction_of(model)) if model.config.get("noise_scheduler") else None
    known = {
        "sai_model_spec": "1.0.1",
        "architecture": architecture,
        "implementation": "sgm" if "-xl-" in architecture else "https://github.com/CompVis/stable-diffusion",
        "title": model.config.get("run_name") or facts.get("title") or title,
        "resolution": f"{size}x{size}" if size else None,
        "author": facts.get("author"),
        "date": datetime.now(UTC).date().isoformat(),
        "hash_sha256": NO_HASH,
        "license": facts.get("licence"),
        "prediction_type": prediction,
    }
    return {f"modelspec.{key}": str(value) for key, value in known.items() if value is not None}


def _put_hash(path: Path) -> None:
    """The sha256 of all that follows the header goes into its place in the header."""
    with open(path, "r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        digest = hashlib.sha256()
        while chunk := file.read(2**22):
            digest.update(chunk)
        file.seek(8 + header.index(NO_HASH.encode()))
        file.write(f"0x{digest.hexdigest()}".encode())
    sync(path)
