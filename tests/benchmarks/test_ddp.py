"""The race of the trainer against a plain loop runs, in a few steps; its figures mean nothing then."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import harness


@pytest.mark.slow
def test_both_contestants_train_in_two_processes(tmp_path):
    argv = [
        sys.executable,
        "-m",
        "benchmarks.ddp",
        "--small",
        "--rounds",
        "1",
        "--json",
        str(tmp_path / "x.json"),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(harness.ROOT)}
    subprocess.run(argv, env=env, cwd=harness.ROOT, capture_output=True, timeout=400, check=True)
    (race,) = json.loads((tmp_path / "x.json").read_text())["results"]
    assert race["ours"] == "ours"
    assert {name: [run["count"] for run in runs] for name, runs in race["runs"].items()} == {
        "ours": [12],
        "plain loop": [12],
    }
    assert all(run["seconds"] > 0 for runs in race["runs"].values() for run in runs)
