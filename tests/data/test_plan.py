import itertools

import numpy as np
import pytest

from ldm.data.plan import READ_BYTES, Stream, Walk, consumed, mix, plan_constants, shuffle, skipped


@pytest.mark.parametrize(
    ("stream", "golden"),
    [
        (
            Stream([100, 250, 50], 8, 32, 0),
            {
                0: (0, 1, 17),
                1: (0, 0, 60),
                7: (0, 0, 51),
                8: (0, 1, 18),
                399: (0, 1, 211),
                400: (1, 1, 158),
                10**9: (2500000, 0, 33),
            },
        ),
        (
            Stream([10000] * 50, 16, 32, 1),
            {
                0: (0, 25, 788),
                1: (0, 36, 7395),
                16: (0, 25, 769),
                511: (0, 25, 2890),
                512: (0, 41, 3103),
                10**6: (1, 11, 232),
                10**12: (2000000, 27, 1482),
            },
        ),
    ],
)
def test_golden_values(stream, golden):
    rows = stream(np.array(list(golden)))
    assert rows.dtype == np.int64
    assert [tuple(row) for row in rows[1:].T.tolist()] == list(golden.values())
    assert (rows[0] == 0).all()


def test_small_set_has_a_small_block():
    assert Stream([100, 250, 50], 8, 32, 0).block == 2
    assert Stream([3], 1024, 32).block == 1


@pytest.mark.parametrize("size", [*range(1, 40), 80, 127, 1000, 4099])
def test_shuffle_is_a_permutation(size):
    a = shuffle(np.arange(size), size, 1, 2)
    assert sorted(a.tolist()) == list(range(size))
    if size > 30:
        assert (a != shuffle(np.arange(size), size, 1, 3)).any()


def test_shuffle_reaches_all_orders_evenly():
    orders = {order: 0 for order in itertools.permutations(range(4))}
    keys = 4800
    words = np.repeat(np.arange(keys), 4)
    for row in shuffle(np.tile(np.arange(4), keys), 4, words).reshape(-1, 4).tolist():
        orders[tuple(row)] += 1
    expected = keys / 24
    chi_square = sum((count - expected) ** 2 / expected for count in orders.values())
    assert chi_square < 50  # 23 degrees of freedom: exceeded by chance once in 1,000 keys


@pytest.mark.parametrize(
    ("counts", "lanes", "block"),
    [([200], 64, 8), ([20], 64, 8), ([1], 8, 1), ([0, 100, 0, 250, 50, 0], 8, 32), ([700] * 20, 24, 16)],
)
def test_each_sample_at_most_once_an_epoch(counts, lanes, block):
    stream = Stream(counts, lanes, block, seed=3)
    n = np.arange(4 * stream.size)
    _, epoch, shard, index = stream(n)
    assert (index >= 0).all()
    assert (index < np.array(counts)[shard]).all()
    place = stream.cumulative[shard] + index
    used = stream.blocks * stream.block
    for e in (0, 1):
        mine = place[epoch == e]
        assert len(mine) == len(np.unique(mine)) == used
    if len(place[epoch == 0]) > 30:
        assert (place[epoch == 0] != place[epoch == 1]).any()
    assert len(np.unique(place)) == stream.size  # what sits out changes: three epochs miss nothing


def test_samples_of_a_block_are_neighbours_and_the_rest_of_it_is_known():
    stream = Stream([1000] * 30, 16, 32, seed=5)
    assert stream.block == 32
    for n in (0, 5, 16 * 32 + 3):
        block = n + 16 * np.arange(32)
        place = stream.places(block).place
        assert stream.blocks_at(block)[0].tolist() == list(range(32))
        assert set(stream.blocks_at(block)[1].tolist()) == {32}
        assert sorted(((place - place.min()) % stream.size).tolist()) == list(range(32))
    assert stream.blocks_at(np.array([16 * 7]))[0] == 7


def test_seed_and_source_change_the_order():
    n = np.arange(200)
    streams = [Stream([500], 4, 4, seed, source) for seed, source in ((0, 0), (1, 0), (0, 1))]
    orders = [stream(n)[2:].tolist() for stream in streams]
    assert len(set(map(str, orders))) == 3
    assert (streams[2](n)[0] == 1).all()


@pytest.mark.parametrize(
    ("size", "mean_bytes", "batch", "expected"),
    [
        (400_000_000, 50_000, 2048, (2048, 32)),
        (400_000_000, 50_000, 512, (1024, 32)),
        (400_000_000, 50_000, 100, (1100, 32)),
        (400_000_000, 3_000_000, 256, (1024, 1)),
        (945, 8_000, 64, (1024, 1)),
        (16 * 1024 * 5, 100, 64, (1024, 4)),
    ],
)
def test_plan_constants(size, mean_bytes, batch, expected):
    lanes, block = plan_constants(size, mean_bytes, batch)
    assert (lanes, block) == expected
    assert lanes % batch == 0
    assert block == 1 or block * mean_bytes <= READ_BYTES
    assert Stream([size], lanes, block).block == block  # the stored constants are those in use


@pytest.mark.parametrize(("first", "count"), [(0, 1), (5, 700), (511, 2), (3 * 512, 512), (100_000, 3000)])
def test_looking_up_many_is_the_same_as_one_by_one(first, count):
    stream = Stream([700, 1, 0, 9000], 16, 32, seed=3)
    table = np.random.default_rng(0).integers(0, 255, stream.size, np.uint8)
    assert stream.look_up([table], first, count).tolist() == (
        table[stream.places(first + np.arange(count)).place].tolist()
    )


def test_a_walk_ends():
    at = Walk([3, 0, 2]).places(np.arange(7))
    assert at.source[:5].tolist() == [0, 0, 0, 2, 2]
    assert at.place.tolist() == [0, 1, 2, 0, 1, -1, -1]


@pytest.mark.parametrize(
    "windows",
    [[], [(0, 8)], [(8, 16), (32, 40)], [(32, 40), (8, 16)], [(8, 24), (16, 32)], [(8, 16), (16, 24)]],
)
def test_consumed_counts_stay_contiguous_where_a_run_leaps(windows):
    gone = {n for first, end in windows for n in range(first, end)}
    left = [n for n in range(100) if n not in gone]
    assert [skipped(i, windows) for i in range(len(left))] == left
    assert skipped(np.arange(len(left)), windows).tolist() == left
    assert [consumed(n, windows) for n in left] == list(range(len(left)))


def test_laion_sized_plan_is_small():
    counts = np.full(231_350, 8000)
    stream = Stream(counts, 2048, 32)
    arrays = [value for value in vars(stream).values() if isinstance(value, np.ndarray)]
    assert sum(a.nbytes for a in arrays) < 2_000_000
    _, epoch, shard, index = stream(np.array([0, 10**8, stream.size + 10**6]))
    assert epoch.tolist() == [0, 0, 1]
    assert (index < 8000).all()
    assert (shard < 231_350).all()


def test_hash_is_elementwise():
    assert mix(1, np.array([2, 3])).tolist() == [mix(1, 2)[0], mix(1, 3)[0]]


def test_no_samples_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        Stream([0, 0], 8, 1)
