"""What a run consumed and what of it was bad: digest, counters, budgets; one process, and two."""

import multiprocessing

import numpy as np
import pytest
import torch
import xxhash
from torch import distributed as dist

from ldm.data.health import Budget, Health
from ldm.data.reasons import REASONS, number_of
from ldm.errors import InputError
from ldm.types import Batch


def batch(first, reasons, events=()):
    """Samples from place `first`, one a reason ("": good)."""
    keys = [f"s/{n}" for n in range(first, first + len(reasons))]
    hashes = np.array([xxhash.xxh3_64_intdigest(key.encode()) for key in keys], np.uint64)
    return Batch(
        n=torch.arange(first, first + len(reasons)),
        weight=torch.tensor([float(not reason) for reason in reasons]),
        key=keys,
        reason=reasons,
        hash=torch.from_numpy(hashes.view(np.int64)),
        events=events,
    )


def fed(health, reasons, size=10):
    """Feed the reasons in batches of `size`, agreeing after each."""
    for first in range(0, len(reasons), size):
        health.add(batch(first, reasons[first : first + size]))
        health.agree(first + size)
    return health


def test_the_list_of_reasons_is_sorted():
    assert list(REASONS) == sorted(set(REASONS))
    assert [number_of(reason) for reason in REASONS] == list(range(len(REASONS)))
    assert REASONS[number_of("never heard of")] == "other"


def test_the_digest_is_the_sum_of_the_hashes():
    expected = sum(xxhash.xxh3_64_intdigest(f"s/{n}".encode()) for n in range(60)) % 2**64
    assert fed(Health(Budget()), [""] * 60, 10).digest == expected
    assert fed(Health(Budget()), [""] * 60, 3).digest == expected
    assert fed(Health(Budget()), [""] * 57, 3).digest != expected
    health = fed(Health(Budget()), [""] * 30)
    again = Health(Budget())
    again.load(health.state() | {"samples": 30})
    again.add(batch(30, [""] * 30))
    again.agree(60)
    assert again.state()["digest"] == f"{expected:016x}"


def test_what_is_not_agreed_yet_is_not_in_the_state():
    health = fed(Health(Budget()), [""] * 30)
    before = health.state()
    health.add(batch(30, ["corrupt"] * 10))
    assert health.state() == before


def test_rows_have_what_was_masked_since_the_last(caplog):
    health = fed(Health(Budget()), ["", "corrupt", "strange"])
    assert "masked s/1: corrupt" in caplog.text
    assert health.take_row() == {"corrupt": 1, "other": 1}
    health.add(batch(3, ["corrupt"] * 20))
    health.agree(23)
    assert caplog.text.count("masked") == 10, "the first few"
    again = Health(Budget())
    again.load(health.state() | {"samples": 23})
    assert again.take_row() == health.take_row() == {"corrupt": 20, "other": 0}
    assert again.state()["masked"] == {"corrupt": 21, "other": 1}
    assert Health(Budget()).take_row() == {}


def test_shards_that_were_given_up(caplog):
    health = Health(Budget(), ["/a/0.tar", "/a/1.tar"])
    health.add(batch(0, [""], [(1, "missing", 40), (1, "timeout", 30)]))
    health.agree(1)
    assert health.quarantine == {1: ("timeout", 30)}
    assert "shard /a/1.tar is given up: timeout" in caplog.text
    same, other = Health(Budget()), Health(Budget())
    same.load(health.state() | {"samples": 1})
    other.load(health.state() | {"samples": 1}, same_shards=False)
    assert same.quarantine == health.quarantine
    assert other.quarantine == {}


GOOD, BAD = "", "corrupt_image"


@pytest.mark.parametrize(
    ("budget", "reasons", "message"),
    [
        ({"in_a_row": 12}, [GOOD] * 5 + [BAD] * 12 + [GOOD] * 5, None),
        ({"in_a_row": 12}, [GOOD] * 5 + [BAD] * 13, "13 bad samples in a row; 12 are allowed"),
        ({"in_a_row": None}, [BAD] * 500, None),
        ({"fraction": 0.1, "window": 100}, ([BAD] + [GOOD] * 9) * 50, None),
        ({"fraction": 0.1, "window": 100}, [BAD, *[GOOD] * 5] * 10, None),  # the first ten
        ({"fraction": 0.1, "window": 100}, [BAD, *[GOOD] * 5] * 18, "12 bad samples of the last 70; 10 are"),
        ({"fraction": 0.1, "window": 100}, [GOOD] * 300 + [BAD] * 20, "20 bad samples of the last 100; 10"),
        ({"fraction": None, "in_a_row": None}, [BAD] * 2000, None),
        ({"fraction": 0.0}, [GOOD] * 30 + [BAD], "1 bad samples of the last 40; 0 are allowed"),
    ],
)
def test_budgets_of_samples(budget, reasons, message):
    health = Health(Budget(**budget))
    if message is None:
        fed(health, reasons)
    else:
        with pytest.raises(InputError, match=message) as error:
            fed(health, reasons)
        assert f"masked in this run: corrupt_image {health.masked[BAD]}; repair" in str(error.value)


@pytest.mark.parametrize(
    ("allowed", "shards", "lost", "stops"),
    [
        (0.001, 3, 1, False),
        (0.001, 3, 2, True),
        (0.001, 5000, 5, False),
        (0.001, 5000, 6, True),
        (0.0, 3, 1, True),
        (None, 3, 3, False),
    ],
)
def test_the_budget_of_shards(allowed, shards, lost, stops):
    health = Health(Budget(shards=allowed), [f"/a/{i}.tar" for i in range(shards)])
    health.add(batch(0, [""], [(i, "missing", 0) for i in range(lost)]))
    if stops:
        with pytest.raises(InputError, match=r"data.budget.shards: .* given up; .*0.tar \(missing\)"):
            health.agree(1)
    else:
        health.agree(1)


@pytest.mark.parametrize("option", [{"in_a_row": -1}, {"window": 0}, {"fraction": -0.1}, {"shards": -1}])
def test_a_budget_below_nothing_is_refused(option):
    with pytest.raises(InputError, match=f"data.budget.{next(iter(option))}: "):
        Budget(**option)


# ---- two ranks


def rank_main(rank, folder, results):
    """Rank 1 alone meets bad samples and a lost shard; then a long row of them."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    health = Health(Budget(in_a_row=12), ["/a/0.tar", "/a/1.tar", "/a/2.tar"])
    bad = rank == 1
    for step in range(3):
        reasons = ["", "missing"] if bad else ["", ""]
        events = [(2, "missing", 4 * step + 2)] if bad and step == 1 else []
        health.add(batch(4 * step + 2 * rank, reasons, events))
    health.agree(12)
    state, row = health.state(), health.take_row()
    health.add(batch(12 + 13 * rank, ["timeout" if bad else ""] * 13))
    try:
        health.agree(38)
        stopped = ""
    except InputError as error:
        stopped = str(error)
    results.put((rank, state, row, stopped))
    dist.barrier()


def test_ranks_agree_and_stop_together(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=rank_main, args=(rank, tmp_path, results)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    found = dict(sorted((rank, rest) for rank, *rest in (results.get(timeout=100) for _ in ranks)))
    for rank in ranks:
        rank.join(100)
    assert found[0] == found[1]
    state, row, stopped = found[0]
    alone = fed(Health(Budget()), [""] * 12, 4).state()
    assert state == alone | {"masked": {"missing": 3}, "quarantine": [[2, "missing", 6]]} | {
        "masked_since_row": {"missing": 3}
    }
    assert row == {"missing": 3}
    assert stopped.startswith("data.budget.in_a_row: 14 bad samples in a row; 12 are allowed; ")
    assert "timeout 13, missing 3; shards given up: 2.tar (missing)" in stopped
