import numpy as np
import pytest

from ldm.data.datamodule import ShardDataModule
from ldm.data.filters import MinValue
from ldm.data.mixture import Mixture, shares
from ldm.data.plan import Stream
from ldm.errors import InputError

COUNTS = [[100, 250, 50], [3000], [20, 20]]


def mixture(lanes, weights=(0.5, 0.3, 0.2), seed=7):
    each = shares(weights, lanes)
    return Mixture([Stream(c, k, 8, seed, d) for d, (c, k) in enumerate(zip(COUNTS, each, strict=True))])


@pytest.mark.parametrize(
    ("weights", "lanes", "expected"),
    [
        ([0.5, 0.3, 0.15, 0.05], 1024, [513, 307, 153, 51]),
        ([1, 1e-9], 16, [15, 1]),
        ([1, 1, 1], 16, [6, 5, 5]),
        ([2], 16, [16]),
    ],
)
def test_shares(weights, lanes, expected):
    assert shares(weights, lanes) == expected


def test_more_sets_than_lanes():
    with pytest.raises(ValueError, match="5 data sets do not fit into 4 lanes"):
        shares([1] * 5, 4)


def test_golden_values():
    at = mixture(24).places(np.array([0, 1, 23, 24, 1000, 10**9]))
    assert at.source.tolist() == [0, 1, 0, 0, 2, 2]
    assert at.epoch.tolist() == [0, 0, 0, 0, 4, 4166666]
    assert at.place.tolist() == [260, 876, 62, 219, 7, 5]


def test_weights_hold_in_every_batch_and_each_set_has_its_own_epochs():
    plan = mixture(240)
    at = plan.places(np.arange(24_000))
    assert plan.shares == [0.5, 0.3, 0.2]
    for batch in at.source.reshape(-1, 24):
        assert np.abs(np.bincount(batch, minlength=3) - [12, 7.2, 4.8]).max() <= 1.2
    for d, counts in enumerate(COUNTS):
        for epoch in range(2):
            places = at.place[(at.source == d) & (at.epoch == epoch)]
            assert len(places) == len(np.unique(places)) == sum(counts)


def test_a_block_is_played_by_one_lane():
    plan = Mixture([Stream([9000], 32, 8, 0, 0), Stream([9000], 16, 16, 0, 1)])
    for n in range(48):
        offset, size = plan.blocks_at(np.array([n]))
        block = n + plan.lanes * np.arange(int(size[0]))
        at = plan.places(block)
        assert offset[0] == 0
        assert set(at.source) == {plan.owner[n]}
        assert np.ptp(np.sort((at.place - at.place.min()) % 9000)) in (int(size[0]) - 1, 8999)


def test_looking_up_many_is_the_same_as_one_by_one():
    plan = mixture(24)
    tables = [np.random.default_rng(d).integers(0, 255, sum(c), np.uint8) for d, c in enumerate(COUNTS)]
    for first, count in ((0, 1), (17, 5000), (24 * 8 * 3, 192)):
        at = plan.places(first + np.arange(count))
        expected = [tables[s][p] for s, p in zip(at.source, at.place, strict=True)]
        assert plan.look_up(tables, first, count).tolist() == expected


@pytest.fixture
def two(write, sample):
    """Two folders: pictures 0..99, with scores, and 1000..1039."""
    one = write("one/0.tar", [sample(i, AESTHETIC_SCORE=i / 10) for i in range(100)])
    other = write("other/0.tar", [sample(1000 + i, my_score=i / 10) for i in range(40)])
    return str(one.parent), str(other.parent)


def numbers(data, steps, **options):
    batches = [batch for _, batch in zip(range(steps), data.stream(**options), strict=False)]
    assert all(batch.weight.all() for batch in batches)
    return [int(caption.split()[1]) for batch in batches for caption in batch.caption]


def test_a_run_on_two_data_sets(two, number_of):
    mix = [
        {"shards": two[0], "weight": 3, "name": "one", "filters": [MinValue("aesthetic", 5.0)]},
        {
            "shards": two[1],
            "weight": 1,
            "filters": [MinValue("quality", 2.0)],
            "columns": {"quality": "my_score"},
        },
    ]
    data = ShardDataModule(None, 8, 16, mix=mix)
    seen = np.array(numbers(data, 10))
    assert ((seen >= 1000).reshape(-1, 16).sum(1) == 4).all()
    assert set(seen[seen < 1000]) == set(range(50, 100))
    assert set(seen[seen >= 1000]) == set(range(1020, 1040))
    assert sorted(seen[seen < 1000][:50]) == list(range(50, 100))
    lines = data.summary()
    assert "one: 75.00% of what is played, in blocks of 1" in lines
    assert "data.mix[1]: 25.00% of what is played, in blocks of 1" in lines
    (batch,) = (batch for _, batch in zip(range(1), data.stream(), strict=False))
    for i, caption in enumerate(batch.caption):
        assert number_of(batch.image[i]) == int(caption.split()[1])


def test_state_of_a_mixture(two):
    mix = [{"shards": two[0], "weight": 3}, {"shards": two[1], "weight": 1}]
    data = ShardDataModule(None, 8, 16, mix=mix)
    state = data.state(160)
    assert state["mix"] == [3.0, 1.0]
    assert (state["lanes"], state["block"]) == ([768, 256], [1, 1])
    again = ShardDataModule(None, 8, 16, mix=mix)
    again.check_state(state | {"lanes": [48, 16], "block": [2, 1]})
    assert again.plan().constants == ([48, 16], [1, 1])  # as large as the data allow
    other = ShardDataModule(None, 8, 16, mix=[{**mix[0], "weight": 2}, mix[1]])
    with pytest.raises(InputError, match=r"checkpoint has mix \[3.0, 1.0\]; now \[2.0, 1.0\]"):
        other.check_state(state)


def test_validation_of_a_mixture_is_what_each_set_holds_out(two):
    keep = [MinValue("width", 1)]
    data = ShardDataModule(
        None, 8, 16, mix=[{"shards": path} for path in two], validation_filters=keep, validation_batch_size=32
    )
    batches = list(data.validation_stream())
    real = [
        int(c.split()[1]) for batch in batches for c, w in zip(batch.caption, batch.weight, strict=True) if w
    ]
    assert real == [*range(100), *range(1000, 1040)]
    assert data.known_size() == 140


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shards": None}, "data.shards, data.mix: neither given; give one of them; null is none"),
        ({"shards": "x", "mix": [{"shards": "y"}]}, "data.shards, data.mix: both given"),
        ({"shards": None, "mix": []}, "data.mix: no data set given"),
        ({"shards": None, "mix": [{"weight": 1}]}, r"data.mix\[0\].shards: no shards given"),
        (
            {"shards": None, "mix": [{"shards": "x", "weight": 0}]},
            r"data.mix\[0\].weight: expected above 0, got 0",
        ),
        (
            {"shards": None, "mix": [{"shards": "x", "wieght": 2}]},
            r"data.mix\[0\].wieght: unknown; one of shards",
        ),
    ],
)
def test_wrong_mixtures(options, message):
    with pytest.raises(InputError, match=message):
        ShardDataModule(image_size=8, global_batch_size=4, **options)


def test_errors_name_the_data_set(two):
    data = ShardDataModule(None, 8, 4, mix=[{"shards": two[0]}, {"shards": "/nowhere"}])
    with pytest.raises(InputError, match=r"data.mix\[1\].shards: no shard matches '/nowhere'"):
        data.setup()
    bad = [{"shards": two[0], "filters": [MinValue("beauty", 1)]}]
    with pytest.raises(InputError, match=r"data.mix\[0\].filters\[0\]: filter uses 'beauty'"):
        ShardDataModule(None, 8, 4, mix=bad).setup()
