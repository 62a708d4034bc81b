"""The suite for a GPU runs on a CPU at toy size, by the same code, and needs torch and einops alone."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import harness

BLOCKED = ("lightning", "hydra", "omegaconf", "webdataset", "open_clip", "wandb", "diffusers", "safetensors")
SCRIPT = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
from benchmarks.gpu.__main__ import main
sys.exit(main({argv!r}))
"""


def run(argv, blocked=()):
    script = SCRIPT.format(blocked=blocked, argv=argv)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": str(harness.ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", script]
    return subprocess.run(command, env=env, cwd=harness.ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="toy sizes are for CPUs")
def test_the_suite_runs_without_a_gpu_or_other_packages(tmp_path):
    path = tmp_path / "gpu.json"
    done = run(["--only", "G4,G5A,G7", "--json", str(path)], BLOCKED)
    assert done.returncode == 0, done.stderr[-2000:]
    parts = json.loads(path.read_text())["parts"]
    assert list(parts) == ["G4", "G5A", "G7"]
    assert "## G4" in path.with_suffix(".md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="toy sizes are for CPUs")
def test_all_parts_add_to_one_file(tmp_path):
    path = tmp_path / "gpu.json"
    for parts in ("G1,G5", "G9,G11,G13"):
        done = run(["--only", parts, "--json", str(path)])
        assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(path.read_text())["parts"]
    assert list(found) == ["G1", "G5", "G9", "G11", "G13"]
    assert all(part["rows"] for part in found.values())
    ours = [row for row in found["G1"]["rows"] if "diffusers" not in row["setting"]]
    assert len(ours) < len(found["G1"]["rows"])
    assert len({round(row["losses"][0], 3) for row in ours}) == 1, "equal work"
