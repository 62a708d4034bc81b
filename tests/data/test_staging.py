"""Copies on the node's disk: of a set, and of what commands write."""

import hashlib
import multiprocessing
import os
import shlex
from itertools import islice
from pathlib import Path

import pytest
import torch

from ldm.data import staging
from ldm.data.datamodule import ShardDataModule
from ldm.data.staging import staged, staged_already
from ldm.errors import InputError

SETTINGS = {"image_size": 8, "global_batch_size": 12, "seed": 1, "crop": "random", "flip": 0.5}


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(staging, "BACKOFF", 0.01)


@pytest.fixture(params=["local", "http", "s3"])
def source(request, shards, tmp_path):
    """What to give as `shards`, for the three shards of the set in each kind of place."""
    if "beside" in request.node.name:
        (shards / "00001_stats.json").write_text("{}")
        (shards / "00003_scores.parquet").write_text("x")
    if request.param == "local":
        return str(shards)
    if request.param == "http":
        return request.getfixturevalue("web").url + "/busy/set/{00000..00003}.tar"
    put = request.getfixturevalue("bucket")
    return [put(path, f"set/{path.name}") for path in sorted(shards.iterdir())][0].rpartition("/")[0]


def contents(folder):
    return [path.read_bytes() for path in sorted(folder.glob("*.tar"))]


def beside(folder):
    return {
        path.name: path.read_text() for path in folder.rglob("*_*.*") if not path.name.endswith(".source")
    }


def batches(count, *shards, **options):
    module = ShardDataModule(*shards, **SETTINGS, **options)
    return list(islice(module.stream(num_workers=0), count))


def test_training_on_copies_is_training_on_the_shards(source, shards, tmp_path):
    cache = tmp_path / "cache"
    options = {"cache_dir": cache, "stage": True}
    assert staged_already(source, **options) is None
    assert ShardDataModule(source, **SETTINGS, **options).known_size() is None
    there, here = batches(6, str(shards)), batches(6, source, **options)
    for one, other in zip(there, here, strict=True):
        assert torch.equal(one.image, other.image)
        assert one.key == other.key
        assert one.caption == other.caption
    assert ShardDataModule(source, **SETTINGS, **options).known_size() == 64
    copies = staged_already(source, **options)
    assert [Path(copy).read_bytes() for copy in copies] == contents(shards)
    assert not list(cache.rglob("*.part"))


def test_what_lies_beside_the_shards_comes_along(source, shards, tmp_path):
    assert beside(tmp_path / "cache") == {}
    staged(source, tmp_path / "cache", stage=True)
    assert (
        beside(tmp_path / "cache")
        == beside(shards)
        == {"00001_stats.json": "{}", "00003_scores.parquet": "x"}
    )


def test_only_what_is_missing_or_changed_is_copied(web, shards, tmp_path):
    options = {"cache_dir": tmp_path / "cache", "stage": True}
    source = web.url + "/set/{00000..00003}.tar"
    copies = staged(source, **options)
    asked = web.requests.copy()
    os.remove(copies[0])
    Path(copies[1]).write_bytes(b"cut")
    assert staged(source, **options) == copies
    assert (web.requests - asked)["/set/00003.tar"] == 1  # for its size
    assert (web.requests - asked)["/set/00000.tar"] == 2
    assert [Path(copy).read_bytes() for copy in copies] == contents(shards)
    other = shards / "00003.tar"
    other.write_bytes(other.read_bytes()[:-512] + bytes(512))  # as long as it was
    os.utime(other, (1, 1))
    asked = web.requests.copy()
    staged(source, **options)
    assert (web.requests - asked)["/set/00003.tar"] == 2


def test_copies_are_checked_against_sha256sums(shards, tmp_path):
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in shards.glob("*.tar")]
    (shards / "SHA256SUMS").write_text("\n".join(sums))
    staged(str(shards), tmp_path / "one", stage=True)
    (shards / "SHA256SUMS").write_text(f"{'0' * 64}  00001.tar\n")
    with pytest.raises(InputError, match=r"data.shards: .*00001.tar: the copy's sha256 is not that of"):
        staged(str(shards), tmp_path / "two", stage=True)
    assert [path.name for path in (tmp_path / "two").rglob("00001.tar")] == []
    (shards / "SHA256SUMS").unlink()
    assert len(staged(str(shards), tmp_path / "two", stage=True)) == 3


def test_sums_that_cannot_be_read_are_named(shards, tmp_path):
    (shards / "SHA256SUMS").mkdir()
    with pytest.raises(InputError, match="SHA256SUMS: cannot be read: .*directory; run it again, or remove"):
        staged(str(shards), cache_dir=tmp_path / "copies", stage=True)


def test_space_is_asked_for_first(shards, tmp_path):
    with open(shards / "00009.tar", "wb") as file:
        file.truncate(1 << 43)  # with holes
    with pytest.raises(InputError, match=r"data.cache_dir: the shards need 8,796.\d GB more, .* free in"):
        staged(str(shards), tmp_path / "cache", stage=True)
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_processes_of_a_node_copy_once(web, shards, tmp_path):
    source = web.url + "/set/{00000..00003}.tar"
    context = multiprocessing.get_context("fork")
    arguments = (source, tmp_path / "cache", "data.shards", True)
    processes = [context.Process(target=staged, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert web.requests["/set/00000.tar"] == 3 + 1  # each asked for its size, one copied


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stage": True},
            "data.cache_dir: data.stage=true copies .*no folder for them; set",
        ),
        (
            {"stage": True, "cache_dir": "/proc/none"},
            "data.cache_dir: /proc/none: .*; name a folder to",
        ),
    ],
)
def test_wrong_settings_are_named(shards, options, message):
    with pytest.raises(InputError, match=message):
        ShardDataModule(str(shards), **SETTINGS, **options).setup()


def test_servers_that_fail_are_named(web, shards, tmp_path):
    with pytest.raises(InputError, match=r"data.shards: http.*/cut/set/00000.tar: .*; run it again to go on"):
        staged(web.url + "/cut/set/00000.tar", tmp_path / "cache", stage=True)
    assert web.requests["/cut/set/00000.tar"] == 1 + staging.TRIES


# ---- commands


def test_commands_are_refused_unless_allowed(shards, tmp_path):
    with pytest.raises(InputError, match="pipe: URLs run a shell; set data.allow_pipe=true only for"):
        ShardDataModule("pipe:touch /tmp/x", **SETTINGS, cache_dir=tmp_path).setup()
    with pytest.raises(
        InputError, match=r"data.cache_dir: data.allow_pipe=true .* set data.cache_dir=FOLDER"
    ):
        ShardDataModule("pipe:cat x", **SETTINGS, allow_pipe=True).setup()


def test_commands_are_run_once_and_read_like_tars(shards, tmp_path):
    log = tmp_path / "log"
    command = f"pipe:echo x >> {shlex.quote(str(log))}; cat {shlex.quote(str(shards))}/{{00000,00001}}.tar"
    mixed = [command, str(shards / "00003.tar")]
    options = {"cache_dir": tmp_path / "cache", "allow_pipe": True}
    there, here = batches(6, str(shards)), batches(6, mixed, **options)
    for one, other in zip(there, here, strict=True):
        assert torch.equal(one.image, other.image)
        assert one.caption == other.caption
    assert staged(mixed, **options)[2] == mixed[1]
    assert log.read_text() == "x\nx\n"  # two commands, once each


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("exit 3", r"pipe:\.\.\.: the command ended with exit code 3 \(no message\)"),
        ("cat /none | head -c 10240 /dev/zero", r"exit code 1 \(cat: /none: No such file or directory\)"),
        ("head -c 1000 {tar}", r"the command wrote 1,000 bytes that are not a whole plain tar"),
        ("cat {tar} | gzip", r"that are not a whole plain tar"),
        ("true", r"the command wrote 0 bytes"),
    ],
)
def test_commands_that_fail_leave_nothing(shards, tmp_path, command, message):
    command = "pipe:" + command.format(tar=shards / "00000.tar")
    with pytest.raises(InputError, match=rf"data.shards: .*{message}"):
        staged(command, tmp_path / "cache", allow_pipe=True)
    assert not list((tmp_path / "cache").rglob("*.tar"))
