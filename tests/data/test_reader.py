import multiprocessing
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import xxhash

from ldm.data import reader as module
from ldm.data.index import build_index
from ldm.data.range_cache import RangeCache
from ldm.data.reader import ReadPolicy, ShardReader

QUICK = ReadPolicy(timeout=2.0, deadline=10.0, retries=2, backoff=0.01)


@pytest.fixture
def index(shards):
    return build_index(str(shards))


@pytest.fixture
def long(write, sample):
    """An index of 512 samples in two shards, so that blocks are larger than 1."""
    write("long/0.tar", [sample(i, width=4, height=4) for i in range(200)])
    return build_index(
        str(write("long/1.tar", [sample(i, width=4, height=4) for i in range(200, 512)]).parent)
    )


def captions(raws):
    return [raw.parts.get("caption", b"").decode() for raw in raws]


def test_rows_in_the_order_asked(index):
    raws = ShardReader(index)(np.array([63, 0, 23, 22, 0]))
    assert captions(raws) == [f"picture {i}" for i in (63, 0, 23, 22, 0)]
    assert all(raw.parts["image"].startswith(b"\x89PNG") for raw in raws)
    assert ShardReader(index)(np.array([], np.int64)) == []


def test_neighbours_come_with_one_read(index, monkeypatch):
    reader = ShardReader(index)
    reader(np.arange(30))  # of two shards
    assert reader.reads == 2
    monkeypatch.setattr(module, "GAP", 0)
    raws = reader(np.array([1, 3, 5]))
    assert reader.reads > 4
    assert captions(raws) == ["picture 1", "picture 3", "picture 5"]


def test_a_long_read_is_cut(index, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 8192)
    reader = ShardReader(index)
    assert captions(reader(np.arange(64))) == [f"picture {row}" for row in range(64)]
    assert reader.bytes / 8192 < reader.reads < 4 * reader.bytes / 8192


def test_few_files_stay_open(index):
    reader = ShardReader(index, policy=ReadPolicy(open_files=1))
    for row in (0, 30, 60, 1):
        assert captions(reader(np.array([row]))) == [f"picture {row}"]
        assert len(reader.files) == 1


def test_many_shards_in_flight_hold_few_files(write, sample):
    for k in range(30):
        path = write(f"many/{k:02d}.tar", [sample(k)])
    index = build_index(str(path.parent))
    reader = ShardReader(index, policy=ReadPolicy(open_files=3, threads=2))
    most = 0

    futures = [reader.submit(np.array([i % 30])) for i in range(120)]
    for i, future in enumerate(futures):
        most = max(most, len(open_under(path.parent)))
        assert captions(future.result()) == [f"picture {i % 30}"]
    assert 1 <= most <= 3 + 2 + 1
    assert len(open_under(path.parent)) == 3
    reader.close()
    assert open_under(path.parent) == []


def open_under(folder):
    links = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(link))
        except FileNotFoundError:  # that of the listing itself
            continue
    return [link for link in links if link.startswith(f"{folder}/") and link.endswith(".tar")]


def test_reading_much_holds_little(tmp_path, write, sample, monkeypatch):
    """Captions between pictures: 5 MB are read through, in pieces, to keep a few bytes of each."""
    rng = np.random.default_rng(0)
    samples = [sample(i) for i in range(80)]
    for one in samples:
        one["png"] += rng.bytes(100_000)
    index = build_index(str(write("fat/0.tar", samples).parent))
    monkeypatch.setattr(module, "LONGEST", 300_000)
    reader = ShardReader(index, ["caption"], ReadPolicy(threads=2))
    rows = np.arange(80)
    reader.submit(rows[:1]).result()  # its threads
    tracemalloc.start()
    futures = [reader.submit(rows) for _ in range(4)]
    assert all(captions(future.result()) == [f"picture {i}" for i in rows] for future in futures)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reader.bytes > 20_000_000
    assert peak < 2 * 300_000 + 4 * 100_000 + 200_000


def test_samples_read_ahead_are_in_the_order_asked(index):
    reader = ShardReader(index)
    asked = [np.array([63, 0, 23, 22, 0]), np.array([], np.int64), np.array([5])]
    futures = [reader.submit(rows) for rows in asked]
    assert [captions(future.result()) for future in futures] == [
        [f"picture {i}" for i in rows] for rows in asked
    ]


@pytest.mark.parametrize("verify", [True, False])
def test_other_bytes_than_those_indexed(shards, index, verify):
    """A flipped bit costs that sample."""
    samples = with_checks(index, shards)
    offset = int(samples["image_offset"][25])
    with (shards / "00001.tar").open("r+b") as file:
        file.seek(offset + 20)
        byte = file.read(1)[0]
        file.seek(offset + 20)
        file.write(bytes([byte ^ 4]))
    index.samples, index.path = samples, None
    reader = ShardReader(index, policy=ReadPolicy(verify=verify))
    reasons = [raw.reason for raw in reader(np.arange(64))]
    assert reasons == ["corrupt" if i == 25 and verify else "" for i in range(64)]
    assert reader.failures == ({"corrupt": 1} if verify else {})
    assert reader.quarantine == {}


def with_checks(index, shards):
    """The table of an index with the checks of all but the first picture, and none of captions."""
    names = [name for name in index.samples.dtype.names if not name.endswith("_check")]
    samples = np.zeros(
        len(index), [(name, index.samples.dtype[name]) for name in names] + [("image_check", "u4")]
    )
    for name in names:
        samples[name] = index.samples[name]
    files = [Path(path).read_bytes() for path in index.shards]
    for i, shard in enumerate(index.shard_of(np.arange(len(index)))):
        start, size = int(samples["image_offset"][i]), int(samples["image_size"][i])
        samples["image_check"][i] = xxhash.xxh3_64(files[shard][start : start + size]).intdigest() % 2**32
    samples["image_check"][0] = 0
    return samples


def test_a_reader_travels_without_its_files(index):
    reader = ShardReader(index, policy=QUICK)
    reader.submit(np.array([0])).result()
    reader.quarantine |= {1: "missing"}
    copy = pickle.loads(pickle.dumps(reader))
    assert (copy.files, copy.attempts, copy.policy) == ({}, None, QUICK)
    assert captions(copy(np.array([5]))) == ["picture 5"]
    assert copy(np.array([25]))[0].reason == "missing"
    assert copy.take_events() == []


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize("threads", [False, True])
def test_a_reader_in_use_goes_to_another_process(index, tmp_path, method, threads):
    """With a cache all is read by threads, which a fork has not got."""
    reader = ShardReader(index, policy=QUICK, cache=RangeCache(tmp_path, 1) if threads else None)
    rows = np.array([63, 0, 25])
    expected = reader(rows)
    assert captions(expected) == ["picture 63", "picture 0", "picture 25"]
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply_async(reader, (rows,)).get(timeout=60) == expected
    assert reader(rows) == expected
