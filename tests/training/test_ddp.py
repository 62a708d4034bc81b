"""Two processes over gloo against one with the double batch, float64: draws, weights, numbers, files.

A run of two stages, stopped in the middle of the second by a signal to rank 1 alone, then taken up again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ldm.training.diffusion_module as module
import train
from ldm.checkpoints import native
from ldm.errors import REQUEUE
from ldm.random import keyed_normal, keyed_uniform

STEPS = 14
OVERRIDES = [
    *("trainer.precision=64-true", f"trainer.max_steps={STEPS}", "data.global_batch_size=8"),
    *("callbacks.metrics.every=1", "callbacks.checkpoint.every=7", "callbacks.pictures.every=14"),
]
SCRIPT = """
import json, os, signal, sys
from pathlib import Path

written, runs = [], {runs!r}


def watch(event, args):
    path = os.fsdecode(args[0]) if args and isinstance(args[0], (str, bytes, os.PathLike)) else ""
    opened = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    if runs in path and (opened or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")):
        written.append(path)


sys.addaudithook(watch)
import ldm.config
ldm.config.CONFIG_DIR = Path({configs!r})
import ldm.training.diffusion_module as module
import train

folder, drawn = Path({folder!r}), []


def noting(draw):
    def wrapper(seed, n, purpose, *shape):
        values = draw(seed, n, purpose, *shape)
        first = values.flatten(1)[:, 0] if values.ndim > 1 else values
        drawn.append([purpose, n.tolist(), first.tolist()])
        return values

    return wrapper


module.keyed_normal, module.keyed_uniform = noting(module.keyed_normal), noting(module.keyed_uniform)
original = module.LatentDiffusionModule.training_step


def training_step(self, batch, batch_idx):
    if self.global_rank == 1 and self.trainer.global_step == {signal_at}:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(self, batch, batch_idx)


module.LatentDiffusionModule.training_step = training_step
if __name__ == "__main__":
    code = train.command(sys.argv[1:])
    rank = os.environ.get("LOCAL_RANK", "0")
    found = {{"drawn": drawn, "written": written, "code": code}}
    (folder / f"{name}-{{rank}}.json").write_text(json.dumps(found))
    sys.exit(code)
"""


@pytest.fixture(scope="module")
def pair(two_stage_configs, two_stage_overrides, tmp_path_factory):
    """Folder with runs/tiny, trained by two processes in two goes, and what both noted; the exit codes."""
    folder = tmp_path_factory.mktemp("pair")
    path = os.pathsep.join([str(Path(train.__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    argv = [*two_stage_overrides, *OVERRIDES, "trainer.devices=2", "trainer.strategy=ddp"]
    codes = []
    for name, signal_at in (("first", 4), ("second", -1)):
        script = folder / f"{name}.py"
        settings = {"runs": str(folder / "runs"), "configs": str(two_stage_configs), "folder": str(folder)}
        script.write_text(SCRIPT.format(**settings, signal_at=signal_at, name=name))
        command = [sys.executable, str(script), *argv, f"run_root={folder}/runs"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False)
        codes.append(done.returncode)
        assert done.returncode in (0, REQUEUE), done.stdout + done.stderr
    return folder, codes


@pytest.fixture(scope="module")
def single(two_stage_configs, two_stage_overrides, tmp_path_factory):
    """The same run by one process without a stop, and {(purpose, n): number drawn}."""
    folder, drawn = tmp_path_factory.mktemp("single"), {}

    def noting(draw):
        def wrapper(seed, n, purpose, *shape):
            values = draw(seed, n, purpose, *shape)
            first = values.flatten(1)[:, 0] if values.ndim > 1 else values
            drawn.update({(purpose, k): value for k, value in zip(n.tolist(), first.tolist(), strict=True)})
            return values

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.config.CONFIG_DIR", two_stage_configs)
        patch.setattr(module, "keyed_normal", noting(keyed_normal))
        patch.setattr(module, "keyed_uniform", noting(keyed_uniform))
        assert train.command([*two_stage_overrides, *OVERRIDES, f"run_root={folder}"]) == 0
    return folder / "tiny", drawn


def noted(folder, name, rank):
    return json.loads((folder / f"{name}-{rank}.json").read_text())


def draws(folder, name, rank):
    """{(purpose, n): number} of a process, without validation."""
    rows = noted(folder, name, rank)["drawn"]
    found = {(p, n): value for p, places, values in rows for n, value in zip(places, values, strict=True)}
    return {(p, n): value for (p, n), value in found.items() if n < 1 << 61}


def numbers(stage):
    rows = [line.split(",") for line in (stage / "metrics.csv").read_text().splitlines()[1:]]
    return {(int(step), name): float(value) for step, name, value in rows if not name.startswith("perf/")}


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_after_the_same_step(pair):
    folder, codes = pair
    assert codes == [REQUEUE, 0]
    assert [noted(folder, "first", rank)["code"] for rank in (0, 1)] == [REQUEUE, 0], "rank 0 speaks for all"
    assert min(n for _, n in draws(folder, "second", 0)) == 80, "the second go began after step 10"


@pytest.mark.slow
def test_ranks_draw_other_numbers_and_the_same_again_after_a_stop(pair, single):
    folder, _ = pair
    together = {}
    for name in ("first", "second"):
        ranks = [draws(folder, name, rank) for rank in (0, 1)]
        assert not ranks[0].keys() & ranks[1].keys()
        for purpose in ("noise", "time", "posterior", "drop"):
            mine, other = ({v for (p, _), v in found.items() if p == purpose} for found in ranks)
            assert len(mine) == len(other) > 0
            assert not mine & other, purpose
        together |= ranks[0] | ranks[1]
    expected = {key: value for key, value in single[1].items() if key[1] < 1 << 61}
    assert together == expected
    assert {n for _, n in expected} == set(range(8 * STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_weights_after_some_steps_are_those_of_one_process(stage, pair, single):
    found, expected = (
        native.newest(run / stage / "checkpoints") for run in (pair[0] / "runs/tiny", single[0])
    )
    assert found.name == expected.name == f"step-{STEPS:09d}"
    for kind in ("model", "ema", "optimizer"):
        a, b = (native.load_tensors(path, kind) for path in (found, expected))
        assert set(a) == set(b)
        for name, value in b.items():
            torch.testing.assert_close(a[name], value, rtol=1e-9, atol=1e-12)
    if stage == "autoencoder":
        scale = native.load_tensors(found, "model")["autoencoder.latent_scale"]
        assert scale.unique().numel() == 4, "measured on both ranks"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_losses_and_validation_are_those_of_one_process(stage, pair, single):
    found, expected = (numbers(run / stage) for run in (pair[0] / "runs/tiny", single[0]))
    assert found == pytest.approx(expected, rel=1e-5)
    assert any(name.startswith("validation/") for _, name in found)


@pytest.mark.slow
def test_rank_0_alone_writes_but_for_the_stacks_of_each_rank(pair):
    folder, _ = pair
    for name in ("first", "second"):
        places = {path for path in noted(folder, name, 1)["written"] if not path.endswith("/stacks")}
        rest = {path for path in places if ".tmp-" not in path and not path.endswith("/checkpoints")}
        assert {Path(path).name for path in rest} <= {"rank-00001.txt"}, "the watchdog's; and its shares"
        assert any("MANIFEST.json" in path for path in noted(folder, name, 0)["written"])
