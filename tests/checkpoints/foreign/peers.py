"""Small random pipelines of diffusers, as the oracle of folders: every parameter is redrawn N(0, 0.05^2)."""

from __future__ import annotations

import functools
from pathlib import Path

import diffusers
import torch
import transformers

from ldm.checkpoints.foreign.tokenizer import files

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
WIDTHS = {"sd1": 16, "sd2": 24, "sdxl": 16 + 24}
CLASSES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sd1_inpaint": "StableDiffusionInpaintPipeline",
    "sd2_depth": "StableDiffusionDepth2ImgPipeline",
    "upscaler": "StableDiffusionUpscalePipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl_inpaint": "StableDiffusionXLInpaintPipeline",
}
FAMILIES = list(CLASSES)
CHANNELS = {"inpaint": 9, "depth": 5, "upscaler": 7}


def redrawn(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def lively(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Redrawn so that signals keep their size: what a pipeline of it is told shows in its pictures."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                fan = parameter[0].numel() if "embedding" not in name or "linear" in name else 1
                parameter.copy_(noise * 1.4 / fan**0.5)
            else:
                parameter.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))
    return module.eval()


def unet(family: str):
    base = family.split("_")[0]
    options: dict = {"block_out_channels": (16, 32), "norm_num_groups": 8, "sample_size": 16}
    if base == "sdxl":
        options |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (2, 4),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 20 + 6 * 8,
        }
    elif family == "upscaler":
        options |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (16, 32, 32),
            "only_cross_attention": (False, True, False),
            "num_class_embeds": 1000,
            "attention_head_dim": 8,
        }
    else:
        options |= {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 8 if base == "sd1" else (2, 4),
        }
    network = diffusers.UNet2DConditionModel(
        in_channels=next((count for word, count in CHANNELS.items() if word in family), 4),
        layers_per_block=1,
        cross_attention_dim=WIDTHS.get(base, 24),
        use_linear_projection=base != "sd1",
        **options,
    )
    return redrawn(network, 1)


def autoencoder(kind: str = "kl", scale: float = 0.18215, **options):
    shared = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "layers_per_block": 1,
        "scaling_factor": scale,
        "sample_size": 64,
    }
    if kind == "vq":
        return redrawn(diffusers.VQModel(num_vq_embeddings=32, **shared | options), 2)
    return redrawn(diffusers.AutoencoderKL(**shared | options), 2)


def tower(width: int, layers: int, quick: bool, projection: int | None = None):
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        projection_dim=projection or width,
        hidden_act="quick_gelu" if quick else "gelu",
        eos_token_id=49407,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return redrawn(kind(config), 3 + width)


def tokenizer(folder: Path, padding: str):
    folder.mkdir(parents=True)
    for name, text in files(77, padding).items():
        (folder / name).write_text(text, encoding="utf-8")
    return transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def pipeline(family: str, place: Path, draw=redrawn):
    """A pipeline of that family; `place` is a folder for what it is made of."""
    base, parts = family.split("_")[0], {}
    if base == "sdxl":
        parts = {
            "text_encoder": tower(16, 3, True),
            "text_encoder_2": tower(24, 3, False, 20),
            "tokenizer": tokenizer(place / "a", "end"),
            "tokenizer_2": tokenizer(place / "b", "zero"),
        }
    elif family == "sd2_depth":
        parts = {"depth_estimator": None, "feature_extractor": None}
    elif family == "upscaler":
        low = diffusers.DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False)
        parts = {"low_res_scheduler": low}
    else:
        parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if base != "sdxl":
        parts |= {
            "text_encoder": tower(16, 3, True) if base == "sd1" else tower(24, 2, False),
            "tokenizer": tokenizer(place / "a", "end" if base == "sd1" else "zero"),
        }
    prediction = {"sd2": "v_prediction", "upscaler": "v_prediction"}.get(base, "epsilon")
    process = diffusers.DDIMScheduler(
        **SCHEDULE | {"prediction_type": prediction, "steps_offset": 1, "clip_sample": False}
    )
    scale = {"upscaler": 0.08333, "sdxl": 0.13025}.get(base, 0.18215)
    made = getattr(diffusers, CLASSES[family])(
        unet=unet(family), vae=autoencoder(scale=scale), scheduler=process, **parts
    )
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(made, name, None) is not None:
            draw(getattr(made, name), 5)
    made.set_progress_bar_config(disable=True)
    return made


@functools.cache
def saved(family: str, root: Path, draw=redrawn) -> tuple:
    """(pipeline, its folder as diffusers saves it), made once."""
    root = root / draw.__name__
    made = pipeline(family, root / f"{family}-tokenizers", draw)
    made.save_pretrained(root / family)
    return made, root / family
