import os
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ldm.data import range_cache as module
from ldm.data.range_cache import RangeCache

SIZE = 100_000


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Chunks of 1000 bytes."""
    monkeypatch.setattr(module, "CHUNK", 1000)


@pytest.fixture
def source():
    """A shard of SIZE bytes: `source(start, length)`, which notes what it was asked for."""
    data = np.random.default_rng(0).bytes(SIZE)

    def fetch(start, length):
        fetch.asked.append((start, length))
        return data[start : start + length]

    fetch.asked, fetch.data = [], data
    return fetch


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "tally"]


def held(folder):
    return sum(path.stat().st_size for path in files(folder))


def test_any_range_is_what_the_shard_has(tmp_path, source):
    cache, draw = RangeCache(tmp_path, 1), random.Random(0)
    for _ in range(200):
        start = draw.randrange(SIZE)
        length = draw.randrange(1, min(5000, SIZE - start) + 1)
        assert cache.read("a.tar", SIZE, start, length, source) == source.data[start : start + length]
    assert sum(length for _, length in source.asked) <= SIZE  # no byte is fetched twice
    assert cache.hits > cache.misses


def test_blocks_that_overlap_share_their_bytes(tmp_path, source):
    """The blocks of two passes of the plan are not cut at the same places."""
    cache = RangeCache(tmp_path, 1)
    cache.read("a.tar", SIZE, 10_300, 4_000, source)
    cache.read("a.tar", SIZE, 12_100, 4_000, source)
    assert source.asked == [(10_000, 5_000), (15_000, 2_000)]
    other = pickle.loads(pickle.dumps(cache))  # as another worker of the node would
    assert other.read("a.tar", SIZE, 10_500, 6_000, source) == source.data[10_500:16_500]
    assert (len(source.asked), other.hits, other.misses) == (2, 7, 0)


def test_other_shards_and_other_contents_are_other_things(tmp_path, source):
    cache = RangeCache(tmp_path, 1)
    for name, size in (("a.tar", SIZE), ("b.tar", SIZE), ("a.tar", SIZE - 1)):
        cache.read(name, size, 0, 10, source)
    assert len(source.asked) == 3


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: b"",
        lambda data: data[:8],
        lambda data: data[:-1],
        lambda data: data[:-8],
        lambda data: data + b"\0",
        lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:],
        lambda data: bytes(len(data)),
    ],
    ids=["empty", "8 bytes", "cut", "no checksum", "longer", "a bit", "zeros"],
)
def test_a_damaged_file_is_fetched_again(tmp_path, source, harm):
    cache = RangeCache(tmp_path, 1)
    cache.read("a.tar", SIZE, 0, 3000, source)
    for path in files(tmp_path):
        path.write_bytes(harm(path.read_bytes()))
    assert cache.read("a.tar", SIZE, 0, 3000, source) == source.data[:3000]
    assert source.asked == [(0, 3000)] * 2
    assert cache.read("a.tar", SIZE, 0, 3000, source) == source.data[:3000]
    assert len(source.asked) == 2


def test_it_keeps_to_its_size_and_keeps_what_is_used(tmp_path, source):
    cap = 64 * 16_000
    cache = RangeCache(tmp_path, cap / 1e9)
    for i in range(20):  # twice the cap
        cache.read(f"{i}.tar", SIZE, 0, SIZE, source)
        cache.read("loved.tar", SIZE, 5000, 1000, source)
        assert held(tmp_path) <= cap + 64 * 1008  # a folder's share may be over by what was just written
    assert held(tmp_path) > cap / 2
    source.asked.clear()
    cache.read("loved.tar", SIZE, 5000, 1000, source)
    assert source.asked == []
    cache.read("0.tar", SIZE, 0, SIZE, source)
    assert source.asked == [(0, SIZE)]


def test_what_dead_processes_left_is_swept(tmp_path, source):
    cache = RangeCache(tmp_path, 64 * 16_000 / 1e9)
    cache.read("a.tar", SIZE, 0, SIZE, source)
    folder = files(tmp_path)[0].parent
    old, new = folder / "x.1.1.part", folder / "y.1.1.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 2 * module.STALE,) * 2)
    cache._sweep(folder)
    assert (old.exists(), new.exists()) == (False, True)


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path, source, caplog):
    (tmp_path / "file").touch()
    cache = RangeCache(tmp_path / "file" / "cache", 1)
    for _ in range(3):
        assert cache.read("a.tar", SIZE, 50, 3000, source) == source.data[50:3050]
    assert [record.message.split(" keeps nothing more")[0] for record in caplog.records] == [
        str(cache.folder)
    ]


WRITER = """
import os, random, resource, sys
import numpy as np
from ldm.data import range_cache
folder, mode = sys.argv[1:]
range_cache.CHUNK = 10_000
data = np.random.default_rng(0).bytes(1_000_000)
cache, draw = range_cache.RangeCache(folder, 64 * 80_000 / 1e9), random.Random(os.getpid())
if mode == "full":  # no file may be longer than this: what a full disk does, for one process
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
print("begun", flush=True)
for i in range(200 if mode == "full" else 10**9):
    start = draw.randrange(950_000)
    got = cache.read(f"{i % 10}.tar", 1_000_000, start, 30_000, lambda s, n: data[s : s + n])
    assert got == data[start : start + 30_000], "bad bytes"
print("off" if cache.off else "on", cache.hits)
"""


def start(folder, mode):
    code = [sys.executable, "-c", WRITER, str(folder), mode]
    return subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_full_disk_is_one_warning_and_nothing_else(tmp_path):
    process = start(tmp_path, "full")
    out, errors = process.communicate(timeout=120)
    assert out.split() == ["begun", "off", "0"]
    assert errors.count("keeps nothing more of what this process reads") == 1
    assert "bad bytes" not in errors
    assert files(tmp_path) == []


def test_killed_writers_leave_nothing_bad(tmp_path, monkeypatch):
    """Several processes share it and check all they read; each is killed in the midst of its work."""
    monkeypatch.setattr(module, "CHUNK", 10_000)
    draw = random.Random(0)
    for _ in range(3):
        processes = [start(tmp_path, "work") for _ in range(2)]
        for process in processes:
            assert process.stdout.readline() == "begun\n"
        time.sleep(0.3 + draw.random() / 5)
        for process in processes:
            process.kill()
            _, errors = process.communicate()
            assert (process.returncode, errors) == (-signal.SIGKILL, "")
    data = np.random.default_rng(0).bytes(1_000_000)
    cache = RangeCache(tmp_path, 64 * 80_000 / 1e9)
    for i in range(10):
        got = cache.read(f"{i}.tar", 1_000_000, 0, 1_000_000, lambda s, n: data[s : s + n])
        assert got == data
    assert cache.hits > 0
    assert held(tmp_path) <= 64 * 90_010
