"""Checkpoints written by a thread, and by several ranks: what lands, what a death or a full disk leaves."""

import errno
import os
import subprocess
import sys
import textwrap
import threading
import types
from pathlib import Path

import pytest
import torch

from ldm.checkpoints import files, native, writer
from ldm.checkpoints.pieces import open_pieces
from ldm.checkpoints.writer import GIVEN_UP, Part, Snapshot, Writer, store

DATA = Path(__file__).parent / "data"


def tensors(value=1.0):
    return {
        "model": {"a": torch.full((3, 2), value), "b": torch.full((), value)},
        "ema": {"a": torch.ones(3)},
    }


def loaded(folder, name="model"):
    return {key: tensor.read() for key, tensor in open_pieces(folder, name).items()}


# ---- one process


def test_the_snapshot_uses_its_memory_again_and_keeps_the_layout():
    snapshot, image = Snapshot(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    first = snapshot.take({"model": {"w": image}})["model"]["w"]
    snapshot.ready()
    assert torch.equal(first, image)
    assert first.stride() == image.stride()
    assert first.data_ptr() != image.data_ptr()
    image.add_(1)
    second = snapshot.take({"model": {"w": image}})["model"]["w"]
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(second, image)
    other = snapshot.take({"model": {"w": image.double()}})["model"]["w"]
    assert other.dtype == torch.float64


@pytest.mark.fault(19)
def test_weights_that_change_while_they_are_written_are_written_as_they_were(tmp_path, monkeypatch, counted):
    go, began = threading.Event(), threading.Event()
    original = writer.write_tensors

    def slow(path, values):
        began.set()
        assert go.wait(60)
        return original(path, values)

    monkeypatch.setattr(writer, "write_tensors", slow)
    weights = {"model": {"w": torch.randn(1000), "step": torch.tensor(7.0)}}
    before = {name: value.clone() for name, value in weights["model"].items()}
    one = Writer()
    one.submit(Part(tmp_path, 1, weights, {"state.json": {"step": 1}}))
    assert began.wait(60)
    for value in weights["model"].values():
        value.mul_(3).add_(1)
    assert native.newest(tmp_path) is None, "it is not there before it is whole"
    go.set()
    one.wait()
    found = loaded(native.newest(tmp_path))
    assert all(torch.equal(found[name], value) for name, value in before.items())
    counted(mutations=1, deviations=0)


def test_one_waits_for_the_one_before_it_and_then_old_ones_go(tmp_path, caplog):
    one = Writer(lambda: native.prune(tmp_path, 2))
    for step in range(1, 6):
        one.submit(Part(tmp_path, step, tensors(step), {"state.json": {"step": step}}))
    one.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000004", "step-000000005"]
    assert torch.equal(loaded(native.newest(tmp_path))["a"], torch.full((3, 2), 5.0))


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.fault(5)
def test_what_cannot_be_written_is_lost_said_and_counted(tmp_path, monkeypatch, caplog, counted):
    one = Writer()
    one.submit(Part(tmp_path, 1, tensors(), {"state.json": {"step": 1}}))
    one.wait()
    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_tensors", full)
        for step in (2, 3):
            one.submit(Part(tmp_path, step, tensors(), {"state.json": {"step": step}}))
            one.wait()
    assert one.failures == 2
    assert "the checkpoint of step 3 was not written (No space left on device)" in one.problem
    assert "GB are free" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"], "no rubbish"
    one.submit(Part(tmp_path, 4, tensors(), {"state.json": {"step": 4}}))
    one.wait()
    assert one.failures == 0
    assert native.newest(tmp_path).name == "step-000000004"
    counted(full_disks=2, lost_checkpoints=0)


def test_what_will_not_fit_is_not_begun(tmp_path, monkeypatch):
    usage = types.SimpleNamespace(total=10**9, used=10**9 - 20, free=20)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(writer, "write_tensors", lambda *_: pytest.fail("it began"))
    with pytest.raises(OSError, match="needs 0.00 GB"):
        store(Part(tmp_path, 1, tensors(), {}))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_gives_back_something_else_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "digest", lambda path, anew=False: "0" * 64)
    with pytest.raises(OSError, match="reads back otherwise"):
        store(Part(tmp_path, 1, tensors(), {}))
    assert list(tmp_path.iterdir()) == []


# ---- several ranks


def parts(root, step=1, ranks=3, token=77):
    names = [f"n{i}" for i in range(7)]
    values = {name: torch.full((2,), float(i)) for i, name in enumerate(names)}
    return [
        Part(
            root,
            step,
            {"model": {name: values[name] for name in names[rank::ranks]}},
            {"state.json": {"step": step}} if rank == 0 else {},
            rank,
            ranks,
            token,
        )
        for rank in range(ranks)
    ], values


def test_ranks_write_one_checkpoint_in_any_order(tmp_path):
    for step, order in enumerate(([0, 1, 2], [2, 1, 0]), 1):
        made, values = parts(tmp_path, step)
        writers = [Writer() for _ in made]
        for rank in order:
            writers[rank].submit(made[rank])
        for one in writers:
            one.wait()
            assert one.failures == 0, one.problem
        folder = tmp_path / f"step-{step:09d}"
        native.verify(folder)
        assert loaded(folder).keys() == values.keys()
        assert {path.name for path in folder.iterdir()} == {
            "MANIFEST.json",
            "state.json",
            *(f"model.rank-{rank:05d}-of-00003.safetensors" for rank in range(3)),
        }


def rubbish(root):
    """What lies about of checkpoints that were not written."""
    return [path.name for path in root.glob("*.tmp-*/*")]


@pytest.mark.fault(5)
@pytest.mark.parametrize("order", [(1, 2, 0), (0, 1, 2)])
@pytest.mark.parametrize("broken", [0, 2])
def test_a_rank_that_cannot_write_costs_the_checkpoint_and_leaves_no_rubbish(
    broken, order, tmp_path, monkeypatch
):
    made, _ = parts(tmp_path)
    original = writer.write_tensors
    bad = f"rank-{broken:05d}-of"
    writers = [Writer(patience=30) for _ in made]
    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_tensors", lambda p, v: full() if bad in p.name else original(p, v))
        for rank in order:
            writers[rank].submit(made[rank])
            if rank or broken == 0:
                writers[rank].wait()
        writers[0].wait()
    assert writers[0].failures == 1
    assert "No space left on device" in writers[0].problem
    assert native.newest(tmp_path) is None
    if (broken, order[0]) == (0, 0):
        assert [one.failures for one in writers] == [1, 1, 1]
        assert "rank 0 has given it up" in writers[1].problem
    assert GIVEN_UP in rubbish(tmp_path)
    assert {name for name in rubbish(tmp_path) if not name.endswith(".json")} == {GIVEN_UP}
    for one, part in zip(writers, parts(tmp_path, 2, token=78)[0], strict=True):
        one.submit(part)
    for one in writers:
        one.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000002"], "nor what late ranks wrote"
    assert [one.failures for one in writers] == [0, 0, 0]


def test_a_rank_that_never_writes_is_named(tmp_path):
    made, _ = parts(tmp_path)
    for rank in (2,):
        store(made[rank])
    with pytest.raises(OSError, match="rank 1 did not write its part within 0 s"):
        store(made[0], patience=0.2)
    assert rubbish(tmp_path) == [GIVEN_UP]


def test_a_disk_that_takes_no_note_is_known_from_the_ranks(tmp_path, monkeypatch):
    made, _ = parts(tmp_path)
    original = writer.write_tensors
    monkeypatch.setattr(
        writer, "write_tensors", lambda p, v: full() if "rank-00001" in p.name else original(p, v)
    )
    monkeypatch.setattr(writer, "_leave", full)
    one, other = Writer(patience=60), Writer()
    one.stopped = lambda: other.failures > 0
    one.submit(made[0])
    other.submit(made[1])
    one.wait(30)
    assert "another rank could not write its part" in one.problem
    assert "No space left on device" in other.problem


def test_old_ones_that_cannot_go_are_no_lost_checkpoint(tmp_path, caplog):
    def locked():
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    one = Writer(locked)
    one.submit(Part(tmp_path, 1, tensors(), {"state.json": {"step": 1}}))
    one.wait()
    assert (one.failures, one.problem) == (0, "")
    assert "old checkpoints stay ([Errno 13] Permission denied)" in caplog.text
    assert native.newest(tmp_path).name == "step-000000001"


@pytest.mark.fault(2)
@pytest.mark.parametrize("dying", [0, 1])
def test_a_rank_that_dies_at_any_stage_leaves_the_old_or_the_new(dying, tmp_path, counted):
    """os._exit at its k-th open for writing, fsync, rename, delete or look, for every k, of a save by two."""
    code = textwrap.dedent(
        """
        import builtins, os, sys
        from pathlib import Path
        import torch
        from ldm.checkpoints import native
        from ldm.checkpoints.writer import Part, store

        root, dying, stages = Path(sys.argv[1]), int(sys.argv[2]), 0

        def part(folder, step, rank):
            tensors = {"model": {f"w{rank}": torch.full((3,), float(step))}}
            return Part(folder, step, tensors, {"state.json": {"step": step}} if not rank else {}, rank, 2, 5)

        def run(folder, rank, at):
            left = at
            def counted(real):
                def call(*args, **kwargs):
                    nonlocal left
                    left -= 1
                    if left < 0:
                        os._exit(9)
                    return real(*args, **kwargs)
                return call
            if at is not None:
                for name in ("fsync", "replace", "rmdir", "unlink", "mkdir"):
                    setattr(os, name, counted(getattr(os, name)))
                builtins.open = counted(builtins.open)
            try:
                store(part(folder, 2, rank), patience=1.0)
            except OSError:
                os._exit(3)
            os._exit(0)

        for at in range(200):
            folder = root / str(at)
            native.save(folder, 1, {"model": {"w0": torch.ones(3)}}, {"state.json": {"step": 1}})
            pids = []
            for rank in (0, 1):
                pid = os.fork()
                if pid == 0:
                    run(folder, rank, at if rank == dying else None)
                pids.append(pid)
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            found = native.newest(folder)
            assert found is not None, (at, codes)
            native.verify(found)
            native.clean(folder, alone=True)
            assert not [p for p in folder.iterdir() if ".tmp-" in p.name], at
            if codes[dying] == 9:
                stages += 1
            else:
                assert codes == [0, 0] and found.name == "step-000000002", (at, codes)
                break
        print(stages)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(dying)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    stages = int(done.stdout)
    assert stages >= 8
    counted(stages=stages, half_checkpoints=0)


# ---- what stays, and what older programs wrote


def saved(root, step, **metrics):
    native.save(
        root, step, {"model": {"a": torch.ones(1)}}, {"state.json": {"step": step, "metrics": metrics}}
    )


def steps(root):
    return sorted(int(path.name.removeprefix("step-")) for path in root.iterdir())


@pytest.mark.parametrize(
    ("best", "kept"),
    [
        (native.Best("loss"), [2, 4, 7, 8]),
        (native.Best("loss", count=2), [2, 4, 6, 7, 8]),
        (native.Best("loss", mode="max"), [1, 4, 7, 8]),
        (native.Best("unknown"), [4, 7, 8]),
        (None, [4, 7, 8]),
    ],
)
def test_the_last_every_nth_and_the_best_stay(best, kept, tmp_path):
    losses = {1: 9.0, 2: 1.0, 3: float("nan"), 5: 1.0, 6: 1.0, 7: 3.0, 8: 2.0}
    for step in range(1, 9):
        saved(tmp_path, step, **({"loss": losses[step]} if step in losses else {}))
    (tmp_path / "step-000000005/state.json").write_text("damaged")
    native.prune(tmp_path, 2, every=4, best=best)
    assert steps(tmp_path) == sorted({*kept, 8})


def test_a_metric_that_no_checkpoint_has_is_said(tmp_path, caplog):
    saved(tmp_path, 1, **{"train/loss": 1.0})
    assert native.Best("validation/los").of([tmp_path / "step-000000001"]) == []
    assert not caplog.text, "nothing was validated yet"
    saved(tmp_path, 2, **{"validation/loss": 1.0})
    native.Best("validation/los").of([tmp_path / "step-000000002"])
    assert "keep_best: no checkpoint has validation/los, but validation/loss" in caplog.text


@pytest.mark.parametrize("fields", [{"mode": "least"}, {"count": 0}])
def test_best_of_what_is_refused(fields):
    with pytest.raises(ValueError, match="mode: min or max; count: from 1"):
        native.Best(**fields)


def test_a_checkpoint_of_the_first_format_opens():
    """Stored by the program before version 2."""
    folder = native.newest(DATA / "version_1")
    assert folder is not None
    native.verify(folder)
    assert native.load_state(folder) == {"metrics": {}, "step": 3, "images": 12, "networks": {}}
    assert torch.equal(loaded(folder)["w"], torch.arange(6.0).view(2, 3))
    assert torch.equal(loaded(folder, "ema")["w"], torch.arange(6.0).view(2, 3) / 2)
