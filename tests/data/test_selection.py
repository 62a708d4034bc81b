import pickle

import numpy as np
import pytest

from ldm.data import selection as module
from ldm.data.datamodule import ShardDataModule
from ldm.data.filters import Filter, MinValue
from ldm.data.index import FOLDER, build_index
from ldm.data.selection import First, on_side, select
from ldm.errors import InputError


def test_all_rows_without_their_list(shards):
    rows = select(build_index(str(shards))).rows
    assert isinstance(rows, First)
    assert rows[np.array([3, 63, -1])].tolist() == [3, 63, 63]
    assert rows[60:].tolist() == [60, 61, 62, 63]
    assert np.asarray(rows).tolist() == list(range(64))
    with pytest.raises(IndexError):
        rows[np.array([64])]
    some = select(build_index(str(shards)), limit=30)
    assert len(some.rows) == 30
    assert some.counts.tolist() == [23, 7, 0]


@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_a_selection_is_stored_beside_the_index(shards, monkeypatch, piece):
    monkeypatch.setattr(module, "PIECE", piece)
    index, filters = build_index(str(shards)), [MinValue("aesthetic", 2.0)]
    first = select(index, filters)
    assert first.path.parent == shards / FOLDER
    monkeypatch.setattr(MinValue, "accepts", None)  # not asked again
    again = select(build_index(str(shards)), filters)
    assert again.rows.tolist() == first.rows.tolist() == [*range(8, 23), *range(31, 53)]
    assert (again.digest, again.dropped, again.missing) == (first.digest, first.dropped, first.missing)
    assert again.counts.tolist() == [15, 22, 0]
    data = pickle.dumps(again.rows)
    assert len(data) < 300  # a worker maps it
    assert pickle.loads(data)[np.array([0])].tolist() == [8]
    first.path.with_suffix(".json").write_text("{")
    monkeypatch.undo()
    assert select(index, filters).digest == first.digest


def test_lists_that_a_filter_has_read_tell_its_selections_apart(shards):
    def path(lists):
        condition = MinValue("aesthetic", 2.0)
        object.__setattr__(condition, "listed", lists)
        return select(build_index(str(shards)), [condition]).path

    some, more = {"url": np.array([1, 2])}, {"url": np.array([1, 3])}
    assert path(some) == path({"url": np.array([1, 2])}) != path(more)


class Everything(Filter):
    """A user's own, of which nobody knows when its code changes."""

    needs = ()

    def mask(self, table):
        return np.ones(len(table["width"]), bool)

    def absent(self, table):
        return np.zeros(len(table["width"]), bool)


def test_a_users_filter_is_judged_each_time(shards):
    index = build_index(str(shards))
    selection = select(index, [Everything()])
    assert selection.path is None
    assert selection.digest == select(index).digest


def test_nothing_kept_leaves_no_file(shards):
    with pytest.raises(InputError, match="filter keeps 0 of 64 samples"):
        select(build_index(str(shards)), [MinValue("aesthetic", 11.0)])
    assert not list((shards / FOLDER).glob("selection-*"))


def sides(index, fraction, filters=()):
    """Keys of both sides of a split."""
    chosen = [select(index, filters, split=(fraction, side)) for side in ("train", "validation")]
    return [set(index.keys(np.asarray(selection.rows))) for selection in chosen]


def test_a_split_is_disjoint_complete_and_stable(shards, write, sample):
    index = build_index(str(shards))
    train, validation = sides(index, 0.3)
    assert not train & validation
    assert train | validation == set(index.keys(np.arange(64)))
    assert 10 < len(validation) < 30
    assert validation < sides(index, 0.5)[1]
    write("set/00002.tar", [sample(i, key=f"a/much/longer/key/{i}") for i in range(500)])
    later = sides(build_index(str(shards)), 0.3)
    assert train < later[0]
    assert validation < later[1]
    good = sides(index, 0.3, [MinValue("aesthetic", 2.0)])
    assert good[0] < train
    assert good[1] < validation


def test_a_splits_share_is_what_was_asked():
    keys = np.array([f"{i:09d}".encode() for i in range(200_000)])
    kept = on_side(keys, (0.01, "validation"))
    assert abs(kept.mean() - 0.01) < 4 * np.sqrt(0.01 * 0.99 / len(keys))
    assert (on_side(keys, (0.01, "train")) == ~kept).all()


def test_validation_by_fraction_in_training(shards):
    data = ShardDataModule(str(shards), image_size=8, global_batch_size=4, validation_fraction=0.3)
    data.setup()
    train, validation = sides(data.sources[0].index, 0.3)
    assert len(data.sources[0].selection) == len(train) == data.known_size()
    assert len(data.validation[0]) == len(validation)
    batch = next(iter(data.stream()))
    assert set(batch.key) <= train
    seen = [key for batch in data.validation_stream() for key in batch.key if key]
    assert sorted(seen) == sorted(validation)
    with pytest.raises(InputError, match="data.validation_fraction: expected 0 to 1, got 1"):
        ShardDataModule("x", 8, 4, validation_fraction=1)
    with pytest.raises(InputError, match="leave out one of it and validation_shards"):
        ShardDataModule("x", 8, 4, validation_shards="y", validation_fraction=0.1)


def test_unfinished_shards_in_training(shards):
    (shards / "00000_stats.json").write_text('{"successes": 23}')
    options = {"image_size": 8, "global_batch_size": 4}
    with pytest.raises(InputError, match="finish it or set data.allow_incomplete=true"):
        ShardDataModule(str(shards), **options).setup()
    data = ShardDataModule(str(shards), **options, allow_incomplete=True)
    data.setup()
    assert len(data.sources[0].selection) == 64
