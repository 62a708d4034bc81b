"""A cache of pictures of several shapes: sorted by bucket on disk, one shape a step in training."""

import io

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

import train
from ldm.config import build, compose
from ldm.data import cache as cache_module
from ldm.data.cache import Members
from ldm.data.cached import CachedDataModule, read_facts
from ldm.data.filters import MinSize
from ldm.data.index import build_index
from ldm.data.shapes import Numbers, Sorted
from ldm.errors import InputError
from ldm.training import precompute
from ldm.training.module import to_unit
from tests.training.test_cached import FROZEN, cache, from_cache, without

SIZES = [(48, 48), (64, 32), (40, 80), (50, 46)]  # their buckets: 24 x 24, 32 x 16, 16 x 32
BUCKETS = "data.buckets={resolutions:[24],step:8,min_share:0.01,period:64}"
BATCH = 4


@pytest.fixture(scope="module")
def made(stage2, tmp_path_factory):
    """A cache of 48 pictures in three buckets, and the command line that made it."""
    root, rng = tmp_path_factory.mktemp("buckets"), np.random.default_rng(0)
    for shard in range(2):
        (root / "pictures").mkdir(exist_ok=True)
        with wds.TarWriter(str(root / f"pictures/{shard:05d}.tar")) as tar:
            for number in range(24 * shard, 24 * shard + 24):
                width, height = SIZES[rng.choice(4, p=[0.4, 0.3, 0.2, 0.1])]
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(buffer, "PNG")
                tar.write({"__key__": f"{number:09d}", "png": buffer.getvalue(), "txt": f"number {number}"})
    dropped = ("conditioner.", "conditioner=", "data.shards=", "data.validation", "data.filters")
    argv = [*without(stage2, *dropped), *FROZEN, f"data.shards={root}/pictures", BUCKETS, "data.crop=random"]
    argv += [
        "data.filters=[]",
        f"data.global_batch_size={BATCH}",
        "data.image_size=24",
        f"run_root={root}",
        "run_name=pictures",
    ]
    flags = ["--dtype", "fp32", "--samples-per-shard", "10", "--batch-size", "4", "--device", "cpu"]
    assert cache(root / "cache", argv, *flags) == 0
    return root / "cache", argv, flags


def test_it_is_sorted_by_bucket(made):
    out, _, _ = made
    facts = read_facts(out, "x")
    assert facts.sides == [(32, 16), (24, 24), (16, 32)]
    assert sum(count for *_, count in facts.buckets) == 48
    counts = [build_index(str(out / part)).counts.tolist() for part in facts.parts]
    assert facts.parts == ["16x32", "24x24", "32x16"]
    assert [sum(own) for own in counts] == [count for *_, count in facts.buckets]
    assert sum(counts, []) == [end - first for _, first, end in facts.spans().tolist()]


def test_batches_hold_the_moments_of_the_pictures(made):
    """Those of each sample's own crop in its own bucket; every rank has one shape; all are seen in a pass."""
    out, argv, _ = made
    cfg = compose("train", argv)
    module, data = precompute.opened(cfg, text=False), build(cfg.data)
    data.setup()
    parts = {}  # what was encoded, by caption
    folder = cache_module.CacheFolder(out, read_facts(out, "x"))
    chunks = cache_module.Chunks(range(len(folder.spans)), folder.spans, 5, Members(data.sorted))
    for part in cache_module.pictures(data, chunks, 1):
        for i, words in enumerate(part["words"]):
            parts[words.decode()] = part["variants"][0]["image"][i], part["variants"][0]["crop"][i]
    assert len(parts) == len(chunks) == 48
    cached = CachedDataModule(
        str(out), 24, global_batch_size=BATCH, num_workers=0, buckets={"step": 8, "period": 64}
    )
    ranks = [cached.stream(rank, 2) for rank in range(2)]
    seen, shapes = set(), set()
    for _, *batches in zip(range(200), *ranks, strict=False):
        sides = {tuple(batch.moments.shape[2:]) for batch in batches}
        assert len(sides) == 1
        shapes |= sides
        for batch in batches:
            assert batch.weight.all()
            assert (batch.target_size // 4).tolist() == [list(*sides)] * len(batch)
            for i, caption in enumerate(batch.caption):
                image, crop = parts[caption]
                with torch.no_grad():
                    expected = module.autoencoder.moments(to_unit(image[None], torch.float32))[0]
                torch.testing.assert_close(batch.moments[i], expected, rtol=0, atol=1e-5)
                assert batch.crop[i].tolist() == crop.tolist()
                seen.add(caption)
    assert len(seen) == 48
    assert shapes == {(8, 4), (6, 6), (4, 8)}


def test_variants_are_cut_in_the_bucket_of_their_picture(made):
    out, argv, _ = made
    data = build(compose("train", argv).data)
    data.setup()
    spans, sides = read_facts(out, "x").spans(), read_facts(out, "x").sides
    chunks = cache_module.Chunks(range(len(spans)), spans, 5, Members(data.sorted))
    differ = 0
    for batch, part in zip(chunks.batches(), cache_module.pictures(data, chunks, 3), strict=True):
        own = [variant["image"] for variant in part["variants"]]
        assert {tuple(images.shape[2:]) for images in own} == {sides[spans[batch.chunk, 0]]}
        differ += sum(not own[0][i].equal(own[1][i]) for i in range(len(batch.n)))
    assert differ > 0


def test_world_and_workers_change_nothing_after_a_resume(made):
    out, _, _ = made
    first, data = (CachedDataModule(str(out), 24, global_batch_size=BATCH) for _ in range(2))
    whole = [batch for _, batch in zip(range(30), first.stream(), strict=False)]
    data.check_state(first.state(5 * BATCH))
    ranks = [data.stream(rank, 2, 5 * BATCH, num_workers=workers) for rank, workers in enumerate((0, 2))]
    for expected, *parts in zip(whole[5:], *ranks, strict=False):
        assert torch.cat([part.moments for part in parts]).equal(expected.moments)
        assert [caption for part in parts for caption in part.caption] == expected.caption
        assert torch.cat([part.crop for part in parts]).equal(expected.crop)


def test_a_run_trains_on_it_and_resumes(made, tmp_path):
    out, argv, _ = made
    words = [*from_cache(argv, out), f"run_root={tmp_path}"]
    assert train.command([*words, "trainer.max_steps=3"]) == 0
    assert train.command([*words, "trainer.max_steps=6"]) == 0
    rows = (tmp_path / "cached/metrics.csv").read_text().splitlines()
    assert rows[-1].startswith("6,")


def test_the_bytes_do_not_depend_on_who_made_it(made, tmp_path):
    out, argv, flags = made
    for task in (1, 0):
        assert cache(tmp_path / "out", argv, *flags, "--task", f"{task}/2") == 0
    for path in out.rglob("*.tar"):
        assert (tmp_path / "out" / path.relative_to(out)).read_bytes() == path.read_bytes()


def test_members_are_found_piece_by_piece(monkeypatch):
    monkeypatch.setattr(cache_module, "CHUNK", 7)
    rng = np.random.default_rng(0)
    numbers, final = rng.integers(0, 4, 100).astype(np.uint8), np.array([0, 2, 1, 2, *[0] * 252], np.uint8)
    found = Sorted(np.zeros((3, 2), np.int64), [Numbers(numbers)], final, np.zeros(3), np.zeros(3), [])
    members = Members(found)
    for bucket in range(3):
        expected = np.flatnonzero(final[numbers] == bucket)
        for first in range(len(expected)):
            for end in (first + 1, min(first + 9, len(expected)), len(expected)):
                assert members(bucket, first, end).tolist() == expected[first:end].tolist()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"buckets": {"resolutions": [32], "step": 8}},
            "data.buckets: the cache has pictures of 16 x 32",
        ),
        (
            {"validation_fraction": 0.2},
            "data.validation_filters: samples of several shapes are",
        ),
        ({"validation_shards": "OUT"}, "data.validation_shards: samples of several shapes are"),
        ({"mix": [{"shards": "OUT"}]}, "data.mix: caches have no such option"),
    ],
)
def test_what_does_not_fit_is_refused(options, line, made):
    out, _, _ = made
    given = {name: str(out) if value == "OUT" else value for name, value in options.items()}
    with pytest.raises(InputError, match=line):
        CachedDataModule(str(out), 24, global_batch_size=BATCH, **given).setup()


def test_squares_have_no_buckets(made, tmp_path):
    out, argv, flags = made
    words = [*without(argv, "data.buckets="), "data.limit=6"]
    assert cache(tmp_path / "squares", words, *flags) == 0
    with pytest.raises(InputError, match="the pictures of the cache are squares; set data.buckets=null"):
        CachedDataModule(str(tmp_path / "squares"), 24, global_batch_size=BATCH, buckets={"step": 8}).setup()
    with pytest.raises(InputError, match="differ in buckets; give caches alike"):
        CachedDataModule([str(out), str(tmp_path / "squares")], 24, global_batch_size=BATCH).setup()


def test_sides_that_the_autoencoder_cannot_halve(made, tmp_path, capsys):
    _, argv, flags = made
    words = [*without(argv, "data.buckets="), "data.buckets={resolutions:[24],step:6}"]
    with pytest.raises(SystemExit) as stop:
        cache(tmp_path / "out", words, *flags)
    assert stop.value.code == 2
    assert "data.buckets.step: the autoencoder divides by 4, a side is " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_bucket_that_does_not_fill_half_a_batch_is_named(made, caplog):
    out, _, _ = made
    data = CachedDataModule(str(out), 24, global_batch_size=BATCH)
    data.prepare_data()
    assert caplog.messages == []
    sizes = {source.name: len(source) for source in data.sources}
    batch = 3 * min(sizes.values())
    CachedDataModule(str(out), 24, global_batch_size=batch).prepare_data()
    expected = {name: size for name, size in sizes.items() if size < batch / 2}
    assert 0 < len(expected) < len(sizes)
    few = f"pictures, fewer than half a batch of {batch}: a pass plays each"
    lines = [f"bucket {name}: {size:,} {few} {batch / size:.1f} times" for name, size in expected.items()]
    assert caplog.messages == lines


def test_a_bucket_of_which_filters_leave_nothing(made):
    out, _, _ = made
    data = CachedDataModule(str(out), 24, global_batch_size=BATCH, filters=[MinSize(48)])
    batches = [batch for _, batch in zip(range(9), data.stream(), strict=False)]
    assert {tuple(batch.moments.shape[2:]) for batch in batches} == {(6, 6)}
    assert [source.name for source in data.sources] == ["24 x 24"]
    with pytest.raises(InputError, match="data.filters: filter keeps 0 of"):
        CachedDataModule(str(out), 24, global_batch_size=BATCH, filters=[MinSize(99)]).setup()
