"""Folders to shards: what is taken, what is left out and named, and the bytes that come out."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from ldm.data.index import build_index
from ldm.data.pack import ShardWriter, made_once, pack
from ldm.data.sources import FolderDataModule
from ldm.errors import InputError


def picture(kind="JPEG", size=(20, 10), shade=100, mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, size, shade if mode in "LP" else (shade, 0, 255 - shade)[: len(mode)]).save(
        file, kind, **options
    )
    return file.getvalue()


def fill(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def unpack(shards):
    """{key: {extension: bytes}} of all shards."""
    samples = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return samples


@pytest.fixture
def folder(tmp_path):
    return fill(
        tmp_path / "in",
        {
            "b.jpg": picture(shade=1),
            "b.txt": " a second \n",
            "b.json": json.dumps({"aesthetic": 6.5, "width": 3}),
            "a.png": picture("PNG"),
            "a.txt": "\ufeffa first",
            "sub/deep/c.webp": picture("WEBP"),
            "sub/deep/c.txt": "a third",
            ".hidden.jpg": picture(),
        },
    )


def test_captions_beside_pictures(folder, tmp_path):
    report = pack(folder, tmp_path / "out", progress=False)
    samples = unpack(report.shards)
    assert report.samples == 3
    assert not report.left_out
    assert list(samples) == ["000000000", "000000001", "000000002"]
    assert [s["txt"].decode() for s in samples.values()] == ["a first", "a second", "a third"]
    assert samples["000000001"]["jpg"] == (folder / "b.jpg").read_bytes()
    assert samples["000000000"]["png"] == (folder / "a.png").read_bytes()
    assert samples["000000002"]["webp"] == (folder / "sub/deep/c.webp").read_bytes()
    assert json.loads(samples["000000001"]["json"]) == {
        "key": "000000001",
        "caption": "a second",
        "aesthetic": 6.5,
        "width": 20,
        "height": 10,
        "original_width": 20,
        "original_height": 10,
        "file_name": "b.jpg",
        "status": "success",
    }


def test_shards_are_cut_and_counted(folder, tmp_path):
    report = pack(folder, tmp_path / "out", samples_per_shard=2, progress=False)
    assert [shard.name for shard in report.shards] == ["00000.tar", "00001.tar"]
    assert list(unpack(report.shards)) == ["000000000", "000000001", "000010000"]
    stats = [json.loads((tmp_path / f"out/0000{i}_stats.json").read_text())["count"] for i in (0, 1)]
    assert stats == [2, 1]
    assert report.summary() == ["3 samples in 2 shards"]


def test_same_input_same_bytes(folder, tmp_path):
    one, two = (pack(folder, tmp_path / name, progress=False).shards[0].read_bytes() for name in "xy")
    assert one == two


def test_index_reads_what_was_packed(folder, tmp_path):
    pack(folder, tmp_path / "out", progress=False)
    index = build_index(str(tmp_path / "out"), progress=False)
    assert len(index) == 3
    assert index["width"].tolist() == [20, 20, 20]
    np.testing.assert_array_equal(index["aesthetic"], np.float32([np.nan, 6.5, np.nan]))


def test_table_of_captions(tmp_path):
    rows = [
        {"file_name": "z.jpg", "text": "comes first", "score": 1, "tags": ["a"]},
        {"file_name": "more/y.jpg", "text": "a second"},
        {"file_name": "gone.jpg", "text": "no such file"},
        {"file_name": "w.jpg", "text": None},
        {"text": "no name"},
        {"file_name": "z.jpg", "text": "half a pair \ud83c"},
        {"file_name": "../outside.jpg", "text": "not in the folder"},
    ]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n\nnot json\n"
    names = ("in/z.jpg", "in/more/y.jpg", "in/w.jpg", "in/unlisted.jpg", "outside.jpg")
    fill(tmp_path, {name: picture() for name in names} | {"in/metadata.jsonl": lines})
    report = pack(tmp_path / "in", tmp_path / "out", progress=False)
    facts = [json.loads(sample["json"]) for sample in unpack(report.shards).values()]
    assert [f["caption"] for f in facts] == ["comes first", "a second"]
    assert [f["file_name"] for f in facts] == ["z.jpg", "more/y.jpg"]
    assert facts[0]["score"] == 1
    assert facts[0]["tags"] == ["a"]
    assert report.left_out == {"bad_line": 3, "no_caption": 2, "no_image": 1, "bad_caption": 1}
    assert "bad_line: metadata.jsonl line 9" in report.named


def test_tables_in_subfolders(tmp_path):
    row = json.dumps({"file_name": "a.jpg", "text": "here"})
    fill(
        tmp_path / "in",
        {f"{n}/{f}": c for n in "xy" for f, c in [("a.jpg", picture()), ("metadata.jsonl", row)]},
    )
    report = pack(tmp_path / "in", tmp_path / "out", progress=False)
    assert [json.loads(s["json"])["file_name"] for s in unpack(report.shards).values()] == [
        "x/a.jpg",
        "y/a.jpg",
    ]
    assert not report.left_out


@pytest.mark.parametrize(
    ("kind", "suffix", "mode", "options"),
    [
        ("BMP", "bmp", "RGB", {}),
        ("TIFF", "tif", "RGB", {}),
        ("TIFF", "tiff", "CMYK", {}),
        ("GIF", "gif", "P", {}),
        ("PNG", "jpg", "RGB", {}),  # a wrong suffix
    ],
)
def test_other_formats_become_png(tmp_path, kind, suffix, mode, options):
    data = picture(kind, mode=mode, **options) if mode != "CMYK" else cmyk()
    fill(tmp_path / "in", {f"a.{suffix}": data, "a.txt": "a caption"})
    [sample] = unpack(pack(tmp_path / "in", tmp_path / "out", progress=False).shards).values()
    made, source = Image.open(io.BytesIO(sample["png"])), Image.open(io.BytesIO(data))
    assert made.size == (20, 10)
    assert np.array_equal(np.asarray(made.convert("RGB")), np.asarray(source.convert("RGB")))


def cmyk():
    file = io.BytesIO()
    Image.new("CMYK", (20, 10), (10, 200, 30, 40)).save(file, "TIFF")
    return file.getvalue()


def test_first_frame_and_transparency(tmp_path):
    frames = [Image.new("RGBA", (8, 8), (c, 0, 0, 0 if c == 9 else 255)) for c in (9, 200)]
    fill(tmp_path / "in", {"a.txt": "moving"})
    frames[0].save(tmp_path / "in/a.gif", save_all=True, append_images=frames[1:])
    [sample] = unpack(pack(tmp_path / "in", tmp_path / "out", progress=False).shards).values()
    made = Image.open(io.BytesIO(sample["png"]))
    assert made.mode == "RGBA"
    assert made.getpixel((4, 4))[3] == 0


def test_what_cannot_be_used_is_named(folder, tmp_path):
    fill(
        folder,
        {
            "d.jpg": b"not a picture",
            "d.txt": "x",
            "e.jpg": picture(size=(300, 300))[:-300],
            "e.txt": "x",
            "f.jpg": picture(),
            "g.jpg": picture(),
            "g.txt": " \n",
            "h.jpg": picture(),
            "h.txt": b"\xff\xfe\xfa",
            "i.jpg": picture(),
            "i.txt": "x",
            "i.json": "[1",
            "j.jpg": picture(),
            "j.txt": "word " * 30_000,
            "lonely.txt": "no picture",
            "README.md": "about",
        },
    )
    report = pack(folder, tmp_path / "out", progress=False)
    assert report.samples == 3
    assert sorted(report.named) == [
        "bad_caption: h.jpg",
        "bad_caption: j.jpg",
        "bad_json: i.jpg",
        "corrupt_image: e.jpg",
        "no_caption: f.jpg",
        "no_caption: g.jpg",
        "no_image: lonely.txt",
        "not_image: d.jpg",
        "other_file: README.md",
    ]
    assert report.left_out.total() == 9
    assert report.summary()[0].startswith("3 samples in 1 shards; left out: ")


def test_long_lists_are_cut(tmp_path):
    fill(tmp_path / "in", {"a.jpg": picture(), "a.txt": "x"} | {f"{i:02}.jpg": picture() for i in range(25)})
    assert pack(tmp_path / "in", tmp_path / "out", progress=False).summary()[-1] == "and 5 more"


def test_links_in_circles(folder, tmp_path):
    os.symlink(folder, folder / "sub" / "again")
    os.symlink(fill(tmp_path / "far", {"x.jpg": picture(), "x.txt": "far"}), folder / "linked")
    assert pack(folder, tmp_path / "out", progress=False).samples == 4


def test_progress_bar(folder, tmp_path, capsys):
    assert pack(folder, tmp_path / "out").samples == 3
    assert capsys.readouterr().out == ""


def test_packing_again_replaces_only_our_own(folder, tmp_path):
    out = tmp_path / "out"
    pack(folder, out, samples_per_shard=1, progress=False)
    assert len(pack(folder, out, progress=False).shards) == 1
    assert sorted(path.name for path in out.iterdir()) == ["00000.tar", "00000_stats.json", "dataset.json"]
    fill(tmp_path / "other", {"dataset.json": "{}", "00000.tar": b"precious"})
    with pytest.raises(InputError, match="is not empty, and was not made by ldm data pack; give"):
        pack(folder, tmp_path / "other", progress=False)
    assert (tmp_path / "other/00000.tar").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("files", "out", "options", "message"),
    [
        (None, "out", {}, "no such folder"),
        ({"a.jpg": picture()}, "out", {}, r"no picture with a caption in it \(no_caption 1\); put img.txt"),
        ({}, "out", {}, "it is empty"),
        ({"a.jpg": picture(), "a.txt": "x"}, "in/a.txt", {}, "is a file"),
        ({"a.jpg": picture(), "a.txt": "x"}, "out", {"samples_per_shard": 0}, "samples_per_shard=0"),
    ],
)
def test_wrong_input(tmp_path, files, out, options, message):
    if files is not None:
        fill(tmp_path / "in", files).mkdir(exist_ok=True)
    with pytest.raises(InputError, match=message):
        pack(tmp_path / "in", tmp_path / out, progress=False, **options)


def test_a_shard_is_there_only_when_complete(tmp_path):
    def interrupted():
        with ShardWriter(tmp_path, 2) as writer:
            for i in range(3):
                writer.write(picture(), "jpg", str(i), {})
            assert (tmp_path / "00001.tar.tmp").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "00000_stats.json"]


def test_made_once_keeps_the_first(tmp_path):
    target = tmp_path / "made"

    def slow(out):
        made_once(target, lambda folder: fill(folder, {"who": "fast"}))
        fill(out, {"who": "slow"})

    assert (made_once(target, slow) / "who").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_made_once_leaves_nothing_of_a_failure(tmp_path):
    def fail(out):
        fill(out, {"half": "done"})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_once(tmp_path / "made", fail)
    assert not list(tmp_path.iterdir())


def test_data_module(folder, tmp_path):
    def captions(**options):
        data = FolderDataModule(str(folder), image_size=8, global_batch_size=3, **options)
        return sorted(next(iter(data.train_dataloader())).caption)

    assert captions() == ["a first", "a second", "a third"]
    assert captions() == ["a first", "a second", "a third"]
    assert len(list((tmp_path / "in.shards").iterdir())) == 1
    (folder / "b.txt").write_text("something else")
    assert captions() == ["a first", "a third", "something else"]
    assert captions(cache_dir=str(tmp_path / "elsewhere"))[0] == "a first"
    with pytest.raises(InputError, match="data.folder=.*: no such folder"):
        FolderDataModule(str(tmp_path / "none"), image_size=8, global_batch_size=3).setup()
