"""Buckets from tars to batches: 5,000 pictures of many shapes, all workers of a world in one process."""

import io
import json
from itertools import islice

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from ldm.data.blocks import BlockReader, InOrder, Reads
from ldm.data.datamodule import ShardDataModule
from ldm.data.loader import Share
from ldm.data.reader import ShardReader

BATCH = 64
SIZES = [(48, 48), (64, 48), (48, 64), (72, 48), (48, 72), (80, 45), (45, 80), (100, 40), (24, 24), (52, 47)]
SHARE = [0.3, 0.15, 0.1, 0.15, 0.1, 0.08, 0.05, 0.002, 0.05, 0.018]
SETTINGS = {"resolutions": [16, 32], "step": 4, "max_ratio": 2.0, "period": 512}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Folder of 5,000 pictures in five tars; each one's colour tells its number."""
    folder, rng = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    kinds = rng.choice(len(SIZES), 5000, p=np.array(SHARE) / sum(SHARE))
    for shard in range(5):
        with wds.TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
            for number in range(1000 * shard, 1000 * shard + 1000):
                width, height = SIZES[kinds[number]]
                buffer, colour = io.BytesIO(), (number % 256, number // 256, 7)
                Image.new("RGB", (width, height), colour).save(buffer, "PNG")
                meta = {"original_width": 4 * width, "original_height": 4 * height}
                sample = {"png": buffer.getvalue(), "txt": f"{number}", "json": json.dumps(meta).encode()}
                tar.write({"__key__": f"{number:09d}", **sample})
    return folder


def module(folder, **options):
    settings = {"seed": 1, "crop": "random", "flip": 0.5, "buckets": SETTINGS}
    return ShardDataModule(str(folder), 32, BATCH, **settings | options)


def take(stream, count):
    return list(islice(stream, count))


def test_batches_of_one_shape_on_every_rank(mixed):
    data = module(mixed)
    ranks = [take(data.stream(rank, 2, accumulate=2), 24) for rank in range(2)]
    shapes = set()
    for step in range(0, 24, 2):
        batches = [batch for mine in ranks for batch in mine[step : step + 2]]
        sizes = {tuple(batch.image.shape[2:]) for batch in batches}
        assert len(sizes) == 1
        shapes |= sizes
        for batch in batches:
            assert batch.weight.all()
            assert {tuple(size) for size in batch.target_size.tolist()} == sizes
            numbers = batch.image[:, 0, 2, 2].int() + 256 * batch.image[:, 1, 2, 2].int()
            assert numbers.tolist() == [int(caption) for caption in batch.caption]
            height, width = batch.original_size.T.numpy() / 4
            target = batch.target_size.numpy()
            scale = np.maximum(target[:, 0] / height, target[:, 1] / width)
            room = np.stack([height * scale - target[:, 0], width * scale - target[:, 1]], 1)
            assert (batch.crop.numpy() >= 0).all()
            assert (batch.crop.numpy() <= room + 1).all()
    assert len(shapes) > 3


def test_resumed_in_the_middle_of_a_period_on_another_world(mixed):
    whole = take(module(mixed).stream(), 9)
    state = module(mixed).state(5 * BATCH)
    data = module(mixed)
    data.check_state(state)
    data.resume_at(state["samples"])
    ranks = [take(data.stream(rank, 4, start=data.start, accumulate=2), 8) for rank in range(4)]
    for step, expected in enumerate(whole[5:]):
        parts = [batch for mine in ranks for batch in mine[2 * step : 2 * step + 2]]
        for name in ("n", "image", "crop", "target_size", "weight"):
            assert torch.cat([getattr(part, name) for part in parts]).equal(getattr(expected, name))
        assert [key for part in parts for key in part.key] == expected.key


def test_a_pass_over_the_pictures(mixed):
    """Each once in a pass, but for the stated share; over a period nothing is never seen."""
    data = module(mixed)
    plan = data.plan()
    left_out = (plan.count - 1) / plan.period
    at = plan.places(np.arange(plan.steps * BATCH))
    epochs = plan.size // 5000
    assert at.place.size == round((1 - left_out) * plan.size)
    seen = [len(np.unique(at.place[at.epoch == epoch])) for epoch in range(epochs)]
    assert [int((at.epoch == epoch).sum()) for epoch in range(epochs)] == seen  # no sample twice in a pass
    assert sum(seen) > 0.98 * epochs * 5000
    assert np.mean(seen[:-1]) > 0.99 * 5000
    assert len(np.unique(at.place)) == 5000


def test_what_the_log_says(mixed, caplog):
    lines = module(mixed).summary()
    text = "\n".join(lines)
    print(text)  # with -s: what a user sees
    assert "bucket (w x h)" in text
    assert "32 x 32" in text
    assert "of a picture cropped away on average" in lines[-2]
    assert "of samples left out of a pass" in lines[-2]
    few = module(mixed, buckets=SETTINGS | {"min_share": 0.0, "period": 64}, limit=100)
    few.summary()
    merged = module(mixed, buckets=SETTINGS | {"min_share": 0.1}).summary()
    assert any(
        " samples of 28 x 36 go to " in line or " samples of 16 x 16 go to " in line for line in merged
    )
    assert "% of samples are left out of a pass: raise data.buckets.period to" in caplog.text
    assert "samples: a batch of 64 repeats each of them" in caplog.text


def test_numbers_are_kept_beside_the_index(mixed):
    data = module(mixed)
    data.setup()
    path = data.sorted.numbers[0].path
    assert path.parent == data.sources[0].index.path.parent
    before = path.stat().st_mtime_ns
    module(mixed).setup()
    assert path.stat().st_mtime_ns == before
    assert len(data.sorted.numbers[0].array) == 5000


def test_other_buckets_are_another_plan(mixed):
    state = module(mixed).state(0)
    for options in (SETTINGS | {"period": 1024}, SETTINGS | {"max_ratio": 1.5}, None):
        with pytest.raises(ValueError, match="checkpoint has buckets"):
            module(mixed, buckets=options).check_state(state)


def test_a_window_is_leapt_over(mixed):
    data = module(mixed)
    data.skip = [(2 * BATCH, 5 * BATCH)]
    batches = take(data.stream(), 4)
    assert [int(batch.n[0]) // BATCH for batch in batches] == [0, 1, 5, 6]
    whole = take(module(mixed).stream(), 7)
    for batch, expected in zip(batches, (whole[0], whole[1], whole[5], whole[6]), strict=True):
        assert batch.image.equal(expected.image)
        assert batch.key == expected.key


def world(data, batch, ranks, workers, steps, jump=None, budget=1 << 30):
    """All samples that the workers of a world read, by place, and what that took."""
    data.setup()
    plan = data.plan()
    order = plan if data.buckets else InOrder(plan, batch)
    readers, got = [], {}
    for rank in range(ranks):
        share = Share(batch, rank, ranks, 1, workers)
        for worker in range(workers):
            reads = Reads(data.sources, [ShardReader(data.sources[0].index)])
            blocks = BlockReader(reads, order, share.slots(0, worker), budget)
            readers.append((blocks, reads.readers[0], np.array(share.slots(0, worker))))
    held = 0
    for step in range(steps):
        step += 0 if jump is None or step < jump[0] else jump[1]
        for blocks, _, slots in readers:
            n = step * batch + slots
            for place, ticket in zip(n.tolist(), blocks(n), strict=True):
                got[place] = ticket.take().parts["caption"]
            held = max(held, blocks.bytes)
            assert blocks.bytes == sum(ticket.nbytes for ticket in blocks.held.values())
    came = sum(blocks.bytes_read - blocks.bytes for blocks, *_ in readers)  # less what is still to be played
    waste = came / sum(blocks.bytes_used for blocks, *_ in readers)
    return got, waste, sum(reader.reads for _, reader, _ in readers) / len(got), held


@pytest.mark.parametrize("buckets", [None, SETTINGS])
@pytest.mark.parametrize("jump", [None, (9, 7)])
def test_blocks_are_read_once_and_held_bytes_are_bounded(mixed, buckets, jump):
    data = module(mixed, buckets=buckets)
    data.global_batch_size, data.constants = BATCH, (BATCH, 4)
    assert (data.plan().base if buckets else data.plan()).block == 4
    steps = 24
    expected, waste, reads, held = world(data, BATCH, 1, 1, steps, jump)
    sizes = data.sources[0].index.mean_bytes * BATCH * 4
    print(
        f"1 x 1: {waste:.2f} bytes read / used, {reads:.2f} reads a sample, {held / sizes:.2f} blocks a lane"
    )
    assert held < (4 if buckets else 1.5) * sizes
    assert reads < 0.45
    places = data.plan().places(np.array(list(expected))).place.tolist()
    assert expected == {n: f"{place}".encode() for n, place in zip(expected, places, strict=True)}
    found, waste, reads, held = world(data, BATCH, 2, 2, steps, jump)
    print(
        f"2 x 2: {waste:.2f} bytes read / used, {reads:.2f} reads a sample, {held / sizes:.2f} blocks a lane"
    )
    assert found == expected
    if not buckets and not jump:
        assert waste < 1.1
    found, _, single, held = world(data, BATCH, 2, 2, steps, jump, budget=int(sizes / 8))
    assert found == expected
    assert held < sizes / 2
    assert single > reads
