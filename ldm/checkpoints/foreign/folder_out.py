"""A `Model` to a folder that diffusers opens offline: a pipeline, or a U-Net or autoencoder alone.

What a pipeline of diffusers computes otherwise is refused before anything is written; what its files cannot
say, and does not change what the networks are, comes back as notes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.checkpoints.foreign import schedulers, tokenizer
from ldm.checkpoints.foreign.components import (
    KL,
    VQ,
    autoencoder_config,
    text_config,
    unet_config,
)
from ldm.checkpoints.foreign.fold import folded, one_scale, statistics
from ldm.checkpoints.foreign.names import (
    diffusers_autoencoder,
    diffusers_unet,
    given,
    is_local,
    transformers_text,
)
from ldm.checkpoints.lazy import LazyTensor, write_safetensors
from ldm.checkpoints.model import Model
from ldm.config import build
from ldm.errors import InputError

Config = dict[str, Any]
UPSCALER_SCALE = 0.08333  # StableDiffusionUpscalePipeline takes no other, whatever the folder says
TOWERS = ("FrozenOpenCLIP", "TextTransformer")
NONE = [None, None]
ELSE = "try --format single-file, or --format autoencoder for the autoencoder alone"
# By the number of towers and what stands beside them: the class, and what of it there is none of here.
PIPELINES: dict[tuple[int, frozenset[str]], tuple[str, str]] = {
    (1, frozenset()): ("StableDiffusionPipeline", "safety_checker feature_extractor image_encoder"),
    (1, frozenset({"Inpainting"})): (
        "StableDiffusionInpaintPipeline",
        "safety_checker feature_extractor image_encoder",
    ),
    (1, frozenset({"Depth"})): ("StableDiffusionDepth2ImgPipeline", "depth_estimator feature_extractor"),
    (1, frozenset({"Upscaling"})): (
        "StableDiffusionUpscalePipeline",
        "safety_checker feature_extractor watermarker",
    ),
    (2, frozenset({"Sizes"})): ("StableDiffusionXLPipeline", "feature_extractor image_encoder"),
    (2, frozenset({"Sizes", "Inpainting"})): (
        "StableDiffusionXLInpaintPipeline",
        "feature_extractor image_encoder",
    ),
}


@dataclass
class Folder:
    """What is to be written: text files and tensors by their path in the folder, and notes."""

    texts: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def document(self, path: str, values: Mapping[str, Any]) -> None:
        self.texts[path] = json.dumps(dict(values), indent=2, sort_keys=True) + "\n"

    def component(
        self,
        place: str,
        config: Config,
        tensors: dict[str, LazyTensor],
        stem: str = "diffusion_pytorch_model",
    ) -> None:
        self.document(f"{place}config.json", config)
        self.tensors[f"{place}{stem}.safetensors"] = tensors

    def scheduler(self, place: str, config: Config) -> list[str]:
        """Its entry in the index."""
        self.document(f"{place}/scheduler_config.json", config)
        return ["diffusers", config["_class_name"]]


@dataclass(frozen=True)
class Part:
    """A part of the conditioner: its kind, the network on the meta device, and its place in the names."""

    kind: str
    network: Any
    prefix: str


def write(model: Model, out: Path, dtype: torch.dtype | None, weights: str) -> list[str]:
    """Write the folder `out`, which must not be there, and return notes; `dtype` None: as the tensors are.

    Raises InputError, with nothing written, for what diffusers does not have. A full disk leaves a part of
    the folder: `export` writes under another name first.
    """
    if out.exists():
        raise InputError(f"{out}", "is there already", "give a name that is free")
    folder = Folder()
    if alone(model) is not None:
        _alone(model, weights, folder)
    else:
        _pipeline(model, weights, folder)
    out.mkdir(parents=True)
    for path, text in folder.texts.items():
        (out / path).parent.mkdir(exist_ok=True)
        (out / path).write_text(text, encoding="utf-8")
    for path, tensors in folder.tensors.items():
        cast = {name: value.to(dtype) if dtype else value for name, value in tensors.items()}
        write_safetensors(out / path, cast, {"format": "pt"})
    return folder.notes


def alone(model: Model) -> str | None:
    """The network that is written without the others, for the want of a part of a pipeline; None: all are."""
    if model.config.get("backbone") is None:
        return "autoencoder"
    return "backbone" if model.config.get("autoencoder") is None else None


def _alone(model: Model, weights: str, folder: Folder) -> None:
    """A folder as unet/ or vae/ of a pipeline."""
    if model.config.get("conditioner") is not None:
        folder.notes.append("of one network alone: a pipeline has a U-Net and an autoencoder")
    if alone(model) == "backbone":
        _unet(model, weights, folder, "", None)
    else:
        _autoencoder(model, weights, folder, "", None)


def _pipeline(model: Model, weights: str, folder: Folder) -> None:
    config = model.config
    network, parts = _parts(config.get("conditioner"))
    towers = [part for part in parts if part.kind in TOWERS]
    beside = {part.kind: part.network for part in parts if part.kind not in TOWERS}
    if (len(towers), frozenset(beside)) not in PIPELINES:
        kinds = ", ".join(part.kind for part in parts) or "nothing"
        what = "no pipeline of diffusers is told that"
        raise InputError(f"conditioner of {kinds}", what, ELSE)
    if config["autoencoder"]["_target_"] == VQ:
        what = "diffusers' text-to-image pipelines decode with an AutoencoderKL alone"
        raise InputError("autoencoder with a codebook", what, ELSE)
    name, without = PIPELINES[len(towers), frozenset(beside)]
    kept = _layers(towers, name)
    channels = config["autoencoder"].get("latent_channels", 4)
    if "Inpainting" in beside and channels != 4:
        what = f"diffusers' inpainting is for latents of 4 channels, these have {channels}"
        raise InputError("autoencoder", what, ELSE)
    index: Config = {"_class_name": name, "_diffusers_version": schedulers.VERSION}
    index |= dict.fromkeys(without.split(), NONE)
    if "image_encoder" in without and len(towers) == 1:
        index["requires_safety_checker"] = False
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    spacing = (config.get("sampling") or {}).get("spacing", "leading")
    process, notes = schedulers.written(config["noise_scheduler"], config.get("sampler"), spacing)
    folder.notes += notes
    index["scheduler"] = folder.scheduler("scheduler", process)
    sizes, upscaling = beside.get("Sizes"), beside.get("Upscaling")
    _autoencoder(model, weights, folder, "vae/", UPSCALER_SCALE if upscaling is not None else None)
    _unet(model, weights, folder, "unet/", None if sizes is None else sizes.width)
    if upscaling is not None:
        section = next(s for s in config["conditioner"]["parts"].values() if "noise_scheduler" in s)
        low, _ = schedulers.written(section["noise_scheduler"], schedulers.ANCESTRAL, "leading")
        index |= {"low_res_scheduler": folder.scheduler("low_res_scheduler", low)}
        index["max_noise_level"] = upscaling.max_noise_level
    if "Depth" in beside:
        folder.notes.append("open it with depth_estimator=None, feature_extractor=None, and give depth_map=")
    found = _tensors(model, "conditioner", network, weights)
    for i, (tower, layers) in enumerate(zip(towers, kept, strict=True)):
        ending = "_2" if i else ""
        index[f"tokenizer{ending}"] = ["transformers", "CLIPTokenizer"]
        index[f"text_encoder{ending}"] = ["transformers", _text(tower, layers, found, folder, ending)]
    if len(towers) == 2:
        index["force_zeros_for_empty_prompt"] = towers[0].network.zero_null
    folder.document("model_index.json", index)


def _parts(section: Any) -> tuple[Any, list[Part]]:
    """The conditioner on the meta device, and what it is made of."""
    if section is None:
        return None, []
    network = _built(section)
    if hasattr(network, "parts"):
        parts = [Part(type(part).__name__, part, f"parts.{name}.") for name, part in network.parts.items()]
        return network, parts
    return network, [Part(type(network).__name__, network, "")]


def _built(section: Any) -> Any:
    with torch.device("meta"):
        return build(section)


def _layers(towers: list[Part], name: str) -> list[int]:
    """How many blocks of each tower are written. Raises InputError for what the pipeline reads otherwise."""
    networks = [tower.network for tower in towers]
    depths = [getattr(network, "depth", _blocks(network)) for network in networks]
    norms = [getattr(network, "final_norm", True) for network in networks]
    pooled = [network.pooled_dim is not None for network in networks]
    nulls = [network.zero_null for network in networks]
    if len(towers) == 1:
        wrong = {"pooled": pooled[0], "zero_null": nulls[0], "final_norm=false": not norms[0]}
        layers = depths
    else:
        layers = [depth + 1 for depth in depths]
        wrong = {
            "pooled in the first and not the second": pooled != [False, True],
            "final_norm": any(norms),
            "one zero_null for both": nulls[0] != nulls[1],
            "a layer that is not before another": any(
                n > _blocks(network) for n, network in zip(layers, networks, strict=True)
            ),
            "a layer that is not the last but one": layers[1] < _blocks(networks[1]),
        }
    if found := [what for what, is_so in wrong.items() if is_so]:
        what = f"{name} reads text towers otherwise ({', '.join(found)})"
        raise InputError("conditioner", what, ELSE)
    return layers


def _blocks(network: Any) -> int:
    return len(network.text.transformer.resblocks)


def _tensors(model: Model, name: str, network: Any, weights: str) -> dict[str, LazyTensor]:
    """All tensors of a network; frozen weights from elsewhere, which checkpoints leave out, are fetched."""
    found = model.of(name, weights)
    wanted = [key for key in network.state_dict() if not is_local(key)]
    if missing := [key for key in wanted if key not in found]:
        if any(key in found for key in wanted) or getattr(network, "unfilled", False):
            what = f"{len(missing)} of {len(wanted)} tensors are not in the checkpoint (first: {missing[0]})"
            raise InputError(name, what)
        found = {key: LazyTensor.of(value) for key, value in build(model.config[name]).state_dict().items()}
    return found


def _unet(model: Model, weights: str, folder: Folder, place: str, sizes_width: int | None) -> None:
    section = model.config["backbone"]
    network = _built(section)
    config = unet_config(network, section, sizes_width)
    if (size := _image_size(model)) and model.config.get("autoencoder") is not None:
        config["sample_size"] = size // _built(model.config["autoencoder"]).factor
    tensors = _tensors(model, "backbone", network, weights)
    folder.component(place, config, given(diffusers_unet(network.state_dict()), tensors))


def _autoencoder(model: Model, weights: str, folder: Folder, place: str, factor: float | None) -> None:
    """The autoencoder with a scaling_factor, which is `factor` if that is given."""
    section = model.config["autoencoder"]
    network = _built(section)
    autoencoder_config(network, section, 1.0)  # refuses others than KL and VQ
    tensors = _tensors(model, "autoencoder", network, weights)
    shift, scale = statistics(tensors, section)
    own = one_scale(shift, scale)
    factor = (1.0 if own is None else _short(own)) if factor is None else factor
    if own is None or _short(own) != factor:
        what = "the latents' shift and scale are in quant_conv and post_quant_conv"
        folder.notes.append(f"{what}, beside scaling_factor {factor}")
    tensors = folded(tensors, section, factor)
    config = autoencoder_config(network, section, factor)
    if "quant_conv.weight" in tensors and section["_target_"] == KL:
        config |= {"use_quant_conv": True, "use_post_quant_conv": True}
    config["sample_size"] = _image_size(model) or 32 * network.factor
    folder.component(place, config, given(diffusers_autoencoder(tensors), tensors))


def _image_size(model: Model) -> int | None:
    return (model.config.get("data") or {}).get("image_size")


def _short(scale: float) -> float:
    """The shortest number that is the same in float32: 0.18215 and not 0.18215000629425049."""
    return float(str(np.float32(scale)))


def _text(tower: Part, layers: int, found: Mapping[str, LazyTensor], folder: Folder, ending: str) -> str:
    """text_encoder/ and tokenizer/; returns the class of the first."""
    network, prefix = tower.network, f"{tower.prefix}text."
    beyond = tuple(f"transformer.resblocks.{i}." for i in range(layers, _blocks(network)))
    names = [key.removeprefix(prefix) for key in found if key.startswith(prefix)]
    kept = {name: found[prefix + name] for name in names if not name.startswith(beyond)}
    padding = network.tokenizer.padding
    config = text_config(network, layers, {"zero": 0, "end": 49407}[padding])
    folder.component(f"text_encoder{ending}/", config, given(transformers_text(kept), kept), "model")
    for name, text in tokenizer.files(network.tokenizer.context_length, padding).items():
        folder.texts[f"tokenizer{ending}/{name}"] = text
    if padding == "zero":
        folder.notes.append(
            f'transformers takes each "!" of a caption for padding in tokenizer{ending}, as published'
        )
    return str(config["architectures"][0])
