"""FSDP2 and DDP over gloo against one process: weights, averages, moments, norms, log, pictures, collectives.

One program (`ranks.py`) trains all of it in float64, in 1, 2 and 4 processes; the tests look at what it left.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from ldm.checkpoints.files import load_tensors
from ldm.checkpoints.posthoc import FOLDER, snapshots
from tests.training.conftest import STAGE1, STAGE2, reading

STEPS = 4
COMMON = [
    *("trainer.precision=64-true", "trainer.gradient_clip_val=0.05", f"trainer.max_steps={STEPS}"),
    *("data.global_batch_size=8", "optimizer.lr=0.001", "lr_schedule.warmup=0"),
    *("callbacks.metrics.every=1", "callbacks.validation.every=2", "callbacks.pictures.every=2"),
]
SHORT = [f"trainer.max_steps={STEPS // 2}"]
BF16 = ["trainer.precision=bf16-mixed"]
LENGTHS = ["module.ema_lengths=[0.1]", "callbacks.snapshots.every=2", "callbacks.snapshots.dtype=float32"]
TWICE = ["trainer.accumulate_grad_batches=2"]
FREE = ["optimizer=schedule_free"]
BUFFERS = ("null_tokens", "latent_shift", "latent_scale", "step")
UNITS = 7  # of the tiny U-Net: two levels down and up, the middle, the rest; and the text tower


def under(strategy, world):
    target = (
        f"trainer.strategy={{_target_: ldm.training.strategies.{strategy}, timeout: 77, first_timeout: 99}}"
    )
    return [target, f"trainer.devices={world}"]


def start(folder, jobs, timeout):
    """Run the jobs; the folder has a folder for each."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    path = os.pathsep.join([str(Path(train.__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("ranks.py")), str(folder / "jobs.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return folder


@pytest.fixture(scope="module")
def made(laion, tmp_path_factory):
    """Folder with all trainings, by name."""
    two = [*STAGE2, *reading(laion), "autoencoder_from=x", *COMMON]
    one = [*STAGE1, *reading(laion), *COMMON]
    jobs = [
        {"world": 1, "name": "single", "overrides": two + LENGTHS},
        {"world": 1, "name": "single-free", "overrides": two + FREE + SHORT},
        {"world": 1, "name": "single-bf16", "overrides": two + BF16 + SHORT},
        {"world": 1, "name": "single-stage1", "overrides": one + SHORT},
    ]

    def add(world, strategy, name, options, **more):
        jobs.append({"world": world, "name": name, "overrides": options + under(strategy, world), **more})

    add(2, "fsdp", "fsdp-2", two + LENGTHS, count="collectives")
    add(2, "fsdp", "fsdp-2-half", two + LENGTHS + SHORT + TWICE, count="collectives")
    add(2, "fsdp", "fsdp-2-free", two + FREE + SHORT)
    add(2, "fsdp", "fsdp-2-bf16", two + BF16 + SHORT)
    add(2, "ddp", "ddp-2-half", two + LENGTHS + SHORT)
    add(2, "ddp", "ddp-2-bf16", two + BF16 + SHORT)
    add(2, "ddp", "ddp-2-after-fsdp", two + LENGTHS + TWICE, source="fsdp-2-half", count="buckets")
    add(4, "fsdp", "fsdp-4-after-ddp", two + LENGTHS, source="ddp-2-half")
    add(4, "fsdp", "fsdp-4-stage1", one + SHORT)
    after = {"name": "single-after-fsdp", "source": "fsdp-2-half"}
    jobs.append({"world": 1, "overrides": two + LENGTHS, **after})
    return start(tmp_path_factory.mktemp("strategies"), jobs, 550)


def state(folder, name):
    return torch.load(folder / name / "state.pt", weights_only=True)


def facts(folder, name, rank=0):
    return json.loads((folder / name / f"facts-{rank}.json").read_text())


def rows(folder, name):
    lines = [line.split(",") for line in (folder / name / "metrics.csv").read_text().splitlines()[1:]]
    return {(int(step), key): float(value) for step, key, value in lines if not key.startswith("perf/")}


AS_SINGLE = {
    "fsdp-2": "single",
    "fsdp-4-after-ddp": "single",
    "ddp-2-after-fsdp": "single",
    "single-after-fsdp": "single",
    "fsdp-2-free": "single-free",
    "fsdp-4-stage1": "single-stage1",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AS_SINGLE)
def test_weights_averages_and_moments_are_those_of_one_process(name, made):
    found, expected = state(made, name), state(made, AS_SINGLE[name])
    assert found["step"] == expected["step"]
    for kind in ("model", "ema", "optimizer"):
        assert list(found[kind]) == list(expected[kind]), "names, and their order"
        for key, value in expected[kind].items():
            torch.testing.assert_close(found[kind][key], value, rtol=1e-9, atol=1e-12, msg=f"{kind} {key}")
    assert found["settings"] == expected["settings"]


@pytest.mark.slow
@pytest.mark.parametrize("name", AS_SINGLE)
def test_losses_norms_and_validation_are_those_of_one_process(name, made):
    found, expected = rows(made, name), rows(made, AS_SINGLE[name])
    assert found == pytest.approx({key: expected[key] for key in found}, rel=2e-6)
    after = STEPS // 2 if "after" in name else 0
    assert {key for key in expected if key[0] > after} == set(found)
    kinds = {key for _, key in found}
    assert {"train/grad_norm", "train/update_norm", "train/param_norm"} <= kinds
    assert any(kind.startswith("validation/") for kind in kinds)
    assert min(value for (_, key), value in expected.items() if key == "train/grad_norm") > 0.05, "clipped"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "world"),
    [("fsdp-4-after-ddp", 4), ("ddp-2-after-fsdp", 2), ("single-after-fsdp", 1)],
)
def test_a_state_is_taken_up_bit_for_bit(name, world, made):
    assert all(facts(made, name, rank)["restored"] for rank in range(world))


@pytest.mark.slow
def test_each_rank_has_its_rows_alone(made):
    for name, world in (("fsdp-2", 2), ("fsdp-4-after-ddp", 4), ("fsdp-4-stage1", 4)):
        whole = state(made, name)
        noted = [facts(made, name, rank) for rank in range(world)]
        assert sum(one["share"] for one in noted) == pytest.approx(1)
        assert max(one["share"] for one in noted) < 1.15 / world
        parts = [torch.load(made / name / f"part-{rank}.pt", weights_only=True) for rank in range(world)]
        empty = 0
        for kind in ("model", "ema", "optimizer"):
            for key, value in whole[kind].items():
                pieces = [part[kind][key] for part in parts if key in part[kind]]
                assert len(pieces) in (1, world)
                empty += sum(piece.numel() == 0 for piece in pieces)
                assert torch.equal(torch.cat(pieces) if len(pieces) > 1 else pieces[0], value), key
                assert (len(pieces) == 1) == (value.ndim == 0 or key.endswith(BUFFERS)), key
        assert bool(empty) == (name == "fsdp-4-stage1"), "a kernel of 3 rows has none for the fourth rank"


@pytest.mark.slow
def test_a_step_gathers_and_reduces_once_however_many_micro_batches(made):
    for name, steps in (("fsdp-2", STEPS), ("fsdp-2-half", STEPS // 2)):
        calls = facts(made, name)["collectives"]
        assert calls["reduce_scatter_base_"] == UNITS * steps
        # Beside training: averages for validation and pictures, the text tower for the rehearsal, and the
        # names of all hosts (sizes, then letters).
        averages = 2 * (steps // 2)
        assert calls["allgather_base_"] == UNITS * (steps + averages) + 1 + 2


@pytest.mark.slow
def test_ddp_reduces_one_set_of_buckets_a_step_however_many_micro_batches(made):
    counts = facts(made, "ddp-2-after-fsdp")["buckets"]
    assert sorted(map(int, counts)) == list(range(STEPS // 2, STEPS))
    assert set(counts.values()) == {1}, "the tiny model is one bucket"


@pytest.mark.slow
def test_the_graph_is_static_in_stage_2_without_accumulation(made):
    assert facts(made, "ddp-2-half")["static_graph"] is True
    assert facts(made, "ddp-2-after-fsdp")["static_graph"] is False


@pytest.mark.slow
def test_patience_ends_after_the_first_step(made):
    found = [facts(made, name)["timeouts"] for name in ("fsdp-2", "fsdp-2-half", "ddp-2-half")]
    assert found == [[99, 77]] * 3, "also where a training before this one made the group"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp-2-bf16", "ddp-2-bf16"])
def test_bf16_differs_from_one_process_by_rounding_alone(name, made):
    found, expected = rows(made, name), rows(made, "single-bf16")
    assert found.keys() == expected.keys()
    losses = [key for key in expected if key[1] in ("train/loss", "validation/loss")]
    assert {key: found[key] for key in losses} == pytest.approx({k: expected[k] for k in losses}, rel=0.01)
    weights, others = state(made, name)["model"], state(made, "single-bf16")["model"]
    assert {value.dtype for value in weights.values()} == {torch.float32}, "the masters"
    assert any(not torch.equal(weights[key], others[key]) for key in weights), "bf16 was on the way"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "single"), [("fsdp-2", "single"), ("fsdp-4-stage1", "single-stage1")])
def test_pictures_are_made_of_the_gathered_averages(name, single, made):
    place = f"samples/step-{2:09d}.png"
    found, expected = (np.asarray(Image.open(made / one / place), np.int64) for one in (name, single))
    width = found.shape[1]  # rank 0 alone draws, and of stage 1 its part of the first batch
    assert np.abs(found - expected[:, :width]).max() <= 1
    assert expected.std() > 0


@pytest.mark.slow
def test_snapshots_of_averages_are_whole(made):
    found, expected = (snapshots(made / name / FOLDER) for name in ("fsdp-2", "single"))
    assert found.keys() == expected.keys() == {2, 4}
    for step, path in found.items():
        a, b = (load_tensors(one, "ema-0.1") for one in (path, expected[step]))
        assert a.keys() == b.keys()
        for key, value in b.items():
            torch.testing.assert_close(a[key], value, rtol=1e-6, atol=1e-9)
