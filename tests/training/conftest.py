"""Tiny modules and tiny LAION-shaped shards, and the overrides that make any recipe small enough for them."""

import io
import json

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from ldm.config import build

AUTOENCODER = {
    "_target_": "ldm.autoencoder.kl.AutoencoderKL",
    "latent_channels": 4,
    "block_out_channels": [8, 8, 8],
    "layers_per_block": 1,
    "norm_groups": 4,
    "mid_attention": False,
}
CONDITIONER = {
    "_target_": "ldm.conditioning.text.TextTransformer",
    "width": 16,
    "layers": 1,
    "heads": 2,
    "context_length": 12,
}
BACKBONE = {
    "_target_": "ldm.backbones.unet.CrossAttentionUNet",
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "transformer_depth": [0, 1],
    "head_dim": 8,
    "context_dim": 16,
    "norm_groups": 4,
}
SMALL = [  # what makes a recipe of SD's size one of a second a step
    "autoencoder.block_out_channels=[8,8,8]",
    "autoencoder.layers_per_block=1",
    "autoencoder.norm_groups=4",
    "autoencoder.mid_attention=false",
]
SMALL_DIFFUSION = [
    *SMALL,
    "backbone=tiny",
    "backbone.block_out_channels=[8,16]",
    "backbone.norm_groups=4",
    "conditioner=text_transformer",
    "conditioner.width=16",
    "conditioner.layers=1",
    "conditioner.heads=2",
    "conditioner.context_length=12",
]


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)


@pytest.fixture
def networks():
    """Freshly seeded (autoencoder, conditioner, backbone), none of them zero anywhere."""

    def make(dtype=torch.float32):
        torch.manual_seed(0)
        found = [build(section) for section in (AUTOENCODER, CONDITIONER, BACKBONE)]
        for network in found:
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            network.to(dtype)
        return found

    return make


@pytest.fixture(scope="session")
def laion(tmp_path_factory):
    """Folder with two training tars of 24 + 16 and one held-out tar of 8 pictures, as img2dataset writes."""
    folder = tmp_path_factory.mktemp("laion")
    rng = np.random.default_rng(0)
    number = 0
    for name, count in (("00000.tar", 24), ("00001.tar", 16), ("held_out.tar", 8)):
        with wds.TarWriter(str(folder / name)) as tar:
            for _ in range(count):
                colour = rng.integers(0, 256, 3)
                pixels = np.clip(colour + rng.normal(0, 12, (20, 24, 3)), 0, 255).astype(np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
                facts = {
                    "caption": f"picture {number}",
                    "width": 24,
                    "height": 20,
                    "original_width": 640,
                    "original_height": 533,
                    "AESTHETIC_SCORE": 4.0 + number % 3,
                    "pwatermark": 0.1,
                    "punsafe": 0.01,
                    "similarity": 0.31,
                }
                key = f"{number:09d}"
                sample = {"__key__": key, "jpg": buffer.getvalue(), "txt": f"picture number {number}"}
                tar.write(sample | {"json": json.dumps(facts).encode()})
                number += 1
    return folder


@pytest.fixture
def data(laion):
    """Overrides that read the tiny shards."""
    return [
        "data=shards",
        f"data.shards={laion}/0000*.tar",
        f"data.validation_shards={laion}/held_out.tar",
        "data.image_size=16",
        "data.global_batch_size=4",
        "data.num_workers=0",
    ]
