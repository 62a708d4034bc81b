"""Start-up (C7): import, help, a composed config, and the first optimizer step, each in a fresh process."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Measured

# What a person who knows both libraries would begin with: a config, a module, a step.
TEMPLATE = """
import hydra
import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf

class Module(pl.LightningModule):
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.net = cfg, torch.nn.Conv2d(4, 4, 3, padding=1)
    def training_step(self, batch, index):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.cfg.lr)

@hydra.main(version_base=None)
def main(cfg):
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, default_root_dir=cfg.root)
    trainer.fit(Module(cfg), torch.utils.data.DataLoader(torch.randn(8, 4, 8, 8), batch_size=4))

main()
"""
TINY = [
    *("data=emoji", "autoencoder=tiny", "backbone=tiny", "conditioner=text_transformer", "trainer=cpu"),
]


def clocked(command: Sequence[str], folder: Path) -> Measured:
    """Until the process has ended; CPU time is its own."""
    env = {**os.environ, "PYTHONPATH": str(harness.ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(1, seconds, cpu)


def starts(rounds: int) -> list[Any]:
    python = [sys.executable, "-W", "ignore"]
    train = [*python, str(harness.ROOT / "train.py")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "template.py").write_text(TEMPLATE)
        template = [*python, "template.py", f"+root={folder}", "+lr=1e-4", "hydra.output_subdir=null"]
        first = [*train, "experiment=quickstart_autoencoder", "debug=fast", "trainer.max_steps=1"]
        first += [f"run_root={folder}", "run_name=first"]
        races = {
            "import": ({"import ldm": [*python, "-c", "import ldm"]}, {}),
            "help": ({"ldm --help": [*python, "-m", "ldm.cli", "--help"]}, {}),
            "config": (
                {"train.py --cfg job": [*train, "experiment=quickstart_diffusion", "--cfg", "job"]},
                {},
            ),
            "first step": (
                {"train.py, a tiny first step": first},
                {"Hydra and Lightning, a template": 1 / 0.7},
            ),
        }
        peers = {
            "import": {"import torch": [*python, "-c", "import torch"]},
            "help": {"import argparse": [*python, "-c", "import argparse"]},
            "config": {"import hydra, omegaconf": [*python, "-c", "import hydra, omegaconf"]},
            "first step": {"Hydra and Lightning, a template": [*template, "hydra.run.dir=."]},
        }
        if harness.missing("diffusers") is None:
            peers["import"]["import diffusers"] = [*python, "-c", "import diffusers"]
        if harness.missing("diffusers", "accelerate") is None:
            whole = "from diffusers import UNet2DConditionModel, AutoencoderKL, DDPMScheduler"
            peers["first step"]["imports of a script of diffusers"] = [
                *python,
                "-c",
                f"import accelerate; {whole}",
            ]
        found = []
        for part, (mine, goals) in races.items():
            commands = {**mine, **peers[part]}

            def turn(command: list[str]) -> Measured:
                with tempfile.TemporaryDirectory(dir=folder) as fresh:
                    words = [w.replace(f"run_root={folder}", f"run_root={fresh}") for w in command]
                    return clocked(words, folder)

            contestants = {n: (lambda c=c: turn(c)) for n, c in commands.items()}
            for each in contestants.values():
                each()  # files are in memory, bytecode is there
            found.append(
                harness.race(
                    f"C7 {part}", "A fresh process, until it has ended.", contestants, rounds, "starts", goals
                )
            )
        return found
