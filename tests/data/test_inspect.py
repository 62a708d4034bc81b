"""`ldm data inspect`: counts by hand, a page that loads nothing and believes no caption."""

import base64
import io
import json
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ldm import cli
from ldm.data.filters import CaptionLength, MaxValue, MinSize, MinValue
from ldm.data.index import build_index
from ldm.data.inspect import examine
from ldm.data.inspect_page import bytes_text, dataset_name, number, page, share
from ldm.data.remote import public

EVIL = '<script>alert("x")</script><img src=http://x/ onerror=alert(1)>\'"&amp;'


@pytest.fixture
def damaged(write, sample, picture):
    """40 samples with scores in two shards that share two keys; one is no picture, one has no caption."""
    first = [sample(i, width=16 + i, aesthetic=float(i), punsafe=0.25) for i in range(25)]
    first[3]["png"] = b"<html>404</html>"
    del first[4]["txt"]
    first[5]["png"] = picture(21, 12, 5)[:-30]  # the header is good, the rest is not
    second = [sample(i, width=12, aesthetic=float(i)) for i in range(23, 38)]
    write("set/00000.tar", first)
    return write("set/00001.tar", second).parent


class Shapes:
    """Two buckets, by what is nearer."""

    def shapes(self):
        return np.array([[64, 64], [64, 128]])

    def assign(self, width, height):
        return (width / height > 2**0.5).astype(np.uint8)


@pytest.fixture
def found(damaged):
    filters = [MinValue("aesthetic", 10.0), MaxValue("punsafe", 0.5), MinSize(48), CaptionLength(5, 100)]
    return examine(build_index(str(damaged), progress=False), filters, 64, Shapes(), 8)


def test_counts(found):
    assert (found.samples, found.left_out) == (38, {"not_image": 1, "no_caption": 1})
    assert [(p["shard"], p["key"], p["reason"]) for p in found.problems] == [
        ("00000.tar", "000000003", "not_image"),
        ("00000.tar", "000000004", "no_caption"),
    ]
    assert all(p["offset"] > 0 for p in found.problems)
    verdicts = [(v.filter, v.rejects, v.first, v.missing) for v in found.verdicts]
    assert verdicts == [
        ("aesthetic >= 10", 8, 8, 0),
        ("punsafe <= 0.5", 15, 15, 15),
        ("original size >= 48 px", 0, 0, 0),
        ("CaptionLength(min=5, max=100)", 0, 0, 0),
    ]
    assert found.kept == 15
    assert found.duplicates == 4
    assert found.duplicate_keys == {f"0000000{i}": ["00000.tar", "00001.tar"] for i in ("23", "24")}


def test_histograms_count_every_value(found):
    histograms = {h.name: h for h in found.histograms}
    sizes = {"shorter side", "shorter side of the original", "aspect ratio", "caption length"}
    assert histograms.keys() == sizes | {"aesthetic", "punsafe"}
    for h in histograms.values():
        assert sum(h.counts) == h.present == (23 if h.name == "punsafe" else 38)
        assert sum(h.kept) == 15
        assert len(h.edges) == len(h.counts) + 1
    aesthetic = histograms["aesthetic"]
    assert (aesthetic.least, aesthetic.most, aesthetic.marks) == (0, 37, [10.0])
    assert histograms["shorter side of the original"].marks == [48]
    values = [i for i in (*range(25), *range(23, 38)) if i not in (3, 4)]
    counts, _ = np.histogram(values, aesthetic.edges)
    assert aesthetic.counts == counts.tolist()
    ratio = histograms["aspect ratio"]
    assert ratio.log
    assert ratio.edges[20] == pytest.approx(1)


def test_buckets(found):
    """Of the 15 kept, 26 to 40 pixels wide and 12 high, all go to 1:2; the crop takes what is beyond."""
    [bucket] = found.buckets
    assert (bucket.height, bucket.width, bucket.samples) == (64, 128, 15)
    ratios = np.arange(26, 41) / 12
    assert bucket.cut == pytest.approx(np.mean(1 - np.minimum(ratios / 2, 2 / ratios)))
    assert found.enlarged == 15


def test_the_contact_sheet_is_of_samples_that_are_kept(damaged):
    index = build_index(str(damaged), progress=False)
    sheet = examine(index, [MinValue("aesthetic", 10.0)], pictures=4).thumbnails
    assert [t.key for t in sheet] == [
        f"0000{i}" for i in ("0/000000010", "0/000000019", "1/000000027", "1/000000037")
    ]
    assert [t.caption for t in sheet] == ["picture 10", "picture 19", "picture 27", "picture 37"]
    assert sheet[0].scores == {"aesthetic": 10.0, "punsafe": 0.25}
    with Image.open(io.BytesIO(base64.b64decode(sheet[0].jpeg))) as image:
        assert (image.format, image.size) == ("JPEG", (26, 12))
    assert examine(index, pictures=0).thumbnails == []
    assert examine(index, [MinValue("aesthetic", 99.0)]).thumbnails == []


def test_a_picture_that_does_not_decode_is_named(damaged):
    found = examine(build_index(str(damaged), progress=False), pictures=100)
    assert [(t.key, t.reason) for t in found.thumbnails if t.reason] == [("00000/000000005", "corrupt_image")]
    assert "corrupt_image" in page(found)


class Elements(HTMLParser):
    """Tags with their attributes, in order, and all text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_is_one_file_that_loads_nothing(found):
    html = page(found)
    elements = Elements(html)
    tags = {tag for tag, _ in elements.found}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "a"}
    links = [value for _, facts in elements.found for name, value in facts.items() if name in ("src", "href")]
    assert len(links) == 8
    assert all(link.startswith("data:image/jpeg;base64,") for link in links)
    assert "http:" not in html
    assert "https:" not in html
    assert "url(" not in html
    policy = next(facts["content"] for tag, facts in elements.found if facts.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    for text in ("aesthetic >= 10", "CaptionLength", "Keys in several shards", "128 x 64", "not_image"):
        assert text in elements.text


def test_a_strangers_text_is_text(write, sample):
    name = "a<b>.tar"
    items = [sample(i, caption=EVIL, **{"score.x": float(i)}) for i in range(3)] + [sample(3, key="x<i>y")]
    index = build_index(str(write(name, items)), progress=False)
    found = examine(index, pictures=3)
    html = page(found)
    elements = Elements(html)
    assert "script" not in {tag for tag, _ in elements.found}
    assert all(not name.startswith("on") for _, facts in elements.found for name in facts)
    assert elements.text.count(EVIL) == 3
    assert "x<i>y" in elements.text
    assert [tag for tag, _ in elements.found].count("img") == 3


@pytest.mark.parametrize(
    ("shards", "name"),
    [
        (["/d/set/1.tar"], "1.tar"),
        (["/d/set/1.tar", "/d/set/2.tar"], "set"),
        (["/d/set/1.tar", "s3://b/2.tar"], "2 shards"),
        (["/1.tar", "/2.tar"], "2 shards"),
    ],
)
def test_a_set_is_called_after_its_folder(shards, name):
    assert dataset_name(shards) == name


def test_urls_are_shown_without_secrets():
    assert public("https://me:pass@host/a@b/1.tar?token=x") == "https://host/a@b/1.tar"
    assert public("/odd?path/1.tar") == "/odd?path/1.tar"


def test_a_set_without_faults_says_so(write, sample):
    html = page(examine(build_index(str(write("a.tar", [sample(i) for i in range(2)])), progress=False)))
    assert "None: every sample has a picture and a caption" in html
    assert "What the filters would drop" not in html
    assert "Keys in several shards" not in html
    assert "The same in all that have it:" in html


@pytest.mark.parametrize(
    ("part", "text"), [(0, "0 %"), (1, "< 0.1 %"), (250, "2.5 %"), (9_999, "> 99.9 %"), (10_000, "100 %")]
)
def test_shares_are_never_rounded_to_none_or_all(part, text):
    assert share(part, 10_000) == text


def test_numbers_are_short():
    assert [number(v) for v in (0, 0.31234, 5, 999, 12345.6)] == ["0", "0.312", "5", "999", "12,346"]
    assert [bytes_text(v) for v in (12, 2.35e7, 1.85e15)] == ["12 B", "23.5 MB", "1,850 TB"]


# ---- the command -----------------------------------------------------------------------------------------


def run(capsys, *words):
    code = cli.main(["data", "inspect", *map(str, words)])
    return code, capsys.readouterr().out


def test_the_terminal_names_what_filters_drop(damaged, capsys, tmp_path):
    (tmp_path / "list.txt").write_text("# none\n")
    words = (
        "--min",
        "aesthetic=10",
        "--max",
        "punsafe=0.5",
        "--min-size",
        48,
        "--opt-out",
        tmp_path / "list.txt",
    )
    code, out = run(capsys, damaged, *words)
    assert code == 0
    assert "aesthetic >= 10: rejects 8 (21.1 %), 8 of them first\n" in out
    assert "original size >= 48 px: rejects 0 (0 %)" in out
    assert "OptOut(" in out
    assert "kept: 15 of 38 (39.5 %)\n" in out
    assert "4 samples have a key that another shard has, too" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--min", "aestetic=5"], "--min aestetic=5: no sample has 'aestetic'; did you mean aesthetic?"),
        (["--max", "zzz=5"], "--max zzz=5: no sample has 'zzz'; have: width, height"),
        (["--max", "punsafe"], "--max punsafe: expected COLUMN=NUMBER; write --max aesthetic=5"),
        (["--opt-out", "nowhere"], "data.filters: nowhere: No such file"),
    ],
)
def test_wrong_filters_are_one_line(damaged, capsys, words, message):
    with pytest.raises(SystemExit):
        cli.main(["data", "inspect", str(damaged), *words])
    assert f"ldm: error: {message}" in capsys.readouterr().err


def test_page_and_json_are_written(damaged, capsys, tmp_path):
    pytest.importorskip("ldm.data.shapes")
    out, facts = tmp_path / "inspect.html", tmp_path / "inspect.json"
    words = ("--out", out, "--json", facts, "--resolution", 256, "--pictures", 5)
    code, text = run(capsys, damaged, *words)
    assert code == 0
    assert f"written to {out}" in text
    assert f"written to {facts}" in text
    found = json.loads(facts.read_text())
    assert (found["samples"], found["resolution"], len(found["thumbnails"])) == (38, 256, 5)
    assert sum(bucket["samples"] for bucket in found["buckets"]) == 38
    assert "jpeg" not in found["thumbnails"][0]
    assert len(Elements(out.read_text()).found) > 100
    with pytest.raises(SystemExit):
        cli.main(["data", "inspect", str(damaged), "--out", str(tmp_path / "no" / "x.html")])
    assert "cannot write there (No such file or directory); name another file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_browser_shows_it(found, tmp_path):
    """Rendered by a real browser: not an empty page, and nothing wider than the window."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    (tmp_path / "page.html").write_text(page(found), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shot = f"--screenshot={tmp_path / 'shot.png'}"
    command = [browser, *options, "--window-size=1000,1400", shot, (tmp_path / "page.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(tmp_path / "shot.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.std() > 10
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
