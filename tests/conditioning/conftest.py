"""Every conditioner's YAML made small, and batches that each of them can read."""

import json
import socket

import open_clip
import pytest
import torch
from omegaconf import OmegaConf

from ldm.autoencoder.kl import AutoencoderKL
from ldm.config import CONFIG_DIR, build
from ldm.types import Batch

TOWER = {"model": "tiny", "pretrained": "random", "context_length": 12}
TINY = {  # a new YAML without an entry here fails every law
    "text_transformer": {"width": 32, "layers": 2, "heads": 2, "context_length": 12, "pooled_dim": 8},
    "open_clip": {**TOWER, "pooled": True, "context_dim": 16},
    "class_label": {"num_classes": 11},
    "class_token": {"num_classes": 11, "context_dim": 16},
    "sdxl": {
        "context_dim": 32,
        "pooled_dim": 8 + 6 * 4,
        "parts": {"clip_l": {**TOWER, "layer": 2}, "big_g": TOWER, "sizes": {"width": 4}},
    },
    "inpainting": {"context_dim": 16, "parts": {"text": TOWER}},
    "depth": {"context_dim": 16, "parts": {"text": TOWER}},
    "upscaling": {
        "context_dim": 16,
        "parts": {
            "text": TOWER,
            "picture": {"num_classes": 20, "max_noise_level": 19, "noise_level": 3},
        },
    },
}
CAPTIONS = ["a red apple on a blue background", "", "two cats"]


@pytest.fixture(autouse=True)
def tiny(tmp_path_factory):
    """A small model under open_clip's name `tiny`, and `foreign`, whose text tower is not CLIP's."""
    folder = tmp_path_factory.mktemp("models")
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}
    config = {
        "embed_dim": 8,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": text,
    }
    (folder / "tiny.json").write_text(json.dumps(config))
    (folder / "foreign.json").write_text(json.dumps({**config, "text_cfg": {**text, "no_causal_mask": True}}))
    open_clip.add_model_config(folder)
    yield
    for name in ("tiny", "foreign"):
        open_clip.factory._MODEL_CONFIGS.pop(name)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def autoencoder():
    """Factor 4, 4 latent channels."""
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=[8, 8, 8], layers_per_block=1, norm_groups=4, mid_attention=False)


@pytest.fixture
def build_tiny(autoencoder):
    """Name of a YAML -> its conditioner, small, with the autoencoder that it may use."""

    def make(name):
        torch.manual_seed(0)
        section = OmegaConf.load(CONFIG_DIR / "conditioner" / f"{name}.yaml")
        root = OmegaConf.create({"seed": 5, "conditioner": OmegaConf.merge(section, TINY[name])})
        conditioner = build(root.conditioner)
        conditioner.use_autoencoder(autoencoder)
        return conditioner

    return make


@pytest.fixture
def whole_batch():
    """(how many, first place) -> a batch with every field that a conditioner may read; row 1 says nothing."""

    def make(size=3, start=0):
        n = torch.arange(start, start + size)
        pixels = torch.Generator().manual_seed(start)
        return Batch(
            n=n,
            weight=torch.ones(size),
            caption=[CAPTIONS[k % 3] for k in n.tolist()],
            label=torch.where(n % 3 == 1, -1, n % 10),
            image=torch.randint(0, 256, (size, 3, 32, 32), generator=pixels, dtype=torch.uint8),
            original_size=torch.stack([n + 640, n + 480], 1),
            crop=torch.stack([n, n + 7], 1),
        )

    return make
