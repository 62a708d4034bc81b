"""The published models of Stable Diffusion's family, as data: what tells them apart, and what no tensor says.

Sizes are those of the original configurations (CompVis/latent-diffusion, CompVis/stable-diffusion,
Stability-AI/stablediffusion, Stability-AI/generative-models). Licences are those of the published weights: a
file of the same sizes may have another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ldm.errors import InputError

Section = dict[str, Any]
Schedule = tuple[str, float, float]  # of VariancePreserving: schedule, beta_start, beta_end

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SD_SCHEDULE: Schedule = ("scaled_linear", 0.00085, 0.012)
CLASS_SCHEDULE: Schedule = ("scaled_linear", 0.0015, 0.0195)
PIXEL_SCHEDULE: Schedule = ("scaled_linear", 0.0001, 0.02)
SCHEDULES = (SD_SCHEDULE, CLASS_SCHEDULE, PIXEL_SCHEDULE)

SD1_UNET: Section = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "transformer_depth": [1, 1, 1, 0],
    "mid_depth": 1,
    "context_dim": 768,
    "linear_projection": False,
    "pooled_dim": None,
    "num_classes": None,
    "self_attention": True,
}
SD2_UNET = SD1_UNET | {"context_dim": 1024, "linear_projection": True}
SDXL_UNET = SD2_UNET | {
    "block_out_channels": [320, 640, 1280],
    "transformer_depth": [0, 2, 10],
    "mid_depth": 10,
    "context_dim": 2048,
    "pooled_dim": 2816,
}
UPSCALER_UNET = SD2_UNET | {
    "in_channels": 7,
    "block_out_channels": [256, 512, 512, 1024],
    "transformer_depth": [0, 1, 1, 1],
    "num_classes": 1000,
    "self_attention": [False, False, False, True],
}
CLASS_UNET = SD1_UNET | {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [192, 384, 576, 960],
    "transformer_depth": [0, 1, 1, 1],
    "context_dim": 512,
}

# How the towers are read, by the name of the part. OpenAI's towers have a GELU of their own.
CLIP_L = {"text": {"layer": "last", "final_norm": True, "padding": "end", "quick_gelu": True}}
OPEN_CLIP_H = {"text": {"layer": "penultimate", "final_norm": True, "padding": "zero"}}
XL_TOWERS = {
    "clip_l": {"layer": 11, "final_norm": False, "padding": "end", "zero_null": True, "quick_gelu": True},
    "big_g": {
        "layer": "penultimate",
        "final_norm": False,
        "padding": "zero",
        "zero_null": True,
        "pooled": True,
    },
}
SIZES = {"sizes": {"_target_": "ldm.conditioning.combined.Sizes"}}
INPAINTING = {"picture": {"_target_": "ldm.conditioning.spatial.Inpainting"}}
DEPTH = {"depth": {"_target_": "ldm.conditioning.spatial.Depth"}}
UPSCALING: dict[str, Section] = {
    "picture": {
        "_target_": "ldm.conditioning.spatial.Upscaling",
        "max_noise_level": 350,
        "noise_level": 20,
        "num_classes": 1000,
        "noise_scheduler": {
            "_target_": "ldm.diffusion.noise_scheduler.VariancePreserving",
            "schedule": PIXEL_SCHEDULE[0],
            "beta_start": PIXEL_SCHEDULE[1],
            "beta_end": PIXEL_SCHEDULE[2],
        },
    }
}


@dataclass(frozen=True)
class Family:
    """What a published model is.

    unet             its sizes, as arguments of CrossAttentionUNet; `heads` is the one that no shape tells
    prediction_type  None: it was published with more than one
    text             options of its text towers, by part; none: a class is its context
    beside           the other parts of its conditioner
    sampling         defaults; `image_size` by prediction type where they differ
    """

    slug: str
    title: str
    unet: Section
    heads: Mapping[str, int]
    licence: str
    text: Mapping[str, Mapping[str, Any]]
    prediction_type: str | None = "epsilon"
    schedule: Schedule = SD_SCHEDULE
    latent_scale: float = 0.18215
    image_size: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(PREDICTIONS, 512))
    beside: Mapping[str, Section] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def signature(self) -> tuple[Any, ...]:
        return signature(self.unet)

    def sampled(self, zero_terminal_snr: bool) -> Section:
        """The section `sampling`."""
        spacing = "trailing" if zero_terminal_snr else "leading"
        usual = {"num_steps": 50, "spacing": spacing, "guidance_scale": 7.5, "guidance_rescale": 0.0}
        return usual | dict(self.sampling)


RAIL, RAIL_PLUS = "CreativeML Open RAIL-M", "CreativeML Open RAIL++-M"
WIDER = {"in_channels": 9}  # a mask and the masked picture's latents beside the noisy ones

SD1 = Family("sd1", "Stable Diffusion 1", SD1_UNET, {"num_heads": 8}, RAIL, CLIP_L)
SD2 = Family(
    "sd2",
    "Stable Diffusion 2",
    SD2_UNET,
    {"head_dim": 64},
    RAIL_PLUS,
    OPEN_CLIP_H,
    prediction_type=None,
    image_size={"epsilon": 512, "v_prediction": 768, "sample": 512},
)
SDXL = Family(
    "sdxl",
    "Stable Diffusion XL",
    SDXL_UNET,
    {"head_dim": 64},
    RAIL_PLUS,
    XL_TOWERS,
    latent_scale=0.13025,
    image_size=dict.fromkeys(PREDICTIONS, 1024),
    beside=SIZES,
    sampling={"guidance_scale": 5.0},
)
FAMILIES = (
    SD1,
    replace(
        SD1,
        slug="sd1_inpaint",
        title="Stable Diffusion 1 inpainting",
        unet=SD1_UNET | WIDER,
        beside=INPAINTING,
    ),
    SD2,
    replace(
        SD2,
        slug="sd2_inpaint",
        title="Stable Diffusion 2 inpainting",
        unet=SD2_UNET | WIDER,
        beside=INPAINTING,
        prediction_type="epsilon",
    ),
    replace(
        SD2,
        slug="sd2_depth",
        title="Stable Diffusion 2 depth",
        unet=SD2_UNET | {"in_channels": 5},
        beside=DEPTH,
        prediction_type="epsilon",
    ),
    SDXL,
    replace(
        SDXL,
        slug="sdxl_inpaint",
        title="Stable Diffusion XL inpainting",
        unet=SDXL_UNET | WIDER,
        beside=SIZES | INPAINTING,
    ),
    Family(
        "upscaler",
        "Stable Diffusion x4 upscaler",
        UPSCALER_UNET,
        {"num_heads": 8},
        RAIL_PLUS,
        OPEN_CLIP_H,
        prediction_type="v_prediction",
        schedule=PIXEL_SCHEDULE,
        latent_scale=0.08333,
        beside=UPSCALING,
        sampling={"num_steps": 75, "guidance_scale": 9.0},
    ),
    Family(
        "ldm_class",
        "class-conditional latent diffusion",
        CLASS_UNET,
        {"num_heads": 1},
        "MIT",
        {},
        schedule=CLASS_SCHEDULE,
        latent_scale=1.0,
        image_size=dict.fromkeys(PREDICTIONS, 256),
        sampling={"guidance_scale": 3.0},
    ),
)

# Latent scale of a published first stage alone, by (codebook, levels' channels, latent channels). KL-f8 is
# not here: those of Stable Diffusion 1 and 2 (0.18215) and of XL (0.13025) have the same shapes.
LATENT_SCALES: dict[tuple[bool, tuple[int, ...], int], float] = {
    (False, (128, 256, 512), 3): 1.0,  # KL-f4
    (False, (128, 256, 512), 4): 0.08333,  # of the upscaler
    (False, (128, 128, 256, 256, 512), 16): 0.22765929,  # KL-f16
    (False, (128, 128, 256, 256, 512, 512), 64): 1.0,  # KL-f32
    (True, (128, 256, 512), 3): 1.0,  # VQ-f4
    (True, (128, 256, 256, 512), 4): 1.0,  # VQ-f8
    (True, (128, 128, 256, 256, 512), 8): 1.0,  # VQ-f16
}


def signature(unet: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a family has in common whatever its sizes: layers, what it is told, what joins the latents."""
    joined = unet["in_channels"] - unet["out_channels"]
    beside = "mask and latents" if joined == 1 + unet["out_channels"] else joined
    return unet["linear_projection"], unet["pooled_dim"] is not None, unet["num_classes"] is not None, beside


def family_of(unet: Mapping[str, Any], has_class_token: bool, has_text: bool) -> tuple[Family | None, bool]:
    """The family of a U-Net, and whether its sizes are the published ones."""
    candidates = [
        family
        for family in FAMILIES
        if not (has_class_token and family.text) and not (has_text and not family.text)
    ]
    for family in candidates:
        if all(unet[key] == value for key, value in family.unet.items()):
            return family, True
    found = [family for family in candidates if family.signature == signature(unet)]
    return (found[0] if found else None), False


@dataclass(frozen=True)
class Tower:
    """A text tower's sizes; heads None: not known. `projection` is the width of the projected end token."""

    width: int
    layers: int
    vocab_size: int
    context_length: int
    projection: int | None = None
    heads: int | None = None
    quick_gelu: bool = False  # a family's, not of the shapes

    @property
    def model(self) -> str | Section:
        """open_clip's name of a published model, else the sizes."""
        sizes = (self.width, self.layers, self.vocab_size, self.context_length, self.quick_gelu)
        if sizes in PUBLISHED_TOWERS and self.projection in (None, PUBLISHED_TOWERS[sizes][1]):
            return PUBLISHED_TOWERS[sizes][0]
        return {
            "width": self.width,
            "layers": self.layers,
            "heads": self.heads or HEADS.get(self.width),
            "embed_dim": self.projection or self.width,
            "quick_gelu": self.quick_gelu,
            "vocab_size": self.vocab_size,
            "context_length": self.context_length,
        }


PUBLISHED_TOWERS = {
    (768, 12, 49408, 77, True): ("ViT-L-14-quickgelu", 768),
    (1024, 24, 49408, 77, False): ("ViT-H-14", 1024),
    (1280, 32, 49408, 77, False): ("ViT-bigG-14", 1280),
}
HEADS = {768: 12, 1024: 16, 1280: 20}  # of published widths, whatever the number of layers


def tower_section(tower: Tower, options: Mapping[str, Any]) -> Section:
    """Config of the frozen tower."""
    layer, quick_gelu = options["layer"], options.get("quick_gelu", False)
    if (
        layer == "penultimate" and tower.layers == 23
    ):  # SD 2's of 24, as diffusers stores it: the last is not used
        layer = "last"
    if isinstance(layer, int) and layer != tower.layers - 1:  # XL's first tower, of another size
        layer = "penultimate"
    return {
        "_target_": "ldm.conditioning.frozen.FrozenOpenCLIP",
        "model": replace(tower, quick_gelu=quick_gelu).model,
        "pretrained": None,
        **{name: value for name, value in options.items() if name != "quick_gelu"},
        "layer": layer,
        "context_length": tower.context_length,
        "context_dim": tower.width,
    }


def conditioner_section(
    family: Family, towers: Sequence[Tower], unet: Mapping[str, Any], where: str
) -> Section:
    """Config of the conditioner that a family has, out of its text towers in order.

    Raises InputError where widths do not fit the U-Net.
    """
    widths = [tower.width for tower in towers]
    if len(widths) != len(family.text) or sum(widths) != unet["context_dim"]:
        towers_have = f"its text towers have width {' and '.join(map(str, widths))}"
        what = f"{towers_have}, its U-Net takes a context of width {unet['context_dim']}"
        raise InputError(where, what, "is it put together of two models?")
    parts = {
        name: tower_section(tower, options)
        for (name, options), tower in zip(family.text.items(), towers, strict=True)
    }
    beside = {name: dict(section) for name, section in family.beside.items()}
    if unet["pooled_dim"] is not None:
        projected = towers[-1].projection or 0
        sizes, rest = divmod(unet["pooled_dim"] - projected, 6)
        if rest or sizes <= 0:
            what = f"pooled width {unet['pooled_dim']} is not {projected} of text and six equal sizes"
            raise InputError(where, what)
        beside["sizes"]["width"] = sizes
    if unet["num_classes"] is not None:
        beside["picture"]["num_classes"] = unet["num_classes"]
    if not beside and len(parts) == 1:
        return next(iter(parts.values()))
    section: Section = {
        "_target_": "ldm.conditioning.combined.Combined",
        "context_dim": unet["context_dim"],
        "parts": parts | beside,
    }
    return section | ({"pooled_dim": unet["pooled_dim"]} if unet["pooled_dim"] else {})
