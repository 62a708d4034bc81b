"""Diffusers folders to a `Model`: whole pipelines, and the folder of a single U-Net or autoencoder.

What they hold is said by JSON files, so that nothing is inferred; values are read when they are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.checkpoints.foreign import schedulers, tokenizer
from ldm.checkpoints.foreign.components import (
    Section,
    autoencoder_section,
    text_section,
    unet_section,
)
from ldm.checkpoints.foreign.documents import load_json, understood
from ldm.checkpoints.foreign.names import (
    diffusers_autoencoder,
    diffusers_unet,
    is_extra,
    taken,
    transformers_text,
)
from ldm.checkpoints.foreign.outline import outline
from ldm.checkpoints.lazy import LazyTensor, open_tensors
from ldm.checkpoints.model import Asked, Model
from ldm.errors import InputError

SD1_TOWER = {"text": {"layer": "last", "final_norm": True}}
XL_TOWERS = {  # both give the context of the block before the last
    "clip_l": {"layer": "penultimate", "final_norm": False},
    "big_g": {"layer": "penultimate", "final_norm": False},
}
SIZE_NUMBERS = 6  # of which the U-Net is told: original size, crop, target size
SIZES = {"sizes": "ldm.conditioning.combined.Sizes"}
PICTURE = {"picture": "ldm.conditioning.spatial.Inpainting"}


@dataclass(frozen=True)
class Kind:
    """A pipeline class: its family here, how its text towers are read, what stands beside them, its defaults.

    joined   (a, b): a + b * latent channels are joined to the latents
    """

    family: str
    towers: Mapping[str, Mapping[str, Any]]
    beside: Mapping[str, str]
    joined: tuple[int, int] = (0, 0)
    num_steps: int = 50
    guidance_scale: float = 7.5


SD, XL = Kind("sd", SD1_TOWER, {}), Kind("sdxl", XL_TOWERS, SIZES, guidance_scale=5.0)
INPAINT = Kind("sd_inpaint", SD1_TOWER, PICTURE, (1, 1))
XL_INPAINT = Kind("sdxl_inpaint", XL_TOWERS, SIZES | PICTURE, (1, 1), guidance_scale=7.5)
DEPTH = Kind("sd_depth", SD1_TOWER, {"depth": "ldm.conditioning.spatial.Depth"}, (1, 0))
UPSCALE = Kind("upscaler", SD1_TOWER, {"picture": "ldm.conditioning.spatial.Upscaling"}, (3, 0), 75, 9.0)
KINDS = {
    "StableDiffusionPipeline": SD,
    "StableDiffusionImg2ImgPipeline": SD,
    "StableDiffusionInpaintPipeline": INPAINT,
    "StableDiffusionUpscalePipeline": UPSCALE,
    "StableDiffusionDepth2ImgPipeline": DEPTH,
    "StableDiffusionXLPipeline": XL,
    "StableDiffusionXLImg2ImgPipeline": XL,
    "StableDiffusionXLInpaintPipeline": XL_INPAINT,
}
PLAIN = {INPAINT.family: SD, XL_INPAINT.family: XL}  # such a pipeline around a U-Net that is told of no mask


def read(path: Path, asked: Asked) -> Model:
    """The checkpoint in a folder. Raises InputError for what is not there here, and for a damaged folder."""
    if (path / "model_index.json").is_file():
        return _pipeline(path, asked)
    if not (path / "config.json").is_file():
        fix = "give a folder with model_index.json, or a U-Net's or autoencoder's with config.json"
        raise InputError(f"{path}", "is no diffusers folder", fix)
    found = load_json(path / "config.json")
    name, notes = str(found.get("_class_name")), list[str]()
    if name == "UNet2DConditionModel":
        network, families = "backbone", {name: "unet"}
    else:
        network, families = "autoencoder", {"AutoencoderKL": "autoencoder_kl", "VQModel": "autoencoder_vq"}
    if name not in families:
        fix = "have: UNet2DConditionModel, AutoencoderKL, VQModel"
        raise InputError(f"{path}: _class_name={name}", "no network here is its counterpart", fix)
    section, tensors = _network(path, network, notes)
    size = _size(found, f"{path.name}/config.json")
    config = {network: section, "noise_scheduler": None, "run_name": path.name}
    config["data"] = {"image_size": size if network == "autoencoder" else 8 * size}
    facts = {"format": "diffusers", "family": families[name], "path": path, "notes": notes}
    return Model(config, _prefixed(network, tensors), facts=facts)


def _pipeline(path: Path, asked: Asked) -> Model:
    index = load_json(path / "model_index.json")
    name = str(index.get("_class_name"))
    if name not in KINDS:
        what = "no such pipeline can be opened here"
        raise InputError(f"{path}: _class_name={name}", what, f"have: {', '.join(KINDS)}")
    for part in ("unet", "vae", "scheduler"):
        if not (path / part).is_dir():
            raise InputError(f"{path / part}", "no such folder", f"a {name} has one")
    notes: list[str] = []
    backbone, unet = _network(path / "unet", "backbone", notes)
    autoencoder, vae = _network(path / "vae", "autoencoder", notes)
    kind = KINDS[name]
    latents = autoencoder["latent_channels"]
    if backbone["in_channels"] == latents:
        kind = PLAIN.get(kind.family, kind)
    told = latents + kind.joined[0] + kind.joined[1] * latents
    if backbone["in_channels"] != told:
        what = f"in_channels={backbone['in_channels']}, but a {name} tells it {told}"
        raise InputError("unet/config.json", what, "is model_index.json that of another pipeline?")
    conditioner, text = _conditioner(path, index, kind, backbone, notes)
    found = load_json(path / "scheduler" / "scheduler_config.json")
    process, sampler, spacing, more = _scheduler(found, "scheduler/scheduler_config.json")
    notes += more
    if asked.prediction_type not in (None, process["prediction_type"]):
        notes.append(f"the folder says prediction_type={process['prediction_type']}")
        process["prediction_type"] = asked.prediction_type
    size = _size(load_json(path / "unet" / "config.json"), "unet/config.json")
    size *= 2 ** (len(autoencoder["block_out_channels"]) - 1)
    steps = {"num_steps": kind.num_steps, "spacing": spacing, "guidance_scale": kind.guidance_scale}
    config = {
        "autoencoder": autoencoder,
        "conditioner": conditioner,
        "backbone": backbone,
        "noise_scheduler": process,
        "sampler": sampler,
        "sampling": steps | {"guidance_rescale": 0.0},
        "data": {"image_size": size},
        "run_name": path.name,
    }
    tensors = _prefixed("backbone", unet) | _prefixed("autoencoder", vae) | _prefixed("conditioner", text)
    facts = {"format": "diffusers", "family": _family(kind, backbone), "path": path, "notes": notes}
    return Model(config, tensors, facts=facts)


def _scheduler(found: Mapping[str, Any], where: str) -> tuple[Section, Section, str, list[str]]:
    with understood(where):
        return schedulers.read(found, where)


def _size(found: Mapping[str, Any], where: str) -> int:
    """Height of what a network was trained on."""
    said = found.get("sample_size") or 64
    size = said[0] if isinstance(said, list) and said else said
    if not isinstance(size, int) or size < 1:
        raise InputError(where, f"sample_size={said!r} is no number above 0")
    return size


def _family(kind: Kind, backbone: Section) -> str:
    first, _, rest = kind.family.partition("_")
    return (
        f"{first}{2 if backbone['linear_projection'] else 1}_{rest}".rstrip("_")
        if first == "sd"
        else kind.family
    )


def _network(folder: Path, network: str, notes: list[str]) -> tuple[Section, dict[str, LazyTensor]]:
    """Section and tensors, by native name, of a U-Net (`backbone`) or `autoencoder`."""
    where = f"{folder.name}/config.json"
    found = load_json(folder / "config.json")
    if network == "backbone":
        with understood(where):
            section, rules = unet_section(found, where), diffusers_unet
        if found.get("upcast_attention"):
            notes.append(f"attention of {folder.name} is to be computed in float32 (upcast_attention)")
    else:
        if found.get("_class_name") not in ("AutoencoderKL", "VQModel"):
            what = "no autoencoder here is its counterpart"
            raise InputError(
                f"{where}: _class_name={found.get('_class_name')}", what, "have: AutoencoderKL, VQModel"
            )
        with understood(where):
            section, rules = autoencoder_section(found, where), diffusers_autoencoder
        if found.get("force_upcast"):
            notes.append(f"{folder.name} is to be computed in float32 (force_upcast)")
    with understood(where):
        shapes = _shapes(section)
    weights = _weights(folder, "diffusion_pytorch_model", notes)
    return section, taken(rules(shapes), shapes, weights, folder.name, is_extra)


def _shapes(section: Section, inside: str = "") -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network that is not made; those below `inside`."""
    found = outline(section).items()
    return {name.removeprefix(inside): shape for name, shape in found if name.startswith(inside)}


def _conditioner(
    path: Path, index: Mapping[str, Any], kind: Kind, backbone: Section, notes: list[str]
) -> tuple[Section, dict[str, LazyTensor]]:
    """Section and tensors of the conditioner of a pipeline."""
    zero_null = len(kind.towers) > 1 and index.get("force_zeros_for_empty_prompt", True)
    parts: dict[str, Section] = {}
    tensors: dict[str, LazyTensor] = {}
    for i, (name, options) in enumerate(kind.towers.items()):
        ending = f"_{i + 1}" if i else ""
        section, its = _tower(path, ending, index, notes)
        parts[name] = section | dict(options) | {"zero_null": zero_null}
        tensors |= {f"parts.{name}.text.{key}": value for key, value in its.items()}
    for name, target in kind.beside.items():
        parts[name] = {"_target_": target}
    if "sizes" in parts:
        width = load_json(path / "unet" / "config.json").get("addition_time_embed_dim") or 256
        pooled = [value.shape[1] for key, value in tensors.items() if key.endswith("text.text_projection")]
        if not isinstance(width, int) or backbone["pooled_dim"] != sum(pooled) + SIZE_NUMBERS * width:
            what = f"addition_time_embed_dim={width!r} and text towers pooled to {sum(pooled)} do not make"
            raise InputError("unet/config.json", f"{what} {backbone['pooled_dim']}, which the U-Net is told")
        parts["sizes"]["width"] = width
    if kind is UPSCALE:
        parts["picture"] |= _upscaling(path, index, backbone)
    if len(parts) == 1:
        only = next(iter(parts))
        return parts[only], {key.removeprefix(f"parts.{only}."): value for key, value in tensors.items()}
    section = {"_target_": "ldm.conditioning.combined.Combined", "context_dim": backbone["context_dim"]}
    return section | {"pooled_dim": backbone["pooled_dim"], "parts": parts}, tensors


def _upscaling(path: Path, index: Mapping[str, Any], backbone: Section) -> Section:
    """Options of ldm.conditioning.spatial.Upscaling."""
    where = "low_res_scheduler/scheduler_config.json"
    process, *_ = _scheduler(load_json(path / where), where)
    if not isinstance(index.get("max_noise_level", 350), int):
        raise InputError("model_index.json", f"max_noise_level={index['max_noise_level']!r} is no number")
    return {
        "noise_scheduler": process,
        "max_noise_level": index.get("max_noise_level", 350),
        "num_classes": backbone["num_classes"],
    }


def _tower(
    path: Path, ending: str, index: Mapping[str, Any], notes: list[str]
) -> tuple[Section, dict[str, LazyTensor]]:
    """Section and tensors, below `text.`, of the text tower in text_encoder/ or text_encoder_2/."""
    part = f"text_encoder{ending}"
    entry = index.get(part) or [None, None]
    kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
    classes = {"CLIPTextModel": False, "CLIPTextModelWithProjection": True}
    if not isinstance(kind, str) or kind not in classes:
        what = "no text tower here is its counterpart"
        raise InputError(f"{path / 'model_index.json'}: {part}={kind}", what, f"have: {', '.join(classes)}")
    with understood(f"{part}/config.json"):
        section = text_section(load_json(path / part / "config.json"), f"{part}/config.json", classes[kind])
    with understood(f"tokenizer{ending}"):
        length, padding, more = tokenizer.read(path / f"tokenizer{ending}")
    notes += more
    if isinstance(section["model"], dict):
        length = min(length or 77, section["model"]["context_length"])
    section |= {"context_length": length or 77, "padding": padding}
    with understood(f"{part}/config.json"):
        shapes = _shapes(section, "text.")
    weights = _weights(path / part, "model", notes)
    return section, taken(transformers_text(shapes), shapes, weights, part, is_extra)


# ---- files ---------------------------------------------------------------------------------------------


def _weights(folder: Path, stem: str, notes: list[str]) -> dict[str, LazyTensor]:
    """Tensors of a component: full precision before fp16, safetensors before files saved by torch."""
    old = "pytorch_model" if stem == "model" else stem
    plain = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
    rest = [
        *(f"{old}.bin", f"{old}.bin.index.json"),
        *(f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"),
        *(f"{old}.fp16.bin", f"{old}.bin.index.fp16.json"),
    ]
    name = next((name for name in [*plain, *rest] if (folder / name).is_file()), None)
    if name is None:
        raise InputError(f"{folder}", "there are no weights in it", f"it needs {plain[0]}, or a variant")
    if name in rest:
        notes.append(f"weights of {folder.name} are those of {name}")
    files = _shards(folder, name) if name.endswith(".json") else [name]
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        if not (folder / file).is_file():
            raise InputError(f"{folder / file}", "no such file", f"{name} names it")
        tensors |= open_tensors(folder / file)[0]
    return tensors


def _shards(folder: Path, name: str) -> Sequence[str]:
    """Files of an index, in its order."""
    listed = load_json(folder / name).get("weight_map")
    files = list(listed.values()) if isinstance(listed, dict) else []
    files = list(dict.fromkeys(file for file in files if isinstance(file, str)))
    if not files or any(Path(file).name != file for file in files):
        raise InputError(f"{folder / name}", "is no index of files beside it")
    return files


def _prefixed(network: str, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    return {f"{network}.{name}": value for name, value in tensors.items()}
