"""data.json: what goes into it, what a newer or older program does with it."""

import json

import pytest

from ldm.data import state
from ldm.data.datamodule import ShardDataModule
from ldm.errors import InputError


@pytest.fixture
def module(shards):
    return lambda **options: ShardDataModule(str(shards), 8, 12, seed=1, **options)


def stored(data, n, **changes):
    """As it comes back from a checkpoint."""
    return json.loads(json.dumps(data.state(n) | changes))


def test_it_goes_on_with_all_that_it_says(module):
    data = module()
    data.skip = [(24, 48)]
    data.health.quarantine[2] = ("missing", 36)
    data.health.masked["corrupt"] = 7
    other = module()
    other.check_state(stored(data, 60, digest="ff" * 8))
    assert other.state(60) == data.state(60) | {"digest": "ff" * 8}
    assert other.skip == [(24, 48)]


def test_a_newer_form_is_refused(module):
    data = module(rebase=True)
    with pytest.raises(InputError, match=r"resume: data form 3 is newer than this program \(2\); update ldm"):
        data.check_state(stored(data, 0, form=3))


def test_a_checkpoint_of_before_the_digest_goes_on(module):
    data = module()
    old = ("plan_version", "seed", "lanes", "block", "global_batch_size", "index", "samples")
    data.check_state({name: value for name, value in stored(data, 120).items() if name in old})
    assert data.state(132) == module().state(132) | {"digest_from": 120}


def test_shards_given_up_are_forgotten_with_other_data(module, shards, write, sample):
    data = module()
    data.health.quarantine[2] = ("missing", 36)
    before = stored(data, 60)
    write("set/00004.tar", [sample(i) for i in range(5)])
    more = module(rebase=True)
    more.check_state(before)
    assert more.health.quarantine == {}
    assert more.constants is None


def test_what_is_compared_is_what_the_plan_is_made_from():
    mine = {"seed": 1, "index": "abc"}
    assert state.check({**mine, "plan_version": 1, "anything": 5}, mine, rebase=False)
    assert not state.check({**mine, "plan_version": 1, "seed": 2}, mine, rebase=True)
    with pytest.raises(InputError, match="data: checkpoint has seed 2; now 1; restore them, or"):
        state.check({**mine, "plan_version": 1, "seed": 2}, mine, rebase=False)
