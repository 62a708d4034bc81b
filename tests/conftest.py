"""A complete tiny run, written as training writes one: a checkpoint and the autoencoder it refers to."""

import json
import os
from pathlib import Path

import pytest

# Bits agree for one number of threads; and two processes of one thread each use two cores best.
os.environ["OMP_NUM_THREADS"] = "1"
# Before anything imports Triton, which reads it then: without a GPU its kernels run in the interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parent.parent


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


CONFIG = {
    "run_name": "tiny",
    "autoencoder": {
        "_target_": "ldm.autoencoder.kl.AutoencoderKL",
        "latent_channels": 4,
        "block_out_channels": [8, 8, 8],
        "layers_per_block": 1,
        "norm_groups": 4,
        "mid_attention": False,
    },
    "conditioner": {
        "_target_": "ldm.conditioning.text.TextTransformer",
        "width": 16,
        "layers": 1,
        "heads": 2,
        "context_length": 16,
    },
    "backbone": {
        "_target_": "ldm.backbones.unet.CrossAttentionUNet",
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "transformer_depth": [0, 1],
        "head_dim": 8,
        "context_dim": 16,
        "norm_groups": 4,
    },
    "noise_scheduler": {
        "_target_": "ldm.diffusion.noise_scheduler.VariancePreserving",
        "prediction_type": "v_prediction",
    },
    "sampler": {"_target_": "ldm.diffusion.samplers.ddim", "_partial_": True, "eta": 0.0},
    "sampling": {"num_steps": 3, "spacing": "trailing", "guidance_scale": 2.0, "guidance_rescale": 0.0},
    "data": {"image_size": 16},
}


def write_run(root: Path, step: int = 12, ema: bool = True, config: dict | None = None) -> Path:
    """A run under `root`; every weight is redrawn so that none is zero, and EMA differs from raw."""
    import torch

    from ldm.checkpoints import native
    from ldm.checkpoints.networks import network_entry, store_network
    from ldm.config import build, to_yaml

    config = CONFIG | (config or {})
    torch.manual_seed(0)
    networks = {name: build(config[name]) for name in ("autoencoder", "conditioner", "backbone")}
    for network in networks.values():
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    networks["autoencoder"].set_latent_statistics(torch.full((4,), 0.5), torch.full((4,), 2.0))
    sha256 = store_network(root, networks["autoencoder"].state_dict(), to_yaml(config["autoencoder"]))
    trained = {
        f"{name}.{key}": value
        for name in ("conditioner", "backbone")
        for key, value in networks[name].state_dict().items()
    }
    stage = root / "diffusion" / "checkpoints"
    tensors = {"model": trained}
    if ema:
        tensors["ema"] = {key: value * 0.9 for key, value in trained.items()}
    entry = network_entry(root, sha256, stage / f"step-{step:09d}")
    state = {"step": step, "images": 8 * step, "networks": {"autoencoder": entry}}
    return native.save(stage, step, tensors, {"state.json": state, "config.yaml": to_yaml(config)})


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """The folder of a run that must not be changed."""
    root = tmp_path_factory.mktemp("runs") / "tiny"
    write_run(root)
    return root


@pytest.fixture
def make_run():
    """`write_run`, for tests that need a run of their own."""
    return write_run


@pytest.fixture
def trials():
    """(few, full) -> how often to try: `full` times in benchmarks/faults.py."""
    return lambda few, full: full if os.environ.get("LDM_TRIALS") == "full" else few


@pytest.fixture
def counted(record_property):
    """Tell benchmarks/faults.py what was counted, by name; numbers of the same name are added up."""
    return lambda **numbers: record_property("counted", json.dumps(numbers))
