import itertools
import math

import pytest
import torch

from ldm import random
from ldm.random import keyed_bits, keyed_normal, keyed_uniform, keyed_word, philox

COUNT = 2**21  # draws for the moments: their standard errors are below 1e-3


def words(*values):
    return [torch.tensor([value]) for value in values]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    assert [word.item() for word in philox(words(*counter), key)] == list(expected)


def draws(function):
    """COUNT numbers in rows of 4096."""
    return function(7, torch.arange(COUNT // 4096), "noise", (4096,)).flatten().double()


def test_uniform_moments_and_ends():
    u = draws(keyed_uniform)
    assert u.min() > 0
    assert u.max() < 1
    for power in (1, 2, 3, 4):
        assert (u**power).mean().item() == pytest.approx(1 / (power + 1), abs=1.5e-3)
    counts = torch.histc(u, 64, 0, 1)
    chi_square = ((counts - COUNT / 64) ** 2 / (COUNT / 64)).sum().item()
    assert 63 - 5 * math.sqrt(126) < chi_square < 63 + 5 * math.sqrt(126)
    steps = u.double() * 2**24
    assert (steps == steps.round()).all()


def test_uniform_never_reaches_its_ends():
    """The extreme words of 23 bits, by the formula of the docstring."""
    low, high = (((torch.tensor(bits) >> 9).float() + 0.5) * 2.0**-23 for bits in (0, 2**32 - 1))
    assert low.item() == 2.0**-24
    assert high.item() == 1 - 2.0**-24


def test_normal_moments_and_tails():
    x = draws(keyed_normal)
    expected = {1: 0, 2: 1, 3: 0, 4: 3, 5: 0, 6: 15}
    for power, moment in expected.items():
        spread = math.sqrt(math.prod(range(1, 2 * power, 2)) / COUNT)
        assert (x**power).mean().item() == pytest.approx(moment, abs=5 * spread)
    for bound in (1.0, 2.0, 3.0, 4.0):
        share = math.erfc(bound / math.sqrt(2))
        assert (x.abs() > bound).double().mean().item() == pytest.approx(
            share, abs=5 * math.sqrt(share / COUNT)
        )
    assert 4.5 < x.abs().max() < 6.7  # 2^-33 is the rarest radius
    assert x.isfinite().all()


def test_normal_follows_the_normal_distribution():
    """Kolmogorov and Smirnov's distance, below 1.95 / sqrt(n) with probability 0.999."""
    x = draws(keyed_normal).sort().values
    distance = (torch.special.ndtr(x) - (torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT).abs().max()
    assert distance < 1.95 / math.sqrt(COUNT)


def test_normal_pairs_of_one_radius_are_independent():
    """Cosine and sine halves of one row: neither they nor their squares may correlate."""
    x = keyed_normal(3, torch.arange(4096), "noise", (256,)).double()
    first, second = x[:, :128].flatten(), x[:, 128:].flatten()
    bound = 5 / math.sqrt(len(first))
    for power in (1, 2):
        pair = torch.stack([first**power, second**power])
        assert torch.corrcoef(pair)[0, 1].abs() < bound


@pytest.mark.parametrize("function", [keyed_uniform, keyed_normal])
def test_a_row_depends_on_its_own_n_only(function):
    n = torch.tensor([5, 0, 123_456_789_012, 5, 2**62])
    together = function(11, n, "noise", (4, 3, 3))
    for i in range(len(n)):
        assert torch.equal(function(11, n[i : i + 1], "noise", (4, 3, 3))[0], together[i])
    assert torch.equal(together[0], together[3])
    assert torch.equal(function(11, n.flip(0), "noise", (4, 3, 3)), together.flip(0))
    assert torch.equal(function(11, n.to(torch.int32).long()[:2], "noise", (4, 3, 3)), together[:2])


@pytest.mark.parametrize("function", [keyed_uniform, keyed_normal])
def test_seeds_purposes_and_places_give_unrelated_streams(function):
    size = 2**14
    streams = [
        function(seed, torch.tensor([n]), purpose, (size,)).flatten().double()
        for seed, n, purpose in [
            (0, 0, "noise"),
            (1, 0, "noise"),
            (2**32, 0, "noise"),
            (-1, 0, "noise"),
            (0, 1, "noise"),
            (0, 2**32, "noise"),
            (0, 0, "time"),
            (0, 0, "posterior"),
            (0, 0, "step-1"),
            (0, 0, "step-10"),
        ]
    ]
    for one, other in itertools.combinations(streams, 2):
        assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 5 / math.sqrt(size)


def test_neighbouring_places_do_not_correlate():
    x = keyed_normal(0, torch.arange(100_000), "noise", (2,)).double()
    for lag in (1, 2, 64):
        assert torch.corrcoef(torch.stack([x[:-lag, 0], x[lag:, 0]]))[0, 1].abs() < 0.016


@pytest.mark.parametrize("function", [keyed_uniform, keyed_normal])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (5,), (2, 3), (4, 8, 8)])
def test_shapes(function, shape):
    x = function(0, torch.arange(6), "noise", shape)
    assert x.shape == (6, *shape)
    assert x.dtype == torch.float32


def test_longer_uniform_rows_begin_like_shorter_ones():
    n = torch.arange(3)
    assert torch.equal(keyed_uniform(1, n, "crop", (9,))[:, :5], keyed_uniform(1, n, "crop", (5,)))


def test_no_hidden_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = keyed_normal(4, torch.arange(8), "noise", (4,))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(keyed_normal(4, torch.arange(8), "noise", (4,)), first)


@pytest.mark.parametrize("function", [keyed_bits, keyed_uniform, keyed_normal])
def test_torch_and_numpy_give_the_same_bits(function, monkeypatch):
    n = torch.tensor([0, 5, 123_456_789_012, 2**62 + 1])
    size = 4099 if function is keyed_bits else (4099,)
    ours = function(2**40 + 3, n, "noise", size)
    monkeypatch.setattr(random, "_arrays", lambda n: (torch, n.to(torch.int64).reshape(-1, 1)))
    assert torch.equal(function(2**40 + 3, n, "noise", size), ours)


def test_a_tensor_without_data_has_numbers_of_the_right_shape():
    with torch._subclasses.FakeTensorMode():
        assert keyed_normal(0, torch.arange(6), "noise", (4, 3)).shape == (6, 4, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("function", [keyed_uniform, keyed_normal])
def test_a_gpu_gives_the_same_bits(function):
    n = torch.tensor([0, 5, 123_456_789_012])
    assert torch.equal(
        function(7, n.cuda(), "noise", (4, 64, 64)).cpu(), function(7, n, "noise", (4, 64, 64))
    )


def test_golden_values():
    """Checkpoints and pictures of old seeds rest on these: they never change."""
    n = torch.tensor([0, 1, 1_000_000_007])
    assert keyed_bits(42, n, "noise", 2).tolist() == GOLDEN_BITS
    assert [[x.hex() for x in row] for row in keyed_uniform(42, n, "time", (2,)).tolist()] == GOLDEN_UNIFORM
    assert [[x.hex() for x in row] for row in keyed_normal(42, n, "noise", (3,)).tolist()] == GOLDEN_NORMAL


GOLDEN_BITS = [[2416880259, 765920046], [4035182059, 836074832], [4059508591, 919858393]]
GOLDEN_UNIFORM = [
    ["0x1.e4ec820000000p-1", "0x1.7bacb00000000p-4"],
    ["0x1.8b6ed20000000p-1", "0x1.347df00000000p-4"],
    ["0x1.5a3aa00000000p-5", "0x1.c6efc80000000p-3"],
]
GOLDEN_NORMAL = [
    ["-0x1.10d0800000000p+0", "-0x1.756d2a0000000p-2", "0x1.e90d880000000p-4"],
    ["-0x1.27226e0000000p-3", "0x1.8364c60000000p+0", "0x1.4a421c0000000p-2"],
    ["-0x1.0738c00000000p-7", "0x1.7faaa40000000p+0", "0x1.57c3b20000000p-2"],
]


def test_one_word_in_python_is_the_word_of_the_tensors():
    for seed, n, purpose in itertools.product(
        (0, 7, 2**40 + 3, 2**64 - 1), (0, 5, 2**33 + 1), ("layers", "")
    ):
        assert keyed_word(seed, n, purpose) == keyed_bits(seed, torch.tensor([n]), purpose, 1).item()
