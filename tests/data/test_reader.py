import pickle

import numpy as np
import pytest

from ldm.data import reader as module
from ldm.data.filters import select
from ldm.data.index import build_index
from ldm.data.plan import Stream
from ldm.data.reader import BlockReader, ShardReader


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
    return [raw.caption.decode() for raw in raws]


def test_rows_in_the_order_asked(index):
    raws = ShardReader(index)(np.array([63, 0, 23, 22, 0]))
    assert captions(raws) == [f"picture {i}" for i in (63, 0, 23, 22, 0)]
    assert all(raw.image.startswith(b"\x89PNG") for raw in raws)
    assert ShardReader(index)(np.array([], np.int64)) == []


def test_neighbours_come_with_one_read(index, monkeypatch):
    reader = ShardReader(index)
    reader(np.arange(30))  # of two shards
    assert reader.reads == 2
    monkeypatch.setattr(module, "GAP", 0)
    raws = reader(np.array([1, 3, 5]))
    assert reader.reads > 4
    assert captions(raws) == ["picture 1", "picture 3", "picture 5"]


def test_few_files_stay_open(index, monkeypatch):
    monkeypatch.setattr(module, "OPEN_FILES", 1)
    reader = ShardReader(index)
    for row in (0, 30, 60, 1):
        assert captions(reader(np.array([row]))) == [f"picture {row}"]
        assert len(reader.files) == 1


def test_a_reader_travels_without_its_files(index):
    reader = ShardReader(index)
    reader(np.array([0]))
    copy = pickle.loads(pickle.dumps(reader))
    assert not copy.files
    assert captions(copy(np.array([5]))) == ["picture 5"]


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: path.unlink(), "unreadable"),
        (lambda path: path.write_bytes(path.read_bytes()[:-512]), "changed"),
        (lambda path: path.write_bytes(b""), "changed"),
    ],
)
def test_a_lost_shard_is_a_reason_not_an_error(shards, index, harm, reason):
    harm(shards / "00001.tar")
    reader = ShardReader(index)
    raws = reader(np.array([0, 25, 63, 26]))
    assert [raw.reason for raw in raws] == ["", reason, "", reason]
    assert captions(raws) == ["picture 0", "", "picture 63", ""]
    assert reader.failures == {reason: 2}


def test_a_shard_cut_while_open(shards, index):
    reader = ShardReader(index)
    reader(np.array([0]))
    path = shards / "00000.tar"
    with path.open("r+b") as file:
        file.truncate(1024)
    assert reader(np.array([20]))[0].reason == "changed"


@pytest.mark.parametrize("slots", [range(0, 4), range(1, 4), range(0)])
@pytest.mark.parametrize("start", [0, 5, 64, 1001])
def test_block_reader_gives_what_the_plan_says(long, slots, start):
    stream = Stream(select(long).counts, 8, 4)
    assert stream.block == 4
    rows = np.arange(len(long))
    blocks = BlockReader(ShardReader(long), rows, stream, start, 4, list(slots))
    for step in range(300):
        n = start + 4 * step + np.array(slots, np.int64)
        assert captions(blocks(n)) == [f"picture {row}" for row in stream.places(n)[1]]
    assert len(blocks.held) <= 2 * stream.block * max(1, len(blocks.turn))


def test_blocks_are_read_once_each_and_evenly(long):
    stream = Stream([512], 8, 4)
    reader = ShardReader(long)
    blocks = BlockReader(reader, np.arange(len(long)), stream, 0, 8, range(8))
    reads = []
    for step in range(64):
        before = reader.reads
        blocks(8 * step + np.arange(8))
        reads.append(reader.reads - before)
    assert sum(reads[4:]) <= 60 * 8 / 4 * 1.2  # one read a block, but those that lie in two shards
    assert max(reads[4:]) <= 4  # eight lanes, but never all at the same step


def test_beyond_the_budget_samples_are_read_one_by_one(long):
    stream = Stream([512], 8, 4)
    reader = ShardReader(long)
    blocks = BlockReader(reader, np.arange(len(long)), stream, 0, 8, range(8))
    blocks.budget = 0
    for step in range(20):
        n = 8 * step + np.arange(8)
        assert captions(blocks(n)) == [f"picture {row}" for row in stream.places(n)[1]]
    assert not blocks.held
    assert reader.reads > 20 * 8 / 4 * 1.5


def test_lanes_that_no_slot_owns_are_refused(long):
    with pytest.raises(ValueError, match="8 lanes are not a multiple of a global batch of 3"):
        BlockReader(ShardReader(long), np.arange(512), Stream([512], 8, 4), 0, 3, range(3))
