import pickle

import numpy as np
import pytest

from ldm.data.filters import AspectRatio, CaptionLength, Filter, MaxValue, MinSize, MinValue, OptOut
from ldm.data.hashes import hash_text, hashes_of, host_of
from ldm.data.index import build_index
from ldm.data.selection import select
from ldm.errors import InputError

SAMPLE = {
    "aesthetic": 5.0,
    "punsafe": 0.1,
    "width": 256,
    "height": 128,
    "original_width": 1024,
    "original_height": 512,
    "caption": "four",
}
TABLE = [  # filter, change of the sample, kept?
    (MinValue("aesthetic", 5.0), {}, True),
    (MinValue("aesthetic", 5.0), {"aesthetic": 4.99}, False),
    (MinValue("aesthetic", 5.0), {"aesthetic": None, "AESTHETIC_SCORE": 6.0}, True),
    (MinValue("aesthetic", 5.0), {"aesthetic": None}, False),
    (MinValue("aesthetic", 5.0, "keep"), {"aesthetic": None}, True),
    (MinValue("aesthetic", 5.0, "keep"), {"aesthetic": 1.0}, False),
    (MaxValue("punsafe", 0.1), {}, True),
    (MaxValue("punsafe", 0.1), {"punsafe": 0.11}, False),
    (MaxValue("punsafe", 0.1), {"punsafe": None}, False),
    (MaxValue("punsafe", 0.1, "keep"), {"punsafe": None}, True),
    (MinSize(512), {}, True),
    (MinSize(513), {}, False),
    (MinSize(128), {"original_width": None, "original_height": None}, True),
    (MinSize(129), {"original_width": None, "original_height": None}, False),
    (AspectRatio(0.5, 2.0), {}, True),
    (AspectRatio(0.5, 1.9), {}, False),
    (AspectRatio(2.1, 3.0), {}, False),
    (CaptionLength(4, 4), {}, True),
    (CaptionLength(5), {}, False),
    (CaptionLength(0, 3), {}, False),
    (CaptionLength(), {"caption": ""}, False),
]


@pytest.mark.parametrize(("condition", "change", "kept"), TABLE)
def test_accept_reject(condition, change, kept):
    sample = SAMPLE | change
    assert condition(sample) is kept
    assert pickle.loads(pickle.dumps(condition)) == condition
    assert pickle.loads(pickle.dumps(condition))(sample) is kept


@pytest.mark.parametrize(("condition", "change", "kept"), TABLE)
def test_whole_columns_agree_with_single_samples(write, sample, condition, change, kept):
    facts = SAMPLE | change
    width, height = facts["width"] // 8, facts["height"] // 8
    originals = {k: facts[k] for k in ("original_width", "original_height")}
    scores = {k: facts.get(k) for k in ("aesthetic", "punsafe", "AESTHETIC_SCORE")}
    if originals["original_width"] is None:
        width, height = facts["width"], facts["height"]
    item = sample(0, width=width, height=height, caption=facts["caption"] or " ", **originals, **scores)
    other = sample(1, aesthetic=9.0, punsafe=0.0)
    index = build_index(str(write("a.tar", [item, other])))
    assert bool(condition.mask(index.columns)[0]) is kept


def test_every_filter_is_in_the_table():
    classes = {kind for kind in Filter.__subclasses__() if kind.__module__.startswith("ldm.")} - {OptOut}
    assert classes == {type(condition) for condition, _, _ in TABLE}
    for kind in classes:
        verdicts = {kept for condition, _, kept in TABLE if type(condition) is kind}
        assert verdicts == {True, False}


def test_missing_as_an_error():
    with pytest.raises(InputError, match=r"no value for 1 of 1 samples; set missing: drop or missing: keep"):
        MinValue("aesthetic", 5.0, "error")(SAMPLE | {"aesthetic": None})
    assert MinValue("aesthetic", 5.0, "error")(SAMPLE)


def test_selection_counts_what_each_filter_was_first_to_drop(shards):
    index = build_index(str(shards))
    filters = [MinValue("aesthetic", 2.0), CaptionLength(10), MaxValue("punsafe", 0.5, "keep")]
    selection = select(index, filters)
    # 8 + 8 low scores and 11 missing; then the captions "picture 8" and "picture 9" are too short
    assert list(selection.dropped.values()) == [27, 2, 0]
    assert list(selection.missing.values()) == [11, 0, 0]
    assert selection.counts.tolist() == [13, 22, 0]
    assert selection.rows.tolist() == [*range(10, 23), *range(31, 53)]
    lines = selection.table()
    assert "35  kept of 64 samples" in lines[0]
    assert "27  dropped by MinValue(column='aesthetic', value=2.0, missing='drop'), 11 of them" in lines[1]


def test_no_filter_keeps_all(shards):
    index = build_index(str(shards))
    selection = select(index)
    assert selection.rows.tolist() == list(range(64))
    assert selection.counts.tolist() == index.counts.tolist()


def test_digest_tells_selections_apart(shards):
    index = build_index(str(shards))
    some, same = select(index, [MinValue("aesthetic", 2.0)]), select(index, [MinValue("aesthetic", 1.9)])
    assert select(index).digest != some.digest
    assert some.digest == same.digest  # it is of what is kept, not of how


def test_the_same_filter_twice_is_counted_twice(shards):
    twice = select(build_index(str(shards)), [MinValue("aesthetic", 2.0), MinValue("aesthetic", 2.0)])
    assert list(twice.dropped.values()) == [27, 0]


def test_a_limit_keeps_the_first_of_what_the_filters_keep(shards):
    index = build_index(str(shards), progress=False)
    every = select(index, [MinValue("aesthetic", 2.0)])
    some = select(index, [MinValue("aesthetic", 2.0)], limit=20)
    assert some.rows.tolist() == every.rows[:20].tolist()
    assert some.counts.tolist() == [15, 5, 0]
    assert some.dropped["limit"] == len(every) - 20
    assert some.table()[0].endswith("20  kept of 64 samples")
    assert some.digest != every.digest
    assert select(index, [MinValue("aesthetic", 2.0)], limit=64).digest == every.digest, "it changes nothing"


def test_missing_column_names_those_there_are(write, sample):
    index = build_index(str(write("00000.tar", [sample(i, Aesthetics=4.0, punsafe=0.1) for i in range(2)])))
    with pytest.raises(InputError) as caught:
        select(index, [MaxValue("punsafe", 1.0), MinValue("aesthetic", 5.0)])
    assert str(caught.value) == (
        "data.filters[1]: filter uses 'aesthetic' but 00000.tar has: Aesthetics, punsafe, width, height, "
        "original_width, original_height, caption_length; add data.columns.aesthetic=Aesthetics"
    )
    index = build_index(index.shards, names={"aesthetic": "Aesthetics"})
    assert len(select(index, [MinValue("aesthetic", 4.0)])) == 2


def test_keeping_nothing_is_an_error(shards):
    message = r"data.filters: filter keeps 0 of 64 samples; MinSize\(pixels=1000\) drops 64: relax it"
    with pytest.raises(InputError, match=message):
        select(build_index(str(shards)), [MinSize(1000)])


def test_limits_are_compared_in_the_precision_of_the_column():
    assert MaxValue("s", 0.1).mask({"s": np.array([0.1], np.float32)}).all()
    assert MinValue("s", 0.7).mask({"s": np.array([0.7], np.float32)}).all()


# ---- opt-out lists ---------------------------------------------------------------------------------------

MD5, SHA = (
    "d41d8cd98f00b204e9800998ecf8427e",
    "E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855",
)


@pytest.fixture
def optout(tmp_path):
    """Lines -> path of a list of them."""

    def make(*lines, name="list.txt"):
        (tmp_path / name).write_text("\n".join(["# asked for in 2024", "", *lines, ""]))
        return str(tmp_path / name)

    return make


@pytest.mark.parametrize(
    ("line", "sample", "kept"),
    [
        ("http://a.org/1.jpg", {"url": "http://a.org/1.jpg"}, False),
        ("http://a.org/1.jpg", {"url": "http://a.org/1.jpg?x"}, True),
        ("http://a.org/1.jpg", {"url": "https://a.org/1.jpg"}, True),
        ("a.org", {"url": "http://a.org/1.jpg"}, False),
        ("A.org.", {"url": "https://www.a.org:8080/1.jpg"}, False),
        ("www.a.org", {"url": "http://a.org/1.jpg"}, False),
        ("a.org", {"url": "http://images.a.org/1.jpg"}, True),
        ("images.a.org", {"url": "http://IMAGES.a.org/1.jpg"}, False),
        ("a.org", {"url": "http://b.org/a.org"}, True),
        ("a.org", {"url": "http://[broken"}, True),
        (MD5, {"url": "http://a.org/1.jpg", "md5": MD5.upper()}, False),
        (MD5.upper(), {"md5": MD5}, False),
        (MD5, {"sha256": SHA}, True),
        (SHA, {"sha256": SHA.lower()}, False),
        (MD5, {"url": 5, "md5": None}, True),
    ],
)
def test_opt_out_by_url_host_and_digest(optout, line, sample, kept):
    condition = OptOut(optout(line))
    assert condition(sample) is kept
    assert pickle.loads(pickle.dumps(condition))(sample) is kept


def test_several_lists_are_one(optout):
    lists = [optout("a.org", "b.org", name="1"), optout("http://c.org/1", "a.org", name="2")]
    urls = ["http://a.org/1", "http://b.org/2", "http://c.org/1", "http://c.org/2"]
    condition = OptOut(lists)
    assert [condition({"url": url}) for url in urls] == [False, False, False, True]
    assert all(OptOut([])({"url": url}) for url in urls)


def test_opt_out_of_samples_that_cannot_be_judged(optout):
    sample = {"url": "http://a.org/1"}  # has no digest
    files = optout("http://b.org/1", MD5)
    assert OptOut(files)(sample)
    assert not OptOut(files, "drop")(sample)
    with pytest.raises(InputError, match=r"can say nothing of 1 of 1 samples; set missing: drop or"):
        OptOut(files, "error")(sample)
    assert not OptOut(optout("http://a.org/1", MD5))(sample), "what it has is listed"


def test_wrong_lists_are_one_line(optout, tmp_path):
    with pytest.raises(InputError) as caught:
        OptOut(optout("a.org", "*.b.org"))
    place = f"{tmp_path / 'list.txt'}:4"
    assert str(caught.value) == (
        f"{place}: '*.b.org' is no URL, host or digest; write one a line: https://..., or example.org"
    )
    with pytest.raises(InputError, match=r"nowhere.txt: No such file or directory; give the list's path"):
        OptOut(str(tmp_path / "nowhere.txt"))


def test_an_index_without_hashes_is_one_line(optout):
    with pytest.raises(InputError) as caught:
        OptOut(optout("a.org")).mask({"width": np.zeros(3)})
    assert "names a domain, and this index has none: it is older" in str(caught.value)
    assert str(caught.value).endswith("; index again with ldm data index")


def test_hashes_of_a_sample():
    found = hashes_of({"url": " http://www.A.org/1 ", "sha256": SHA, "md5": MD5})
    texts = {"url": "http://www.A.org/1", "domain": "a.org", "picture": SHA.lower()}
    assert found == {name: hash_text(text) for name, text in texts.items()}
    assert hashes_of({"url": None, "sha256": 7}) == {"url": 0, "domain": 0, "picture": 0}
    assert hash_text("") == 0x2D06800538D394C2  # XXH3's published value
    assert host_of("example.org") == "example.org"


def test_opt_out_of_real_shards(optout, write, sample):
    """Three samples by URL, host and digest, out of ten."""
    facts = [{"url": f"http://h{i}.org/{i}.jpg", "md5": f"{i:032x}"} for i in range(10)]
    index = build_index(str(write("00000.tar", [sample(i, **facts[i]) for i in range(10)])))
    files = optout("http://h1.org/1.jpg", "http://h2.org/1.jpg", "h4.org", f"{7:032X}")
    selection = select(index, [OptOut(files)])
    assert selection.rows.tolist() == [0, 2, 3, 5, 6, 8, 9]
    assert selection.table()[1].startswith("             3  dropped by OptOut(")
