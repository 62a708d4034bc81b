"""All emoji from vectors: what they show, and which background is put behind them when."""

import io
import json
import tarfile
from importlib import metadata
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli import main
from ldm.data.emoji import BACKGROUNDS, EmojiSet
from ldm.data.emoji_svg import OnBackgrounds, SvgEmojiSet
from ldm.data.reader import Raw
from ldm.data.sources import SvgEmojiDataModule
from ldm.errors import InputError

OBJECTS, COLOURS = 9, 4


@pytest.fixture(scope="module")
def everything():
    return SvgEmojiSet()


@pytest.fixture(scope="module")
def small():
    return SvgEmojiSet(32, OBJECTS, COLOURS, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emoji")


@pytest.fixture
def module(folder):
    def make(global_batch_size=6, **options):
        options = {"multiprocessing_context": "fork", "memory_cache_mb": 8, "seed": 5} | options
        return SvgEmojiDataModule(
            str(folder), 32, OBJECTS, COLOURS, 3, global_batch_size=global_batch_size, **options
        )

    return make


def seen(batches):
    """n -> caption and picture."""
    found = {}
    for batch in batches:
        assert batch.weight.tolist() == [1.0] * len(batch)
        for i, n in enumerate(batch.n.tolist()):
            assert n not in found
            found[n] = (batch.caption[i], batch.image[i].numpy().tobytes())
    return found


# ---- what there is


def test_all_base_emoji_have_names_of_their_own(everything):
    names = everything.objects
    assert len(set(names)) == len(names) > 1850
    assert names[:135] == EmojiSet().objects
    assert all(name.isascii() and name == name.lower() and "skin tone" not in name for name in names)
    assert {
        "flag of cote d'ivoire",
        "pinata",
        "keycap #",
        "chequered flag",
        "flag of france",
        "clock at six-thirty",
    } <= set(names)
    assert len({path.read_bytes() for path in everything.files}) == len(names)  # no two look the same


def test_pictures_are_whole(everything):
    for i in range(0, len(everything.objects), 20):
        sprite = everything.sprites[i]
        assert (sprite.mode, sprite.size) == ("RGBA", (128, 128))
        left, top, right, bottom = sprite.getbbox()
        assert min(left, top) >= 8
        assert max(right, bottom) <= 120
        assert max(right - left, bottom - top) > 50
    png, svg = EmojiSet(image_size=64), SvgEmojiSet(image_size=64, num_objects=135)
    for i in range(135):  # the same drawing at 72 px, resized
        difference = png.picture(i, 4).astype(float) - svg.picture(i, 4)
        assert np.sqrt((difference**2).mean()) < 12, png.objects[i]


def test_shards_hold_objects_alone_and_held_out_pairs_flat(small, folder):
    train, held_out = small.prepare(folder)
    assert len(held_out) == 1
    found = {}
    for shard in train:
        with tarfile.open(shard) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        for name in (n for n in members if n.endswith(".json")):
            facts, key = json.loads(members[name]), name.removesuffix(".json")
            sprite = Image.open(io.BytesIO(members[f"{key}.png"]))
            i = facts["object_index"]
            assert sprite.mode == "RGBA"
            assert np.array_equal(np.asarray(sprite), np.asarray(small.sprites[i]))
            assert members[f"{key}.txt"].decode() == small.objects[i]
            found[i] = facts["held_out"]
    assert [found[i] for i in range(OBJECTS)] == [small.backgrounds[j] for _, j in small.held_out]
    assert "CC-BY 4.0" in (train[0].parents[1] / "LICENSE-twemoji.txt").read_text()


# ---- backgrounds


def test_a_picture_is_what_pasting_gives(small):
    maker = OnBackgrounds(small, seed=0)
    for i, held_out in small.held_out:
        file = io.BytesIO()
        small.sprites[i].save(file, "PNG")
        prepared, size = maker.prepare(Raw({"image": file.getvalue(), "caption": small.objects[i].encode()}))
        assert size == 32 * 32 * 4
        part = maker.fields(np.arange(40)) | {"caption": [small.objects[i]] * 40}
        drawn = set()
        for n in range(40):
            maker.finish(part, n, prepared)
            (j,) = (j for j in range(COLOURS) if part["caption"][n] == small.caption(i, j))
            canvas = Image.new("RGBA", (32, 32), BACKGROUNDS[small.backgrounds[j]])
            canvas.alpha_composite(small.sprites[i])  # not how it is made
            exact = np.asarray(canvas.convert("RGB")).astype(int)
            assert np.abs(part["image"][n].permute(1, 2, 0).numpy() - exact).max() <= 1
            drawn.add(j)
        assert drawn == set(range(COLOURS)) - {held_out}


def test_held_out_pairs_never_come_and_captions_fit(module, small):
    captions = {small.caption(i, j): (i, j) for i in range(OBJECTS) for j in range(COLOURS)}
    counts = np.zeros((OBJECTS, COLOURS), int)
    for caption, image in seen(islice(module(9).stream(), 60)).values():
        i, j = captions[caption]
        counts[i, j] += 1
        picture = np.frombuffer(image, np.uint8).reshape(3, 32, 32).transpose(1, 2, 0)
        assert np.array_equal(picture, small.picture(i, j))
    assert (counts.sum(1) == 60).all()  # each object once an epoch
    held_out = np.zeros_like(counts, bool)
    held_out[tuple(np.array(small.held_out).T)] = True
    assert (counts[held_out] == 0).all()
    assert counts[~held_out].min() > 8  # of 20 on average


def test_validation_is_the_held_out_pairs(module, small):
    batches = list(module(validation_batch_size=OBJECTS).validation_stream())
    assert [caption for batch in batches for caption in batch.caption] == [
        small.caption(*p) for p in small.held_out
    ]
    for image, pair in zip(batches[0].image, small.held_out, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), small.picture(*pair))


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (2, 1), (3, 2)])
def test_ranks_and_workers_change_nothing(module, world_size, workers):
    whole = seen(islice(module().stream(), 8))
    parts = {}
    for rank in range(world_size):
        parts |= seen(islice(module().stream(rank, world_size, num_workers=workers), 8))
    assert parts == whole


def test_a_resumed_run_goes_on_with_the_same_backgrounds(module):
    whole, data = seen(islice(module().stream(), 9)), module()
    data.check_state(module().state(5 * 6))
    data.resume_at(5 * 6)
    assert seen(islice(data.train_dataloader(), 4)) == {n: one for n, one in whole.items() if n >= 30}
    other = seen(islice(module(seed=6).stream(), 9))
    assert [one[0] for one in other.values()] != [one[0] for one in whole.values()]


def test_an_epoch_is_every_object_once(module):
    assert module().known_size() == OBJECTS
    assert module(limit=5).known_size() == 5


# ---- what is refused


def test_without_the_renderer(monkeypatch):
    def version(name):
        if name == "resvg_py":
            raise metadata.PackageNotFoundError(name)
        return "0"

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(
        InputError, match=r'^data: .* needs the package resvg_py; pip install -e "\.\[emoji\]"$'
    ):
        SvgEmojiSet()


def test_its_latents_are_not_cached(tmp_path, capsys):
    argv = ["data", "cache", str(tmp_path / "out"), "experiment=emoji_diffusion", "data.num_objects=4"]
    with pytest.raises(SystemExit, match="2"):
        main([*argv, f"data.cache_dir={tmp_path}"])
    assert "data=emoji_svg: puts another background" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_picture_is_masked(small):
    maker = OnBackgrounds(small, 0)
    with pytest.raises(ValueError, match="corrupt_image"):
        maker.prepare(Raw({"image": b"\x89PNG", "caption": b"red apple"}))
    assert maker.fields(np.arange(0))["image"].shape == torch.Size([0, 3, 32, 32])
