"""What data.json says of a run's samples, what its log says of bad ones, and when it stops over them."""

import csv
import json
import os
import shutil
import signal
import tarfile
from itertools import islice

import numpy as np
import pytest
import xxhash

import train
from ldm.checkpoints import native
from ldm.config import build, compose
from ldm.training.module import TrainingModule

LAST = "checkpoints/step-000000007/data.json"


def document(run):
    return json.loads((run / LAST).read_text())


def expected_digest(argv, samples):
    """Of the first samples of the plan, found without a loader."""
    data = build(compose("train", argv).data)
    rows = data.plan().places(np.arange(samples)).place
    keys = data.sources[0].index.keys(data.sources[0].selection.rows[rows])
    return f"{sum(xxhash.xxh3_64_intdigest(key.encode()) for key in keys) % 2**64:016x}"


@pytest.mark.parametrize("more", [[], ["trainer.accumulate_grad_batches=2"], ["data.num_workers=2"]])
def test_the_digest_is_that_of_the_plan(more, recipe, tmp_path):
    argv = recipe(1, "run", *more)
    assert train.command(argv) == 0
    found = document(tmp_path / "run")
    assert found["samples"] == 28
    assert found["digest"] == expected_digest(argv, 28)
    assert found["digest_from"] == 0
    assert found["masked"] == {}


@pytest.fixture
def damaged(laion, recipe, tmp_path):
    """Override for a copy of the shards, indexed; pictures 3, 8 and 30 were then overwritten."""
    folder = shutil.copytree(laion, tmp_path / "damaged")
    override = f"data.shards={folder}/0000*.tar"
    build(compose("train", recipe(1, "x", override)).data).setup()
    for path in sorted(folder.glob("0000*.tar")):
        with tarfile.open(path) as tar:
            pictures = {member.name: member for member in tar.getmembers() if member.name.endswith("jpg")}
        stat = path.stat()
        with path.open("r+b") as file:
            for number in (3, 8, 30):
                member = pictures.get(f"{number:09d}.jpg")
                if member is not None:
                    file.seek(member.offset_data)
                    file.write(bytes(member.size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return override


def masked_rows(run):
    with (run / "metrics.csv").open(newline="") as file:
        return {(int(r[0]), r[1]): float(r[2]) for r in csv.reader(file) if r[1].startswith("data/")}


def test_masked_samples_are_in_the_log_and_in_the_checkpoint(damaged, recipe, tmp_path, assert_same_run):
    argv = recipe(1, "run", damaged, "trainer.max_steps=7", "data.num_workers=1")
    assert train.command(argv) == 0
    data = build(compose("train", argv).data)
    rows = data.plan().places(np.arange(28)).place
    bad = np.flatnonzero(np.isin(rows, (3, 8, 30)))
    assert len(bad) > 1
    (reason,) = document(tmp_path / "run")["masked"]
    assert document(tmp_path / "run")["masked"][reason] == len(bad)
    counts = masked_rows(tmp_path / "run")
    assert {name for _, name in counts} == {f"data/masked/{reason}"}
    for step in (2, 4, 6):
        mine = int(((bad >= 4 * step - 8) & (bad < 4 * step)).sum())
        assert counts.get((step, f"data/masked/{reason}"), 0) == mine
    log = (tmp_path / "run/log.txt").read_text()
    keys = data.sources[0].index.keys(data.sources[0].selection.rows[rows[bad]])
    assert all(f"masked {key}: {reason}" in log for key in keys)

    parts = recipe(1, "parts", damaged, "data.num_workers=1")
    assert train.command([*parts, "trainer.max_steps=5"]) == 0
    assert train.command(parts) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "run")


def test_too_much_bad_data_stops_the_run_with_a_list(damaged, recipe, refused, tmp_path):
    line = refused(recipe(1, "run", damaged, "data.budget.fraction=0.0", "data.budget.window=100"))
    assert line.startswith("data.budget.fraction: ")
    assert "masked in this run: " in line
    assert native.newest(tmp_path / "run/checkpoints") is None
    assert train.command(recipe(1, "run", damaged, "data.budget.fraction=1.0")) == 0, "may be raised"


def test_a_shard_that_vanishes_in_mid_run(laion, recipe, tmp_path, monkeypatch):
    folder = shutil.copytree(laion, tmp_path / "data")
    lost, stat = folder / "00001.tar", (folder / "00001.tar").stat()
    budget = "data.budget={in_a_row:null,fraction:null,window:100,shards:0.001}"
    workers = ["data.num_workers=1", "data.prefetch_factor=1", "callbacks.checkpoint.keep_last=9"]
    argv = recipe(1, "run", f"data.shards={folder}/0000*.tar", budget, *workers)
    original, whole = TrainingModule.optimizer_step, lost.read_bytes()

    def optimizer_step(self, *args, **kwargs):
        if self.trainer.global_step == 1:
            lost.write_bytes(b"")  # workers may have it open
        original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "optimizer_step", optimizer_step)
        assert train.command([*argv, "trainer.max_steps=12"]) == 0
    before, after = (
        json.loads((tmp_path / f"run/checkpoints/step-{step:09d}/data.json").read_text()) for step in (3, 12)
    )
    ((shard, reason, first),) = after["quarantine"]
    assert shard == 1
    assert 4 <= first < 48
    assert after["masked"] == {reason: after["masked"][reason]}
    assert after["masked"][reason] >= before["masked"].get(reason, 0)
    assert masked_rows(tmp_path / "run")[12, "data/shards_given_up"] == 1
    assert f"00001.tar is given up: {reason}" in (tmp_path / "run/log.txt").read_text()

    lost.write_bytes(whole)  # it is back, but a replay must see what the run saw
    os.utime(lost, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert train.command([*argv, "trainer.max_steps=13"]) == 0
    (newest,) = (tmp_path / "run").glob("checkpoints/*13/data.json")
    assert json.loads(newest.read_text())["quarantine"] == after["quarantine"]
    data = build(compose("train", argv).data)
    data.check_state(json.loads(newest.read_text()))
    for batch in islice(data.stream(start=52), 10):
        masked = [reason if key.startswith("00001/") else "" for key in batch.key]
        assert list(batch.reason) == masked


# ---- two ranks


def pair(recipe, *overrides):
    return recipe(1, "run", *overrides, "trainer.devices=2", "trainer.strategy=ddp", "trainer.max_steps=12")


@pytest.mark.slow
def test_two_ranks_have_the_digest_of_one_and_stop_together(damaged, recipe, process, tmp_path):
    argv = pair(recipe, damaged, "callbacks.checkpoint.every=3", "callbacks.checkpoint.keep_last=9")
    two = process(argv)
    output, _ = two.communicate(timeout=200)
    assert two.returncode == 0, output
    found = document_at(tmp_path / "run", 6)
    assert found["digest"] == expected_digest(argv, 24)
    assert sum(found["masked"].values()) > 0

    stopped = process([*pair(recipe, damaged, "data.budget.fraction=0.0"), "run_name=stops"])
    output, _ = stopped.communicate(timeout=200)
    assert stopped.returncode == 2, output
    assert output.count("ldm: error: data.budget.fraction") == 1


def document_at(run, step):
    return json.loads((run / f"checkpoints/step-{step:09d}/data.json").read_text())


KILLER = """
import os, signal, sys

class Kill:
    def __call__(self, source):
        for part in source:
            if part["n"][0] >= {fatal}:
                os.kill(os.getpid(), signal.SIGKILL)
            yield part

import ldm.data.datamodule as module
original = module.ShardDataModule._pipeline
def pipeline(self, *stages):
    made = original(self, *stages)
    if os.environ.get("LOCAL_RANK", "0") == "{rank}":
        made.append(Kill())
    return made
module.ShardDataModule._pipeline = pipeline
import train
if __name__ == "__main__":
    sys.exit(train.command(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_workers_die_again_and_again_ends_all(rank, recipe, process, tmp_path):
    argv = pair(recipe, "data.num_workers=1", "data.prefetch_factor=1", "data.multiprocessing_context=fork")
    one = process(argv, source=KILLER.format(rank=rank, fatal=8))
    output, _ = one.communicate(timeout=300)
    assert one.returncode not in (0, None), output
    assert one.returncode in (1, 2, -signal.SIGKILL), output
    assert "4 times at the same place" in output
