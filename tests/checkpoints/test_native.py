"""Checkpoint directories: nothing is lost in them, no damage passes, and a kill leaves the old or the new."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch

from ldm.checkpoints import native
from ldm.checkpoints.files import clean
from ldm.checkpoints.lazy import LazyTensor
from ldm.errors import InputError


def equal(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.cpu(), b.cpu())


def test_round_trip_is_exact(tmp_path, tensors, documents):
    path = native.save(tmp_path, 12, tensors, documents)
    assert path == tmp_path / "step-000000012"
    for name, values in tensors.items():
        found = native.load_tensors(path, name)
        assert found.keys() == values.keys()
        assert all(equal(found[key], value) for key, value in values.items())
    assert native.load_document(path, "state.json") == documents["state.json"]
    assert native.load_document(path, "config.yaml") == documents["config.yaml"]
    native.verify(path)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert (manifest["format_version"], manifest["step"]) == (2, 12)
    assert manifest["files"].keys() == {p.name for p in path.iterdir()} - {"MANIFEST.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000012"]


def test_equal_content_gives_equal_bytes(tmp_path, tensors, documents):
    a = native.save(tmp_path / "a", 3, tensors, documents)
    b = native.save(tmp_path / "b", 3, tensors, documents)
    for file in a.iterdir():
        assert file.read_bytes() == (b / file.name).read_bytes(), file.name


def test_a_good_checkpoint_stays_and_a_bad_one_is_replaced(tmp_path, tensors, documents):
    path = native.save(tmp_path, 12, tensors, documents)
    before = os.stat(path / "model.safetensors").st_mtime_ns, os.stat(path).st_ino
    assert native.save(tmp_path, 12, {"model": {"other": torch.ones(1)}}, {}) == path
    assert (os.stat(path / "model.safetensors").st_mtime_ns, os.stat(path).st_ino) == before
    (path / "optimizer.safetensors").unlink()
    native.save(tmp_path, 12, tensors, documents)
    native.verify(path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000012"]


def test_a_folder_of_any_name_takes_tensors_that_are_read_one_by_one(tmp_path, tensors, documents):
    alive = []

    def read(value):
        assert all(reference() is None for reference in alive), "two tensors at a time"
        found = value.clone()
        alive.append(weakref.ref(found))
        return found

    values = {key: value.detach().contiguous() for key, value in tensors["model"].items()}
    lazy = {key: LazyTensor(tuple(v.shape), v.dtype, lambda v=v: read(v)) for key, v in values.items()}
    path = native.save_at(tmp_path / "imported", 7, {"model": lazy}, documents)
    assert path == tmp_path / "imported"
    assert native.resolve(path) == path
    assert json.loads((path / "MANIFEST.json").read_text())["step"] == 7
    found = native.load_tensors(path, "model")
    assert all(equal(found[key], value) for key, value in values.items())
    native.save_at(path, 8, {"model": {"w": torch.ones(2)}}, {})
    assert sorted(file.name for file in path.iterdir()) == ["MANIFEST.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["imported"]


# ---- damage --------------------------------------------------------------------------------------------

NAMES = ["model.safetensors", "optimizer.safetensors", "state.json", "config.yaml", "MANIFEST.json"]


@pytest.mark.fault(6)
@pytest.mark.parametrize("name", NAMES)
def test_every_damage_is_seen(tmp_path, documents, counted, name):
    small = {"model": {"a": torch.arange(3.0)}, "optimizer": {"b": torch.ones(2)}}
    path = native.save(tmp_path, 1, small, documents)
    file = path / name
    good = file.read_bytes()
    damages = [bytes(good[:i]) + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :] for i in range(len(good))]
    damages += [good[:i] for i in range(0, len(good), 7)] + [good + b"\0", good + b"\n", b""]
    for damaged in damages:
        file.write_bytes(damaged)
        assert native.problem(path) is not None, damaged
    file.unlink()
    with pytest.raises(InputError) as caught:
        native.verify(path)
    assert str(caught.value).startswith(f"{file}: ")
    file.write_bytes(good)
    native.verify(path)
    counted(damages=len(damages) + 1, unseen=0)


def test_messages_name_file_fault_and_way_out(tmp_path, tensors, documents):
    for step in (10, 11, 12):
        path = native.save(tmp_path, step, tensors, documents)
    file = path / "optimizer.safetensors"
    good = file.read_bytes()
    advice = "; newest good checkpoint: step-000000011"

    def line(path=path):
        with pytest.raises(InputError) as caught:
            native.verify(path)
        return str(caught.value)

    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert line() == f"{file}: sha256 differs from MANIFEST.json{advice}"
    file.write_bytes(good[:-1])
    assert line() == f"{file}: has {len(good) - 1} bytes, MANIFEST.json says {len(good)}{advice}"
    file.unlink()
    assert line() == f"{file}: missing, though MANIFEST.json lists it{advice}"
    (path / "MANIFEST.json").unlink()
    assert line() == f"{path}/MANIFEST.json: not found, so this checkpoint was never finished{advice}"
    (tmp_path / "step-000000011" / "state.json").unlink()
    assert line().endswith("; newest good checkpoint: step-000000010")
    (tmp_path / "step-000000010" / "state.json").unlink()
    assert line().endswith("; no other checkpoint beside it is good")


def test_only_the_asked_files_are_hashed_but_all_are_counted(tmp_path, tensors, documents):
    path = native.save(tmp_path, 1, tensors, documents)
    file = path / "optimizer.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    native.verify(path, files=["model.safetensors"])
    with pytest.raises(InputError, match="sha256"):
        native.verify(path, files=["optimizer.safetensors"])
    file.unlink()
    with pytest.raises(InputError, match="missing"):
        native.verify(path, files=["model.safetensors"])


def newer(path):
    """Rewrite a manifest as a later program would."""
    content = json.loads((path / "MANIFEST.json").read_text())
    del content["sha256"]
    (path / "MANIFEST.json").write_text(native._manifest({**content, "format_version": 3}))


def test_a_newer_format_is_refused_and_not_passed_over(tmp_path, tensors, documents):
    native.save(tmp_path, 1, tensors, documents)
    path = native.save(tmp_path, 2, tensors, documents)
    newer(path)
    line = f"{path}/MANIFEST.json: format_version 3 is newer than this program's (2); update ldm"
    for call, argument in ((native.verify, path), (native.newest, tmp_path)):
        with pytest.raises(InputError) as caught:
            call(argument)
        assert str(caught.value) == line


@pytest.mark.fault(6)
def test_newest_falls_back_and_says_so(tmp_path, tensors, documents, caplog):
    assert native.newest(tmp_path) is None
    assert native.newest(tmp_path / "nowhere") is None
    paths = [native.save(tmp_path, step, tensors, documents) for step in (9, 10, 1_000_000_000)]
    (tmp_path / "step-000000099.tmp-1").mkdir()
    (tmp_path / "step-5").mkdir()
    with caplog.at_level(logging.WARNING):
        assert native.newest(tmp_path) == paths[2]
        assert not caplog.records
        (paths[2] / "model.safetensors").write_bytes(b"")
        (paths[1] / "MANIFEST.json").unlink()
        assert native.newest(tmp_path) == paths[0]
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [
        f"{paths[2]}/model.safetensors",
        f"{paths[1]}/MANIFEST.json",
    ]
    (paths[0] / "state.json").unlink()
    assert native.newest(tmp_path) is None


# ---- kills ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_at_any_stage_leaves_the_old_and_no_rubbish(
    tmp_path, tensors, documents, monkeypatch, call
):
    old = native.save(tmp_path, 1, tensors, documents)
    real, stages = getattr(os, call), 0
    while True:
        seen = 0

        def failing(*args, fail_at=stages, **kwargs):
            nonlocal seen
            seen += 1
            if seen == fail_at + 1:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        monkeypatch.setattr(os, call, failing)
        try:
            path = native.save(tmp_path, 2, tensors, documents)
        except OSError:
            if not (tmp_path / "step-000000002").exists():
                assert [p.name for p in tmp_path.iterdir()] == [old.name]
            assert native.newest(tmp_path) is not None
            stages += 1
        else:
            break
    monkeypatch.undo()
    native.verify(path)
    assert stages >= {"fsync": 6, "replace": 1}[call]  # 4 files, the manifest, the folder, its parent


@pytest.mark.fault(2)
def test_kill_at_every_stage_leaves_the_old_or_the_new(tmp_path):
    """A process dies (os._exit) at its k-th fsync, rename or delete, for every k: step 2 loads, or 1 does."""
    code = textwrap.dedent(
        """
        import os, shutil, sys
        from pathlib import Path
        import torch
        from ldm.checkpoints import native
        from ldm.checkpoints.files import clean

        root = Path(sys.argv[1])
        content = {"model": {"a": torch.ones(3)}, "ema": {"a": torch.zeros(3)}}, {"state.json": {"x": 1}}

        def save_dying(folder, at):
            left = at
            def dying(real):
                def call(*args, **kwargs):
                    nonlocal left
                    left -= 1
                    if left < 0:
                        os._exit(9)
                    return real(*args, **kwargs)
                return call
            os.fsync, os.replace, os.rmdir = dying(os.fsync), dying(os.replace), dying(os.rmdir)
            native.save(folder, 2, *content)
            os._exit(0)

        for damaged in (False, True):
            for at in range(100):
                folder = root / f"{damaged}-{at}"
                native.save(folder, 1, *content)
                if damaged:  # so that step 2 is there already, and must be replaced
                    (native.save(folder, 2, *content) / "state.json").write_text("")
                child = os.fork()
                if child == 0:
                    save_dying(folder, at)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                found = native.newest(folder)
                assert found is not None, (damaged, at)
                native.verify(found)
                assert code == 9 or found.name == "step-000000002", (damaged, at, code)
                clean(folder)
                assert not list(folder.glob("*.tmp-*")), (damaged, at)
                native.verify(native.save(folder, 2, *content))
                if code == 0:
                    print(at)
                    break
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    plain, replacing = map(int, done.stdout.split())
    assert plain >= 7  # three files, manifest, folder, rename, parent
    assert replacing > plain


def test_clean_removes_what_the_dead_left_and_nothing_else(tmp_path, tensors, documents):
    good = native.save(tmp_path, 1, tensors, documents)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    keep = [good.name, f"step-000000002.tmp-{os.getppid()}", "notes.tmp-a", "step-000000002"]
    gone = [f"step-000000003.tmp-{dead.pid}", f"step-000000004.tmp-{dead.pid}-gone", f"x.tmp-{os.getpid()}"]
    for name in [*keep, *gone]:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "file").touch()
    (tmp_path / f"model.safetensors.tmp-{os.getpid()}").write_bytes(b"half")
    clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(keep)
    clean(tmp_path / "nowhere")


# ---- choosing ------------------------------------------------------------------------------------------


def test_prune_keeps_the_last_and_the_round_ones(tmp_path):
    def steps():
        return sorted(int(p.name.removeprefix("step-")) for p in tmp_path.iterdir())

    for step in (100, 150, 200, 250, 300, 310):
        native.save(tmp_path, step, {"model": {"a": torch.ones(1)}}, {})
    native.prune(tmp_path, keep_last=3, every=100)
    assert steps() == [100, 200, 250, 300, 310]
    native.prune(tmp_path, keep_last=1)
    assert steps() == [310]
    native.prune(tmp_path, keep_last=5)
    assert steps() == [310]
    with pytest.raises(ValueError, match="keep_last=0"):
        native.prune(tmp_path, keep_last=0)


def test_space_is_asked_for_where_the_folder_will_be(tmp_path):
    native.require_space(tmp_path / "not" / "yet", 1000)
    with pytest.raises(
        InputError, match=r"^.*/not/yet: needs 1000000000.0 GB free for a checkpoint, .* GB are; "
    ):
        native.require_space(tmp_path / "not" / "yet", 10**18)
    with pytest.raises(InputError, match="are; free some space, or choose another disk$"):
        native.require_space(tmp_path, 10**18, "choose another disk")


def test_resolve_takes_run_stage_folder_and_checkpoint(tmp_path, tensors, documents):
    run = tmp_path / "run"
    first = native.save(run / "autoencoder" / "checkpoints", 5, tensors, documents)
    assert native.resolve(run) == first
    second = native.save(run / "diffusion" / "checkpoints", 3, tensors, documents)
    native.save(run / "diffusion" / "checkpoints", 2, tensors, documents)
    assert native.resolve(run) == second
    assert native.resolve(run, stage="autoencoder") == first
    assert native.resolve(run / "autoencoder") == first
    assert native.resolve(run / "diffusion" / "checkpoints") == second
    assert native.resolve(second) == second
    (second / "model.safetensors").unlink()
    assert native.resolve(run).name == "step-000000002"
    single = native.save(tmp_path / "single" / "checkpoints", 7, tensors, documents)
    assert native.resolve(tmp_path / "single") == single
    assert native.resolve(tmp_path / "single", stage="autoencoder") == single
    moved = single.rename(tmp_path / "final")
    assert native.resolve(moved) == moved


def test_resolve_says_what_is_wrong(tmp_path, tensors, documents):
    (tmp_path / "run" / "autoencoder" / "checkpoints").mkdir(parents=True)
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x02")
    (tmp_path / "x.safetensors").write_bytes(b"")
    path = native.save(tmp_path / "bad" / "checkpoints", 1, tensors, documents)
    (path / "model.safetensors").unlink()
    pickle = "is a pickle, which can run code when it is opened; ldm opens checkpoint directories and"
    rows = [
        ("nowhere", "resume={}: no such checkpoint; give a run, or a checkpoint directory"),
        ("run", "resume={}: no such checkpoint; give a run that has saved one: checkpoints/step-*/"),
        ("model.ckpt", f"resume={{}}: {pickle} safetensors only"),
        ("x.safetensors", "resume={}: is a file; give the checkpoint directory, or the run that it is in"),
        ("bad", "resume={}: no good checkpoint (1 damaged); "
         "give a run that has saved one: checkpoints/step-*/"),
        ("bad/checkpoints/step-000000001", "{}/model.safetensors: missing, though MANIFEST.json lists it; "
         "no other checkpoint beside it is good"),
    ]  # fmt: skip
    for name, line in rows:
        with pytest.raises(InputError) as caught:
            native.resolve(tmp_path / name, where="resume")
        assert str(caught.value) == line.format(tmp_path / name)


def test_reading_what_is_not_there_is_one_line(tmp_path):
    for call in (native.load_tensors, native.load_document):
        with pytest.raises(InputError, match=r"ema(\.safetensors)?: not found$"):
            call(tmp_path, "ema")
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(InputError, match=r"model\.safetensors: is not a safetensors file"):
        native.load_tensors(tmp_path, "model")
