"""What a reader makes of shards that fail, hang or lag behind a web server, on disks, and in its cache."""

import os
import threading
import time
from dataclasses import replace
from itertools import repeat

import numpy as np
import pytest
from werkzeug.exceptions import Forbidden, InternalServerError, NotFound
from werkzeug.wrappers import Response

from ldm.data import attempts
from ldm.data.datamodule import ShardDataModule
from ldm.data.index import build_index
from ldm.data.range_cache import RangeCache
from ldm.data.reader import ReadPolicy, ShardReader
from ldm.errors import InputError
from tests.data.servers import Web, serving

QUICK = ReadPolicy(timeout=10.0, deadline=30.0, retries=2, backoff=0.01)
LOST = slice(23, 53)  # rows of shard 1 of three


class Faulty(Web):
    """A web server on which files misbehave: `faults[path]` are what the next requests of it meet."""

    def __init__(self, folder):
        super().__init__(folder)
        self.faults = {}

    def answer(self, request):
        fault = next(self.faults.get(request.path, iter(())), None)
        if fault is None:
            return super().answer(request)
        if isinstance(fault, type):
            raise fault
        if fault == "hang":
            self.stop.wait(60)
            raise NotFound
        whole, (start, stop) = (self.folder / request.path[1:]).read_bytes(), request.range.ranges[0]
        body = whole[start:stop]
        headers = {
            "Content-Range": f"bytes {start}-{start + len(body) - 1}/{len(whole)}",
            "Content-Length": str(len(body)),
            "Connection": "close",
        }
        return Response([body[: len(body) // 2]] if fault == "cut" else self.drip(body), 206, headers)

    def drip(self, body):
        for i in range(0, len(body), 50):  # 1 KB/s
            yield body[i : i + 50]
            if self.stop.wait(0.05):
                return


@pytest.fixture
def web(tmp_path):
    with serving(Faulty(tmp_path)) as server:
        yield server


@pytest.fixture
def index(shards, web):
    """64 samples in three shards that are read from the web."""
    index = build_index(str(shards))
    index.shards = [f"{web.url}/set/{os.path.basename(path)}" for path in index.shards]
    return index


@pytest.fixture
def make(index):
    readers = []

    def reader(policy=QUICK, **options):
        readers.append(ShardReader(index, policy=policy, **options))
        return readers[-1]

    yield reader
    for one in readers:
        one.close()


def captions(raws):
    return [raw.parts.get("caption", b"").decode() for raw in raws]


def masked(raws, reason):
    """Whether just shard 1 is masked, and all else is what it should be."""
    expected = ["" if 23 <= i < 53 else f"picture {i}" for i in range(64)]
    reasons = [reason if 23 <= i < 53 else "" for i in range(64)]
    return captions(raws) == expected and [raw.reason for raw in raws] == reasons


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (NotFound, "missing"),
        (Forbidden, "denied"),
        (InternalServerError, "unreadable"),
        ("cut", "unreadable"),
        ("hang", "timeout"),
        ("slow", "timeout"),
    ],
)
def test_a_shard_that_fails_is_given_up_and_the_rest_is_read(make, web, fault, reason, caplog):
    policy = replace(QUICK, timeout=1.5, retries=1) if reason == "timeout" else QUICK
    reader = make(policy)
    web.faults["/set/00001.tar"] = repeat(fault)
    assert masked(reader(np.arange(64)), reason)
    assert reader.attempts.counts["retries"] >= policy.retries  # a busy machine may be late elsewhere
    assert reader.quarantine == {1: reason}
    assert reader.failures == {reason: 30}
    assert reader.take_events() == [(1, reason)]
    assert reader.take_events() == []
    assert caplog.text.count("quarantined") == 1
    before, begun = web.requests["/set/00001.tar"], time.monotonic()
    assert masked(reader.submit(np.arange(64)).result(), reason)
    assert web.requests["/set/00001.tar"] <= before + 1  # one may have been on its way
    assert reader.take_events() == []
    assert time.monotonic() - begun < 5


def test_a_file_that_was_replaced_is_not_tried_again(make, web, shards):
    """Its size is that of the index, but the server tells that it is another."""
    path = shards / "00001.tar"
    reader = make()
    assert captions(reader(np.array([30]))) == ["picture 30"]
    path.write_bytes(path.read_bytes())
    os.utime(path, (0, 0))
    assert masked(reader(np.arange(64)), "changed")
    assert reader.attempts.counts["retries"] == 0


def test_a_server_that_recovers_costs_nothing(make, web):
    reader = make()
    assert captions(reader(np.array([25]))) == ["picture 25"]  # it is open
    web.faults["/set/00001.tar"] = iter([InternalServerError, "cut"])
    assert captions(reader(np.arange(64))) == [f"picture {i}" for i in range(64)]
    assert (reader.attempts.counts["retries"], reader.quarantine, reader.failures) == (2, {}, {})


def test_a_slow_shard_holds_up_no_other(make, web, monkeypatch):
    monkeypatch.setattr(attempts, "LATE", 0.2)
    reader = make(ReadPolicy(timeout=30.0, deadline=60.0, threads=2))
    web.faults["/set/00001.tar"] = repeat("hang")
    slow = [reader.submit(np.array([25 + i])) for i in range(5)]
    others = [reader.submit(np.array([i, 63 - i])) for i in range(10)]
    assert [captions(future.result(timeout=25)) for future in others] == [
        [f"picture {i}", f"picture {63 - i}"] for i in range(10)
    ]
    assert not any(future.done() for future in slow)


@pytest.mark.parametrize("hedge", [True, False])
def test_a_late_answer_is_asked_for_again(make, web, monkeypatch, hedge):
    monkeypatch.setattr(attempts, "SOON", 0.3)  # the machine of a test may be busy
    reader = make(ReadPolicy(timeout=2.0, retries=1, backoff=0.01, hedge=hedge))
    for i in range(attempts.KNOWN):
        reader(np.array([i]))
    web.faults["/set/00000.tar"] = iter(["hang"])
    assert captions(reader(np.array([1]))) == ["picture 1"]
    assert reader.attempts.counts["hedges"] == hedge
    assert reader.attempts.counts["retries"] == (not hedge)


def test_what_a_checkpoint_knows_is_not_tried(make, web):
    reader = make()
    reader.quarantine |= {1: "missing"}
    assert masked(reader(np.arange(64)), "missing")
    assert web.requests["/set/00001.tar"] == 0
    assert reader.take_events() == []


# ---- local


def test_local_shards_are_tried_again_too(shards):
    """A shard that is there again a moment later, as on a file system that hiccups."""
    reader = ShardReader(build_index(str(shards)), policy=ReadPolicy(retries=20, backoff=0.01))
    path = shards / "00001.tar"
    path.rename(shards / "away")
    threading.Timer(0.1, (shards / "away").rename, (path,)).start()
    assert captions(reader(np.arange(64))) == [f"picture {i}" for i in range(64)]
    assert reader.attempts.counts["retries"] >= 1
    reader.close()


def test_a_disk_that_hangs(shards):
    """Opening a pipe waits for a writer, as a file of a dead server waits."""
    reader = ShardReader(build_index(str(shards)), policy=ReadPolicy(timeout=0.2, retries=1, backoff=0.01))
    path = shards / "00001.tar"
    path.unlink()
    os.mkfifo(path)
    assert masked(reader.submit(np.arange(64)).result(timeout=20), "timeout")
    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))  # lets go of those who wait
    reader.close()


# ---- with a cache


def test_what_is_cached_needs_no_server(make, web, tmp_path):
    cache = RangeCache(tmp_path / "cache", 1)
    first = make(cache=cache)
    rows = np.random.default_rng(0).permutation(64)
    assert captions(first(rows)) == [f"picture {i}" for i in rows]
    before = sum(web.requests.values())
    web.faults |= {path: repeat(NotFound) for path in web.requests}
    second = make(cache=RangeCache(tmp_path / "cache", 1))
    assert captions(second(np.arange(64))) == [f"picture {i}" for i in range(64)]
    assert sum(web.requests.values()) == before
    assert (second.reads, second.cache.misses) == (0, 0)


def test_a_cached_piece_cut_by_a_kill_is_read_again(make, web, tmp_path):
    make(cache=RangeCache(tmp_path / "cache", 1))(np.arange(64))
    pieces = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != "tally"]
    assert len(pieces) == 3
    for i, path in enumerate(pieces):
        with path.open("r+b") as file:
            file.truncate((0, 700, path.stat().st_size - 1)[i])
    reader = make(cache=RangeCache(tmp_path / "cache", 1))
    raws = reader(np.arange(64))
    assert captions(raws) == [f"picture {i}" for i in range(64)]
    assert not any(raw.reason for raw in raws)
    assert reader.cache.misses == 3


def test_a_shard_is_given_up_with_a_cache_as_without(make, web, tmp_path):
    reader = make(cache=RangeCache(tmp_path / "cache", 1))
    web.faults["/set/00001.tar"] = repeat(NotFound)
    assert masked(reader(np.arange(64)), "missing")


def test_a_replaced_local_shard_is_not_taken_from_the_cache(shards, tmp_path):
    index = build_index(str(shards))
    cache = RangeCache(tmp_path / "cache", 1)
    assert captions(ShardReader(index, cache=cache)(np.array([25]))) == ["picture 25"]
    path = shards / "00001.tar"
    path.write_bytes(path.read_bytes().replace(b"picture 25", b"picture 99"))
    assert ShardReader(index, cache=cache)(np.array([25]))[0].reason == "corrupt"  # by the index's check
    path.write_bytes(path.read_bytes()[:-512])
    assert ShardReader(index, cache=cache)(np.array([25]))[0].reason == "changed"


# ---- from the configuration


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_with_a_lost_shard_and_fills_its_cache(shards, tmp_path, workers):
    options = {"num_workers": workers, "cache_dir": tmp_path / "cache", "cache_gb": 1, "reading": QUICK}
    data = ShardDataModule(str(shards), 8, 12, **options)
    data.setup()
    (shards / "00001.tar").unlink()
    reasons = {}
    for _, batch in zip(range(8), data.stream(), strict=False):
        reasons |= dict(zip(batch.key, batch.reason, strict=True))
    assert {key: reason for key, reason in reasons.items() if reason} == {
        key: "missing" for key in reasons if key.startswith("00001/")
    }
    assert len(reasons) == 64
    assert any((tmp_path / "cache").iterdir())


@pytest.mark.soak
@pytest.mark.parametrize("fault", ["hang", "slow"])  # for 60 s; at 1 KB/s
def test_steps_do_not_wait_for_a_stalled_shard_that_is_cached(index, web, tmp_path, fault):
    """99th percentile of steps of 20 ms with their data: pytest -n 0 -s -m soak tests/data/test_faults.py."""
    module = ShardDataModule(index.shards, 8, 12, num_workers=2, cache_dir=tmp_path / "cache", cache_gb=1)

    def step_times(count):
        times, batches = [], iter(module.stream())
        for _ in range(50):  # start, and the cache is filled
            next(batches)
        for _ in range(count):
            begun = time.perf_counter()
            assert next(batches).weight.all()
            time.sleep(0.02)
            times.append(time.perf_counter() - begun)
        return np.percentile(times, [50, 99]) * 1000

    step_times(1)
    before = step_times(500)
    web.faults["/set/00001.tar"] = repeat(fault)
    after = step_times(500)
    print(f"{fault}: p50, p99 of a step {before.round(1)} ms, with a stalled shard {after.round(1)} ms")
    assert after[1] < 1.5 * before[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_gb": 5}, r"data.cache_gb: 5, but data.cache_dir is not set; set it to a local disk"),
        ({"cache_gb": 0.1, "cache_dir": "x"}, r"data.cache_gb: expected 0 or at least 0.5, got 0.1"),
    ],
)
def test_a_cache_that_makes_no_sense(options, message):
    with pytest.raises(InputError, match=message):
        ShardDataModule("x", 8, 12, **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timeout", 0),
        ("retries", -1),
        ("threads", 0),
        ("open_files", 0),
        ("backoff", "1 s"),
        ("memory_mb", True),
    ],
)
def test_a_policy_that_makes_no_sense(name, value):
    with pytest.raises(InputError, match=rf"data.reading.{name}: expected at least .*, got {value!r}"):
        ReadPolicy(**{name: value})
