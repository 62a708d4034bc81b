"""The quickstart's pictures: what they show, what is held out, and their shards."""

import json
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ldm.data.emoji import BACKGROUNDS, EmojiSet
from ldm.data.sources import EmojiDataModule
from ldm.errors import InputError


@pytest.fixture(scope="module")
def emoji():
    return EmojiSet()


@pytest.fixture(scope="module")
def small():
    return EmojiSet(image_size=32, num_objects=9, num_backgrounds=4, seed=3)


def test_objects_and_captions(emoji):
    assert len(set(emoji.objects)) == 135
    assert emoji.caption(emoji.objects.index("red apple"), 4) == "red apple on a blue background"
    assert emoji.caption(emoji.objects.index("hot dog"), 1) == "hot dog on an orange background"
    assert all(name == name.lower() and name.replace(" ", "").isalpha() for name in emoji.objects)


def test_more_objects_than_food(emoji):
    more = EmojiSet(num_objects=400)
    assert len(set(more.objects)) == 400
    assert more.objects[:135] == emoji.objects


def test_border_is_background_and_middle_is_object(emoji):
    for i in range(135):
        for j in (i % 8, (i + 3) % 8):
            picture = emoji.picture(i, j)
            assert picture.shape == (64, 64, 3)
            assert picture.dtype == np.uint8
            border = np.concatenate([picture[:3], picture[-3:], picture[:, :3], picture[:, -3:]], axis=None)
            assert (border.reshape(-1, 3) == emoji.colours[j]).all()
            assert (picture != emoji.colours[j]).any(axis=2).mean() > 0.1


def test_every_object_shows_on_every_background(emoji):
    for j, colour in enumerate(emoji.colours.astype(float)):
        for i in range(135):
            difference = emoji.picture(i, j).astype(float) - colour
            shown = np.abs(difference).max(axis=2) > 0
            assert np.sqrt((difference[shown] ** 2).mean()) > 15, (emoji.objects[i], emoji.backgrounds[j])


def test_objects_differ(emoji):
    pictures = np.stack([emoji.picture(i, 4) for i in range(135)]).reshape(135, -1).astype(np.float32)
    distances = torch.cdist(torch.from_numpy(pictures), torch.from_numpy(pictures))
    distances += torch.eye(135) * 1e9
    assert distances.min() / pictures.shape[1] ** 0.5 > 5  # levels of 255, root mean square


def test_backgrounds_are_far_apart():
    colours = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)
    distances = torch.cdist(colours, colours) + torch.eye(len(colours)) * 1e9
    assert len(colours) == 8
    assert distances.min() > 100


def test_held_out_pairs_are_balanced_and_disjoint(emoji):
    assert [i for i, _ in emoji.held_out] == list(range(135))
    counts = np.bincount([j for _, j in emoji.held_out], minlength=8)
    assert sorted(counts) == [16] + [17] * 7
    assert len(emoji.train_pairs) == 135 * 7
    assert not set(emoji.train_pairs) & set(emoji.held_out)
    assert len(set(emoji.train_pairs) | set(emoji.held_out)) == 135 * 8


def test_held_out_pairs_depend_on_the_seed_alone(emoji):
    assert EmojiSet(seed=0).held_out == emoji.held_out
    assert EmojiSet(seed=1).held_out != emoji.held_out
    assert [j for _, j in emoji.held_out[:12]] == [2, 5, 7, 1, 2, 5, 2, 1, 3, 5, 3, 1]  # golden


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_objects": 5000}, "data.num_objects=5000: expected 1 to "),
        ({"num_backgrounds": 9}, "data.num_backgrounds=9: expected 2 to 8"),
        ({"image_size": 8}, "data.image_size=8"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        EmojiSet(**options)


def test_shards_hold_the_pairs(small, tmp_path):
    train, held_out = small.prepare(tmp_path)
    assert [len(train), len(held_out)] == [4, 1]
    for shards, pairs in [(train, small.train_pairs), (held_out, small.held_out)]:
        found = []
        for shard in shards:
            with tarfile.open(shard) as tar:
                members = {m.name: tar.extractfile(m).read() for m in tar}
            for name in (n for n in members if n.endswith(".json")):
                facts, key = json.loads(members[name]), name.removesuffix(".json")
                pair = (facts["object_index"], facts["background_index"])
                found.append(pair)
                assert members[f"{key}.txt"].decode() == facts["caption"] == small.caption(*pair)
                assert (facts["object"], facts["background"]) == (
                    small.objects[pair[0]],
                    small.backgrounds[pair[1]],
                )
                assert facts["width"] == facts["original_height"] == 32
                assert facts["licence"] == "CC-BY-4.0"
                assert members[f"{key}.png"].startswith(b"\x89PNG")
        assert sorted(found) == sorted(pairs)
    assert "CC-BY 4.0" in (train[0].parents[1] / "LICENSE-twemoji.txt").read_text()


def test_packed_once_for_the_same_settings(small, tmp_path):
    first = small.prepare(tmp_path)
    before = first[0][0].stat().st_mtime_ns
    assert small.prepare(tmp_path) == first
    assert first[0][0].stat().st_mtime_ns == before
    other = EmojiSet(image_size=32, num_objects=9, num_backgrounds=4, seed=4).prepare(tmp_path)
    assert other[0][0].parent != first[0][0].parent
    assert len(list(tmp_path.iterdir())) == 2
    first[1][0].unlink()
    with pytest.raises(InputError, match="data.cache_dir: .*00000.tar is gone; delete"):
        small.prepare(tmp_path)


def test_several_at_once_do_not_clash(small, tmp_path):
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(small.prepare, [tmp_path] * 6))
    assert all(result == results[0] for result in results)
    assert [path.name for path in tmp_path.iterdir()] == [results[0][0][0].parents[1].name]


def test_folder_that_cannot_be_written(small, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="data.cache_dir: cannot make .*; name a folder"):
        small.prepare(tmp_path / "file")


def test_data_module(small, tmp_path):
    data = EmojiDataModule(
        str(tmp_path), image_size=32, num_objects=9, num_backgrounds=4, held_out_seed=3, global_batch_size=6
    )
    data.prepare_data()
    batch = next(iter(data.train_dataloader()))
    captions = {small.caption(*pair): pair for pair in small.train_pairs}
    for image, caption in zip(batch.image, batch.caption, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), small.picture(*captions[caption]))
    held_out = [caption for batch in data.val_dataloader() for caption in batch.caption]
    assert held_out[:9] == [small.caption(*pair) for pair in small.held_out]
