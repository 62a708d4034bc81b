"""A real Slurm for the session, folders that look like a checkout to slurm/, recipes as resolved configs."""

from __future__ import annotations

import functools
import importlib.util
import shutil
from pathlib import Path

import pytest

from ldm.cluster.planning import configs

ROOT = Path(__file__).parents[2]


def _module(path: Path):
    spec = importlib.util.spec_from_file_location(f"shared_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_lab = _module(Path(__file__).with_name("slurm_lab.py"))
_training = _module(ROOT / "tests/training/conftest.py")
laion, data, two_stage_configs = _training.laion, _training.data, _training.two_stage_configs
two_stage_overrides = _training.two_stage_overrides


@pytest.fixture(scope="session")
def slurm_lab():
    """A running `slurm_lab.SlurmLab` of two nodes of two CPUs; skips where Slurm is not installed."""
    if absent := _lab.missing():
        packages = "apt-get install slurmctld slurmd slurm-client munge"
        pytest.skip(f"no Slurm here ({', '.join(absent)} not found): {packages}")
    with _lab.SlurmLab() as lab:
        yield lab


@pytest.fixture
def checkout(tmp_path):
    """(source of its train.py, a folder) -> a new folder in that with it and slurm/, to submit from."""

    def make(source: str, home: Path = tmp_path) -> Path:
        folder = home / "checkout"
        shutil.copytree(ROOT / "slurm", folder / "slurm")
        (folder / "train.py").write_text(source)
        return folder

    return make


@pytest.fixture
def real_train(two_stage_configs):
    """Source of a train.py that is ours, with `experiment=tiny` among its recipes."""
    return f"""
import importlib.util, sys
from pathlib import Path
import ldm.config
from ldm.training import launch
ldm.config.CONFIG_DIR = Path({str(two_stage_configs)!r})
spec = importlib.util.spec_from_file_location("real_train", {str(ROOT / "train.py")!r})
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)
if __name__ == "__main__":
    sys.exit(launch.noted(train.command, sys.argv[1:]))
"""


@pytest.fixture
def training():
    """Overrides of tiny runs: tests/training/conftest.py."""
    return _training


@functools.cache
def resolved(words):
    (cfg,) = configs(list(words))
    return cfg


@pytest.fixture
def composed():
    """(recipe, overrides) -> its config, of one stage."""
    return lambda name, *more: resolved((f"experiment={name}", *more))
