"""What a cache is made of: arrays as bytes, their place in the index, whose turn each variant is."""

import io
import json
import pickle

import numpy as np
import pytest
import torch

from ldm.data.arrays import Layout
from ldm.data.cached import CachedDataModule, CacheFacts, Moments, read_facts
from ldm.data.image import BadImage
from ldm.data.index import build_index
from ldm.data.plan import Stream
from ldm.data.reader import Raw, ShardReader
from ldm.errors import InputError

FACTS = {
    "autoencoder": "a" * 64,
    "conditioner": "c" * 64,
    "image_size": 16,
    "crop": "random",
    "flip": 0.5,
    "seed": 0,
    "variants": 3,
    "dtype": "fp16",
    "selection": "s" * 64,
    "samples": 5,
    "samples_per_shard": 4,
    "shapes": {"moments": [3, 8, 2, 2], "context": [4, 6], "context_mask": [4], "pooled": [5]},
}


@pytest.fixture
def entry():
    """number -> a sample of a cache, for `wds.TarWriter`; all its values tell the number."""
    layouts = CacheFacts(**FACTS).layouts()

    def make(number, **more):
        values = {kind: np.full(layout.shape, number, layout.dtype) for kind, layout in layouts.items()}
        values["moments"] += np.arange(3, dtype=np.float16)[:, None, None, None] / 4
        facts = {"crop": [[0, number], [1, number], [2, number]], "key": f"{number:09d}"}
        facts |= {"width": 20, "height": 30, "original_width": 200, "original_height": 300, **more}
        arrays = {f"{kind}.npy": layouts[kind].pack(value) for kind, value in values.items()}
        text = {"txt": f"picture {number}", "json": json.dumps(facts).encode()}
        return {"__key__": f"{number:09d}", **arrays, **text}

    return make


@pytest.fixture
def folder(write, entry):
    """A cache of five samples in two shards."""
    path = write("cache/00000.tar", [entry(i) for i in range(4)]).parent
    write("cache/00001.tar", [entry(4, aesthetic=6.5)])
    (path / "dataset.json").write_text(CacheFacts(**FACTS, complete=True).text())
    return path


@pytest.mark.parametrize(("dtype", "shape"), [("fp16", (3, 8, 2, 2)), ("fp32", (5,)), ("bool", (77, 1))])
def test_arrays_are_those_of_numpy(dtype, shape):
    layout, file = Layout("x", dtype, shape), io.BytesIO()
    values = (np.arange(np.prod(shape)) % 7).reshape(shape).astype(layout.dtype)
    np.save(file, values)
    assert layout.pack(values) == file.getvalue()
    np.testing.assert_array_equal(layout.unpack(file.getvalue()), values)
    with pytest.raises(ValueError, match="x of shape"):
        layout.pack(np.zeros(2, layout.dtype))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data.replace(b"<f2", b"<f4"),
        lambda data: data.replace(b"False", b"True "),
        lambda data: b"",
        lambda data: pickle.dumps([1]),
    ],
)
def test_anything_else_is_a_bad_sample(change):
    layout = Layout("moments", "fp16", (1, 8, 2, 2))
    with pytest.raises(BadImage, match="^bad_moments$"):
        layout.unpack(change(layout.pack(np.zeros(layout.shape, layout.dtype))))


def test_the_index_knows_where_arrays_lie(folder):
    index = build_index(str(folder))
    assert len(index) == 5
    assert set(index.kinds()) >= {"moments", "context", "context_mask", "pooled", "caption", "json"}
    assert index["original_width"].tolist() == [200] * 5
    assert (index["width"][0], index["height"][0]) == (20, 30)
    np.testing.assert_array_equal(index["aesthetic"], [np.nan] * 4 + [6.5])
    raw = ShardReader(index, ("moments", "pooled", "caption"))(np.array([4, 2]))
    layouts = CacheFacts(**FACTS).layouts()
    assert layouts["pooled"].unpack(raw[0].parts["pooled"]).tolist() == [4.0] * 5
    assert layouts["moments"].unpack(raw[1].parts["moments"])[1].mean() == 2.25
    assert raw[0].parts["caption"] == b"picture 4"


def test_variants_take_turns(entry):
    """In any three epochs each sample shows all of its three variants; not all begin with the same."""
    raws = [Raw({kind.partition(".")[0]: v for kind, v in entry(i).items()}) for i in range(40)]
    stream = Stream([40], 8, 1, seed=3)
    maker = Moments(CacheFacts(**FACTS), True, 7, stream)
    n = np.arange(40 * 6)
    part, rows = maker.fields(n), stream.places(n)[-1]
    np.testing.assert_array_equal(stream.epochs(n), stream.places(n)[-2])
    for i, row in enumerate(rows.tolist()):
        maker.finish(part, i, maker.prepare(raws[row])[0])
    quarter = part["moments"][:, 0, 0, 0].float().numpy() - rows
    variant = (quarter * 4).round().astype(int)
    np.testing.assert_array_equal(part["crop"], np.stack([variant, rows], 1))
    shown = np.array([variant[rows == row] for row in range(40)])  # [samples, epochs]
    for first in range(4):
        assert (np.sort(shown[:, first : first + 3], 1) == [0, 1, 2]).all()
    assert set(shown[:, 0]) == {0, 1, 2}
    assert part["context"][5].unique().tolist() == [rows[5]]
    assert part["context_mask"].dtype == torch.bool
    assert part["target_size"].tolist() == [[16, 16]] * len(n)
    first = Moments(CacheFacts(**FACTS), False)
    part = first.fields(n[:1])
    first.finish(part, 0, first.prepare(raws[9])[0])
    assert part["moments"].unique().tolist() == [9.0]
    assert "context" not in part


def test_a_sample_with_a_bad_array_is_masked(folder, write, entry):
    bad = entry(9)
    bad["pooled.npy"] = bad["pooled.npy"][:-2]
    crops = [b'{"crop": [[0, 0]]}', b'{"crop": 3}', b'{"crop": [[0, 0], [0, 0], [0]]}', b"{}"]
    wrong = [entry(10 + i) | {"json": text} for i, text in enumerate(crops)]
    write("cache/00001.tar", [entry(4), bad, *wrong])
    data = CachedDataModule(str(folder), 16, global_batch_size=10)
    batch = next(iter(data.stream()))
    reasons = {key.split("/")[1]: reason for key, reason in zip(batch.key, batch.reason, strict=True)}
    wrong = dict.fromkeys([f"0000000{i}" for i in range(10, 14)], "bad_json")
    assert reasons == {f"{i:09d}": "" for i in range(5)} | {"000000009": "bad_pooled"} | wrong
    assert batch.weight.sum() == 5
    assert batch.context.shape == (10, 4, 6)
    assert batch.pooled.dtype == torch.float16


def test_workers_change_nothing(folder):
    found = []
    for workers in (0, 2):
        data = CachedDataModule(str(folder), 16, global_batch_size=4, num_workers=workers)
        found.append([batch for _, batch in zip(range(5), data.stream(), strict=False)])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one.moments, two.moments)
        assert torch.equal(one.crop, two.crop)
        assert one.caption == two.caption
    assert found[0][0].original_size.tolist() == [[300, 200]] * 4


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"complete": False}, "data.shards: .* is not complete .2 of 2 shards.; run the same ldm data cache"),
        ({"format_version": 9}, "has format_version 9, this program reads 1; update ldm"),
        ({"made_by": "ldm data pack"}, "was not made by ldm data cache; run ldm data cache OUT"),
        ({"variants": None}, "dataset.json is damaged"),
    ],
)
def test_what_is_no_whole_cache_is_refused(change, line, folder):
    facts = json.loads((folder / "dataset.json").read_bytes()) | change
    kept = {name: value for name, value in facts.items() if value is not None or name not in change}
    (folder / "dataset.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match=line):
        CachedDataModule(str(folder), 16, global_batch_size=4).setup()


def test_caches_made_alike_are_one_data_set(folder, write, entry, tmp_path):
    other = write("other/00000.tar", [entry(i) for i in range(7, 10)]).parent
    write("other/00001.tar", [entry(i) for i in range(10, 12)])
    (other / "dataset.json").write_text((folder / "dataset.json").read_text())
    data = CachedDataModule([str(folder), str(other)], 16, global_batch_size=4)
    data.setup()
    data.require("a" * 64, "c" * 64)
    assert data.known_size() == 10
    facts = json.loads((other / "dataset.json").read_bytes())
    (other / "dataset.json").write_text(json.dumps(facts | {"conditioner": "x"}))
    with pytest.raises(InputError, match="differ in conditioner; give caches alike"):
        CachedDataModule([str(folder), str(other)], 16, global_batch_size=4).setup()
    with pytest.raises(InputError, match="no cache given"):
        CachedDataModule([], 16, global_batch_size=4).setup()
    assert read_facts(folder, "x").shards == 2
