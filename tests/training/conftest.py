"""Tiny modules and tiny LAION-shaped shards, and the overrides that make any recipe small enough for them."""

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

import train
from ldm.config import CONFIG_DIR, build

ROOT = Path(train.__file__).parent

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
    "++autoencoder.norm_groups=4",
    "autoencoder.mid_attention=false",
]
SMALL_DIFFUSION = [
    *SMALL,
    "++autoencoder.latent_scale=1.0",
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


def reading(laion):
    return [
        "data=shards",
        f"data.shards={laion}/0000*.tar",
        f"data.validation_shards={laion}/held_out.tar",
        "data.image_size=16",
        "data.global_batch_size=4",
        "data.num_workers=0",
    ]


@pytest.fixture
def data(laion):
    """Overrides that read the tiny shards."""
    return reading(laion)


STAGE1 = [
    *("module=autoencoder", "callbacks=autoencoder", "trainer=cpu", "module.latent_samples=12"),
    *("backbone=null", "conditioner=null", "noise_scheduler=null", "sampler=null"),
    *SMALL,
]
STAGE2 = ["trainer=cpu", "sampling.num_steps=2", "callbacks.pictures.prompts=[one, two]", *SMALL_DIFFUSION]
OFTEN = [  # every callback acts within a few steps, and no two at the same ones
    "optimizer.lr=0.001",
    "lr_schedule.warmup=3",
    "trainer.max_steps=7",
    "callbacks.metrics.every=2",
    "callbacks.checkpoint.every=3",
    "callbacks.validation.every=4",
    "callbacks.pictures.every=5",
]


@pytest.fixture(scope="session")
def autoencoder_run(laion, tmp_path_factory):
    """A finished run of stage 1, which must not be changed."""
    root = tmp_path_factory.mktemp("stage1")
    argv = [*STAGE1, *reading(laion), *OFTEN, f"run_root={root}", "run_name=first"]
    assert train.command(argv) == 0
    return root / "first"


@pytest.fixture(scope="session")
def stage2(laion, autoencoder_run):
    """Overrides of a tiny run of stage 2, less its name and place, for what several tests share."""
    return [*STAGE2, *reading(laion), *OFTEN, f"autoencoder_from={autoencoder_run}"]


@pytest.fixture
def recipe(data, tmp_path, request):
    """(stage 1 or 2, run_name, overrides) -> the command line of a tiny run in tmp_path."""

    def make(stage, name, *overrides):
        argv = [*(STAGE1 if stage == 1 else STAGE2), *data, *OFTEN]
        if stage == 2:
            argv.append(f"autoencoder_from={request.getfixturevalue('autoencoder_run')}")
        return [*argv, f"run_root={tmp_path}", f"run_name={name}", *overrides]

    return make


TWO_STAGES = {  # experiments that train.py finds in a copy of configs/
    "tiny": ["run_name: tiny", "stages: [tiny_autoencoder, tiny_diffusion]"],
    "tiny_autoencoder": [
        "defaults:",
        "  - override /module: autoencoder",
        "  - override /callbacks: autoencoder",
        *(
            f"  - override /{group}: null"
            for group in ("backbone", "conditioner", "noise_scheduler", "sampler")
        ),
        *("stage: autoencoder", "module: {latent_samples: 12}"),
    ],
    "tiny_diffusion": [
        "defaults:",
        "  - override /backbone: tiny",
        "  - override /conditioner: text_transformer",
        "autoencoder_from: ${run_dir}/autoencoder",
        "backbone: {block_out_channels: [8, 16], norm_groups: 4}",
        "conditioner: {width: 16, layers: 1, heads: 2, context_length: 12}",
        *("stage: diffusion", "sampling: {num_steps: 2}", "callbacks: {pictures: {prompts: [one, two]}}"),
    ],
}


@pytest.fixture(scope="session")
def two_stage_configs(tmp_path_factory):
    """A copy of configs/ with an experiment `tiny` of two stages."""
    folder = shutil.copytree(CONFIG_DIR, tmp_path_factory.mktemp("copy") / "configs")
    for name, lines in TWO_STAGES.items():
        (folder / f"experiment/{name}.yaml").write_text("\n".join(["# @package _global_", *lines, ""]))
    return folder


@pytest.fixture(scope="session")
def two_stage_overrides(laion):
    return [
        "experiment=tiny",
        "trainer=cpu",
        *SMALL,
        "++autoencoder.latent_scale=1.0",
        *reading(laion),
        *OFTEN,
    ]


@pytest.fixture
def two_stages(two_stage_configs, two_stage_overrides, monkeypatch):
    """(run_root, overrides) -> the command line of a tiny run of two stages."""
    monkeypatch.setattr("ldm.config.CONFIG_DIR", two_stage_configs)
    return lambda root, *overrides: [*two_stage_overrides, f"run_root={root}", *overrides]


SCRIPT = """
import os, sys, time
from pathlib import Path
import ldm.config
ldm.config.CONFIG_DIR = Path({configs!r})
import train
from ldm.training.module import TrainingModule

at, hold, step_time = {at!r}, {hold!r}, {step_time!r}
original = TrainingModule.optimizer_step

def optimizer_step(self, *args, **kwargs):
    time.sleep(step_time)
    if [type(self).__name__, self.trainer.global_step + 1] == at:
        os._exit(9)
    if self.trainer.global_step + 1 == hold:
        time.sleep(600)
    original(self, *args, **kwargs)

TrainingModule.optimizer_step = optimizer_step
if __name__ == "__main__":
    sys.exit(train.command(sys.argv[1:]))
"""


@pytest.fixture
def process(two_stage_configs, tmp_path):
    """(command line) -> train.py as a process; `at=(module, step)`: it dies in the middle of that step.

    `hold`: it stops for good before that optimizer step, for a test to kill it there. `source` is another
    program that runs train.py.
    """
    started = []

    def start(argv, at=None, hold=None, step_time=0.0, env=None, source=None):
        settings = {"configs": str(two_stage_configs), "at": at and list(at), "hold": hold}
        settings["step_time"] = step_time
        script = tmp_path / f"script{len(started)}.py"
        script.write_text(source or SCRIPT.format(**settings))
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(env or {})}
        command = [sys.executable, str(script), *argv]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=env, start_new_session=True, **pipes))
        return started[-1]

    yield start
    for one in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.pid, signal.SIGKILL)  # its loader workers too
        one.wait()
        one.stdout.close()


@pytest.fixture
def refused(capsys):
    """(command line) -> the one line that it ends with, exit code 2."""

    def line_of(argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train.command(argv)
        assert stop.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ldm: error: ")]
        return line.removeprefix("ldm: error: ")

    return line_of


@pytest.fixture
def rows():
    """Run or stage -> its metrics.csv as a list of (step, name, value), without what depends on the clock."""

    def read(folder):
        with (folder / "metrics.csv").open(newline="") as file:
            return [tuple(row) for row in csv.reader(file) if not row[1].startswith("perf/")][1:]

    return read


@pytest.fixture
def assert_same_run(rows):
    """Two runs or stages: newest checkpoint equal byte for byte, and the same rows in the log.

    The files of one process and of several are other files.
    """

    def check(run, other):
        newest, expected = (sorted((folder / "checkpoints").glob("step-*"))[-1] for folder in (run, other))
        assert newest.name == expected.name
        names = {path.name for path in newest.iterdir() if path.suffix == ".safetensors"} | {"data.json"}
        assert names - {"data.json"}
        assert names <= {path.name for path in expected.iterdir()}
        for name in names:
            assert (newest / name).read_bytes() == (expected / name).read_bytes(), name
        assert rows(run) == rows(other)

    return check


@pytest.fixture
def small_diffusion():
    """Overrides that make any stage-2 recipe tiny."""
    return SMALL_DIFFUSION
