import pickle
import time

import numpy as np
import pytest

from ldm.data.buckets import Regroup, seat
from ldm.data.mixture import Mixture
from ldm.data.plan import Stream
from ldm.data.shapes import Buckets, Numbers, cover
from ldm.errors import InputError

# height, width of the table that SDXL was trained with (Podell et al. 2023, appendix I), portrait half
SDXL = [
    (2048, 512), (1984, 512), (1920, 512), (1856, 512), (1792, 576), (1728, 576), (1664, 576), (1600, 640),
    (1536, 640), (1472, 704), (1408, 704), (1344, 704), (1344, 768), (1280, 768), (1216, 832), (1152, 832),
    (1152, 896), (1088, 896), (1088, 960), (1024, 960), (1024, 1024),
]  # fmt: skip
SAME = np.arange(256).astype(np.uint8)


def test_the_shapes_are_those_of_sdxl_with_the_most_pixels_for_each_long_side():
    shapes = [tuple(shape) for shape in Buckets([1024], max_ratio=4.0).shapes().tolist()]
    longest = {}
    for height, width in SDXL:
        longest[height] = max(width, longest.get(height, 0))
    portrait = set(longest.items())
    assert set(shapes) == portrait | {(w, h) for h, w in portrait}
    assert all(h * w <= 1024**2 for h, w in shapes)
    ratios = [w / h for h, w in shapes]
    assert ratios == sorted(ratios)


def test_a_picture_goes_to_the_largest_resolution_that_it_fills_and_there_to_the_nearest_ratio():
    buckets = Buckets([256, 512], step=64, max_ratio=2.0)
    shapes = buckets.shapes()
    assert (np.diff([group[0].prod() for group in buckets.grid()]) < 0).all()
    rng = np.random.default_rng(0)
    width, height = rng.integers(100, 1500, (2, 4000))
    chosen = shapes[buckets.assign(width, height)]
    large = np.array(buckets.grid()[0])
    nearest = large[np.abs(np.log(width / height)[:, None] - np.log(large[:, 1] / large[:, 0])).argmin(1)]
    fits = cover(width, height, nearest) <= 1
    assert (chosen[fits] == nearest[fits]).all()
    assert (chosen[~fits].prod(1) <= 256**2).all()
    assert buckets.assign(np.array([512, 511]), np.array([512, 512])).tolist() == [
        shapes.tolist().index([512, 512]),
        shapes.tolist().index([256, 256]),
    ]
    grown = Buckets([256, 512], step=64, max_ratio=2.0, enlarge=1.5)
    assert grown.assign(np.array([400]), np.array([400])) == shapes.tolist().index([512, 512])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"resolutions": [500]},
            r"resolutions: 500 is not a multiple of data.buckets.step=64; nearest: 448, 512",
        ),
        ({"resolutions": [32]}, r"resolutions: 32 is not a multiple of .*; nearest: 64"),
        ({"max_ratio": 0.5}, "max_ratio: expected at least 1, got 0.5"),
        ({"enlarge": 0.5}, "enlarge: expected at least 1, got 0.5"),
        ({"min_share": 2.0}, "min_share: expected a share within 0 and 1, got 2.0"),
        ({"period": 1}, "period: expected at least 2, got 1"),
        ({"resolutions": [1024], "step": 4, "max_ratio": 3}, "data.buckets: [0-9]+ shapes, at most 255"),
        ({"ratio": 2}, "data.buckets.ratio: unknown; one of resolutions, step"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(InputError, match=message):
        Buckets.of(options, 1024)


def test_seats_are_ones_own_or_near():
    members = np.arange(64)
    assert seat(members, 64).tolist() == members.tolist()
    crowd = np.array([0, 8, 16, 24, 5, 6, 7, 15])  # four want slot 0, two want 7
    assert sorted(seat(crowd, 8)) == sorted(crowd)
    assert seat(crowd, 8)[[0, 5, 6, 7]].tolist() == [0, 5, 6, 7]
    rng = np.random.default_rng(0)
    members = np.sort(rng.choice(2048 * 20, 2048, replace=False))
    seats = seat(members, 2048)
    assert sorted(seats) == members.tolist()
    assert np.mean((seats % 2048) // 32 == np.arange(2048) // 32) > 0.85  # of a world of 64 readers


def regrouped(batch=24, period=64, lanes=24, sizes=(3000,), share=(0.5, 0.2, 0.15, 0.1, 0.05)):
    rng = np.random.default_rng(0)
    tables = [rng.choice(len(share), size, p=share).astype(np.uint8) for size in sizes]
    streams = [Stream([size], lanes // len(sizes), 8, 7, d) for d, size in enumerate(sizes)]
    base = streams[0] if len(sizes) == 1 else Mixture(streams)
    return Regroup(base, [Numbers(table) for table in tables], SAME, len(share), batch, period), tables


@pytest.mark.parametrize("sizes", [(3000,), (400, 3000), (20,)])
def test_every_step_has_one_bucket_and_nothing_comes_twice(sizes):
    plan, tables = regrouped(sizes=sizes)
    n = np.arange(24 * 60 * 5)
    played = plan.dealt(n)
    assert len(np.unique(played)) == len(n)
    assert (played // (64 * 24) == n // (60 * 24)).all()  # periods stay apart
    at = plan.places(n)
    bucket = np.array([tables[s][p] for s, p in zip(at.source, at.place, strict=True)]).reshape(-1, 24)
    assert (bucket == bucket[:, :1]).all()
    assert bucket[:, 0].tolist() == [plan.bucket(step) for step in range(300)]
    for s, size in enumerate(sizes):  # 1.1 to 300 passes
        assert len(np.unique(at.place[at.source == s])) > 0.95 * size


def test_any_place_can_be_asked_for_first():
    plan, _ = regrouped()
    n = np.random.default_rng(1).permutation(24 * 60 * 4)
    again = pickle.loads(pickle.dumps(plan))
    assert again.dealt(n[:3000]).tolist() == plan.dealt(np.sort(n))[n[:3000]].tolist()


def test_golden_values():
    """Of a rule for the buckets that no random generator may change."""
    table = np.minimum(4, np.arange(3000) * 7 % 11).astype(np.uint8)
    plan = Regroup(Stream([3000], 24, 8, 7), [Numbers(table)], SAME, 5, 24, 64)
    assert plan.dealt(np.array([0, 1, 23, 24, 1000, 3599])).tolist() == [0, 1, 23, 48, 856, 3671]


def test_what_is_played_when():
    plan, _ = regrouped()
    step = 70  # in the second period
    n = np.arange(24 * 60, 24 * 120)
    due = dict(zip(plan.dealt(n).tolist(), (n // 24).tolist(), strict=True))
    m = np.arange(24 * 64 * 3)
    later = np.iinfo(np.int64).max
    expected = [due.get(x, -1) if x < 2 * 24 * 64 else later for x in m.tolist()]
    assert plan.due(m, step).tolist() == expected
    for s in range(60, 120):
        assert plan.reach(s) == plan.dealt(np.arange(24 * s, 24 * s + 24)).max() // 24


def test_a_period_leaves_out_one_batch_a_bucket_at_most():
    plan, _ = regrouped(period=256)
    at = plan.places(np.arange(24 * 252))
    left_out = 1 - len(at.place) / (24 * 256)
    assert left_out == 4 / 256
    assert len(np.unique(at.place[at.epoch == 0])) > 0.99 * 3000


def test_too_short_a_period():
    with pytest.raises(ValueError, match="a period of 8 steps is too short for 5 buckets"):
        regrouped(period=8)


def test_a_period_at_scale_is_quick():
    """A table for 2,048 samples a step, 4,096 steps; in processor time, for other tests run beside."""
    share = np.geomspace(0.24, 0.0034, 16)
    plan, _ = regrouped(2048, 4096, 2048, (4_000_000,), tuple(share / share.sum()))
    start = time.process_time()
    plan.bucket(0)
    assert time.process_time() - start < 2  # 0.4 s measured
