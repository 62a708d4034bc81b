"""Captions: closed-form frequencies at fixed seeds, and the same text wherever it is made."""

import json
import pickle
import subprocess
import sys
from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from ldm.config import compose
from ldm.data.captions import Captions, clean
from ldm.data.datamodule import ShardDataModule
from ldm.errors import InputError

N = 4000


def parts(text="", **meta):
    return {"caption": text.encode(), "json": json.dumps(meta).encode()}


def counts(captions, sample, n=N):
    return Counter(captions(sample, i) for i in range(n))


def agrees(found, expected):
    """Chi-square of counts against shares, one in 10^6 by chance (Wilson and Hilferty's approximation)."""
    assert found.keys() <= {key for key, share in expected.items() if share}
    n, free = sum(found.values()), len(expected) - 1
    chi2 = sum((found[key] - n * share) ** 2 / (n * share) for key, share in expected.items() if share)
    z = ((chi2 / free) ** (1 / 3) - 1 + 2 / (9 * free)) / (2 / (9 * free)) ** 0.5
    return z < 4.75


# ---- sources ---------------------------------------------------------------------------------------------


def test_by_default_it_is_the_text_member_and_no_json_is_read():
    captions = Captions()
    assert captions.kinds == ("caption",)
    assert captions({"caption": b"  a red apple \n"}, 3) == "a red apple"
    assert captions({"caption": b""}, 3) == ""


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("\ufeff a\tb\r\n\x00c ", "a b c"),
        ("left\u202eright\u200b", "left right"),
        ("\U0001f468\u200d\U0001f469 family", "\U0001f468\u200d\U0001f469 family"),  # the joiner stays
        ("\ud800lone", "lone"),
        ("  ", ""),
    ],
)
def test_control_characters_and_white_space_are_trimmed(text, cleaned):
    assert clean(text) == cleaned
    clean(text).encode()


def test_sources_are_mixed_by_weight():
    captions = Captions({"txt": 0.5, "json.long": 0.3, "json.all": 0.2})
    assert captions.kinds == ("caption", "json")
    sample = parts("t", long="l", all=["a", "b", ""])
    assert agrees(counts(captions, sample), {"t": 0.5, "l": 0.3, "a": 0.1, "b": 0.1})


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (parts("t", long="l"), {"t": 0.625, "l": 0.375}),
        (parts("", long="l", all=["a"]), {"l": 0.6, "a": 0.4}),
        (parts("t", long=" ", all=[]), {"t": 1}),
        (parts("t", long=None, all={"no": "text"}), {"t": 1}),
        ({"caption": b"t", "json": b""}, {"t": 1}),
        ({"caption": b"t", "json": b"[1"}, {"t": 1}),
        ({"caption": b"t", "json": b"[" * 100_000}, {"t": 1}),
        (parts(""), {"": 1}),
    ],
)
def test_a_source_without_a_text_leaves_its_share_to_the_others(sample, expected):
    found = counts(Captions({"txt": 0.5, "json.long": 0.3, "json.all": 0.2}), sample)
    assert agrees(found, expected) if len(expected) > 1 else found.keys() == expected.keys()


# ---- templates -------------------------------------------------------------------------------------------


def test_templates_evenly_or_by_weight():
    even = Captions(templates=["a photo of {}", "{}", "{{{}}}"])
    shares = dict.fromkeys(["a photo of x", "x", "{x}"], 1 / 3)
    assert agrees(counts(even, parts("x")), shares)
    assert even.kinds == ("caption",)
    twice = Captions(templates=["a photo of {}", "{}", "a photo of {}"])
    assert agrees(counts(twice, parts("x")), {"a photo of x": 2 / 3, "x": 1 / 3})
    weighted = Captions(templates={"a photo of {}": 1, "{}": 3, "never {}": 0})
    assert agrees(counts(weighted, parts("x")), {"a photo of x": 0.25, "x": 0.75})


def test_a_template_takes_fields_of_the_json_and_is_left_out_where_one_is_missing():
    captions = Captions(templates=["{}, {artist}, {year}", "{}"])
    assert captions.kinds == ("caption", "json")
    sample = parts("x", artist="A", year=1890)
    assert agrees(counts(captions, sample), {"x, A, 1890": 0.5, "x": 0.5})
    assert set(counts(captions, parts("x", artist="A"), 100)) == {"x"}
    assert Captions(templates=["by {artist}"])(parts("x"), 0) == "x"
    assert Captions(templates=["a photo of {}"])(parts(""), 0) == ""


def test_templates_look_into_nothing():
    sample = parts("x", **{"a.__class__": "text", "0": "zero"})
    assert Captions(templates=["{a.__class__} {0}"])(sample, 0) == "text zero"


# ---- tags ------------------------------------------------------------------------------------------------


def test_tags_are_shuffled_behind_a_kept_prefix():
    captions = Captions(shuffle_tags=True, keep_tags=2)
    found = counts(captions, parts("one, two,a , b,c,"))
    assert agrees(found, {", ".join(("one", "two", *rest)): 1 / 6 for rest in permutations("abc")})
    assert captions(parts("one"), 0) == "one"


@pytest.mark.parametrize("keep", [0, 1])
def test_tags_are_dropped_each_by_itself_and_never_all(keep):
    p = 0.4
    found = counts(Captions(drop_tags=p, keep_tags=keep), parts("a, b, c"))
    expected = Counter()
    loose = "abc"[keep:]
    for mask in range(2 ** len(loose)):
        left = [tag for i, tag in enumerate(loose) if mask >> i & 1]
        share = p ** (len(loose) - len(left)) * (1 - p) ** len(left)
        if left or keep:
            expected[", ".join([*"abc"[:keep], *left])] += share
        else:  # the one that is spared
            expected.update(dict.fromkeys(loose, share / len(loose)))
    assert sum(expected.values()) == pytest.approx(1)
    assert agrees(found, expected)


def test_only_tag_sources_are_tags():
    sources = {"txt": 1, "json.tags": 1}
    captions = Captions(sources, tag_sources=["json.tags"], tag_separator=" | ", shuffle_tags=True)
    found = counts(captions, parts("a house, red", tags=["red", "a house", 7]))
    orders = {" | ".join(order): 1 / 12 for order in permutations(["red", "a house", "7"])}
    assert agrees(found, orders | {"a house, red": 0.5})
    assert Captions({"json.tags": 1}, tag_sources=["json.tags"])(parts(tags="b,a"), 0) == "b, a"


def test_dropping_and_shuffling_are_independent():
    found = counts(Captions(drop_tags=0.5, shuffle_tags=True), parts("a, b"))
    assert agrees(found, {"a, b": 1 / 8, "b, a": 1 / 8, "a": 3 / 8, "b": 3 / 8})


# ---- length ----------------------------------------------------------------------------------------------

LONG = "One two three. Four five! Six? Seven eight nine ten."


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_words": 10}, [LONG]),
        ({"max_words": 4}, ["One two three. Four"]),
        ({"max_words": 5, "long": "sentences"}, ["One two three. Four five!"]),
        ({"max_words": 4, "long": "sentences"}, ["One two three."]),
        ({"max_words": 2, "long": "sentences"}, ["One two"]),
        (
            {"max_words": 5, "long": "window"},
            ["One two three. Four five!", "Four five! Six?", "Six? Seven eight nine ten."],
        ),
        ({"max_words": 1, "long": "window"}, ["Six?"]),
        ({"max_words": 10, "long": "window"}, [LONG]),
    ],
)
def test_long_captions(options, expected):
    found = counts(Captions(**options), parts(LONG), 2000)
    assert found.keys() == set(expected)
    assert len(expected) == 1 or agrees(found, dict.fromkeys(expected, 1 / len(expected)))


def test_a_window_of_one_long_sentence_is_of_its_comma_parts():
    found = counts(Captions(max_words=3, long="window"), parts("a b, c, d e, f g h i, j"), 2000)
    assert agrees(found, dict.fromkeys(["a b, c", "c, d e", "j"], 1 / 3))
    assert Captions(max_words=2, long="window")(parts("a b, c"), 0) in {"a b", "c"}
    assert Captions(max_words=2, long="window")(parts("a b, and so on"), 0) == "a b"
    assert Captions(max_words=1, long="window")(parts("a, b c"), 0) == "a"
    assert Captions(max_words=2, long="window")(parts("a b c"), 0) == "a b"


def test_chinese_sentences_need_no_space():
    text = "\u4e00 \u4e8c\u3002\u4e09 \u56db\u3002"
    assert Captions(max_words=2, long="sentences")(parts(text), 0) == "\u4e00 \u4e8c\u3002"


def test_windows_are_all_the_longest_runs_that_fit():
    """Against a search of all runs."""
    generator = np.random.default_rng(0)
    for case in range(30):
        sizes = generator.integers(1, 6, generator.integers(2, 8)).tolist()
        limit = int(generator.integers(1, sum(sizes)))
        text = " ".join(" ".join([f"s{i}"] * size) + "." for i, size in enumerate(sizes))
        pieces = [f"{piece}." for piece in text[:-1].split(". ")]
        runs = {(i, j) for j in range(len(sizes) + 1) for i in range(j) if sum(sizes[i:j]) <= limit}
        longest = {r for r in runs if not any(o != r and o[0] <= r[0] and r[1] <= o[1] for o in runs)}
        expected = {" ".join(pieces[i:j]) for i, j in longest} or {" ".join(text.split()[:limit]).rstrip(".")}
        found = set(counts(Captions(max_words=limit, long="window"), parts(text), 300))
        assert {text.rstrip(".") for text in found} == {text.rstrip(".") for text in expected}, case


def test_whole_tags_that_fit_whatever_the_policy():
    captions = Captions(shuffle_tags=True, keep_tags=1, max_words=3, long="window")
    assert set(counts(captions, parts("one, two three, four"), 100)) == {"one, two three", "one, four"}
    assert captions(parts("one two three four, five"), 0) == "one two three"


def test_the_template_is_not_counted():
    assert (
        Captions(templates=["a fine photo of {}"], max_words=1)(parts("red, apple"), 0)
        == "a fine photo of red"
    )


# ---- keyed by (seed, n) ----------------------------------------------------------------------------------

EVERYTHING = {
    "sources": {"txt": 0.5, "json.caption_long": 0.3, "json.tags": 0.2},
    "templates": ["a photo of {}", "{}"],
    "tag_sources": ["json.tags"],
    "shuffle_tags": True,
    "keep_tags": 1,
    "drop_tags": 0.2,
    "max_words": 8,
    "long": "window",
}
SAMPLE = parts("a red apple", caption_long=LONG, tags=["one", "two", "three", "four"])


def test_the_same_seed_and_place_give_the_same_text_in_any_process():
    captions = Captions(**EVERYTHING, seed=2**63 + 5)
    here = [captions(SAMPLE, n) for n in range(50)]
    assert [captions(SAMPLE, n) for n in reversed(range(50))] == here[::-1]
    code = (
        "import pickle, sys; captions, sample = pickle.load(sys.stdin.buffer);"
        "pickle.dump([captions(sample, n) for n in range(50)], sys.stdout.buffer)"
    )
    given = pickle.dumps((captions, SAMPLE))
    done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, check=True)
    assert pickle.loads(done.stdout) == here
    assert [Captions(**EVERYTHING, seed=1)(SAMPLE, n) for n in range(50)] != here
    assert len(set(here)) > 15


GOLDEN = {
    2: "a photo of Four five! Six? Seven eight nine ten.",
    3: "a photo of a red apple",
    5: "a photo of Four five! Six? Seven eight nine ten.",
    9: "a photo of Four five! Six? Seven eight nine ten.",
    1000000000000: "a photo of a red apple",
    1000000000001: "a red apple",
    1000000000002: "one, two, four, three",
    1000000000003: "a photo of a red apple",
}


def test_golden_texts():
    """A change of these changes what a resumed run trains on."""
    captions = Captions(**EVERYTHING, seed=7)
    assert {n: captions(SAMPLE, n) for n in GOLDEN} == GOLDEN


def test_plain_leaves_nothing_to_chance():
    captions = Captions(**EVERYTHING, seed=1).plain()
    assert set(counts(captions, SAMPLE, 100)) == {"a photo of a red apple"}
    assert set(counts(captions, parts("", caption_long=LONG), 100)) == {
        "a photo of One two three. Four five! Six?"
    }
    tags = parts("", tags=["one", "two", "three"])
    assert set(counts(captions, tags, 100)) == {"a photo of one, two, three"}


# ---- options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": {"tags": 1}}, "sources: 'tags' is no source; write txt, or json.tags for a field"),
        ({"sources": {"json.": 1}}, "sources: 'json.' is no source"),
        ({"sources": {"txt": 0}}, "sources: all weights are 0; give one a weight above 0"),
        ({"sources": {"txt": -1}}, "sources: weight of 'txt': expected a number >= 0, got -1"),
        ({"sources": {"txt": "x"}}, "sources: weight of 'txt': expected a number >= 0, got 'x'"),
        ({"templates": {"{}": float("nan")}}, "templates: weight of '{}': expected a number >= 0, got nan"),
        ({"templates": ["a {"]}, "templates: 'a {' has a lone brace; write {{ or }} for a brace"),
        ({"templates": ["{x:>9}"]}, "templates: '{x:>9}' has a format after ':' or '!'; write {} or {name}"),
        ({"tag_sources": ["json.tags"]}, "tag_sources: 'json.tags' is not among the sources; add it there"),
        ({"tag_separator": " "}, "tag_separator: is only white space; write ', '"),
        ({"drop_tags": 1.0}, "drop_tags: expected a probability in [0, 1), got 1.0"),
        ({"keep_tags": -1}, "keep_tags: expected at least 0 tags, got -1"),
        ({"max_words": 0}, "max_words: expected at least 1 word, got 0; or null"),
        ({"long": "cut"}, "long: expected truncate, sentences, window, got 'cut'"),
    ],
)
def test_wrong_options_are_one_line(options, message):
    with pytest.raises(InputError) as caught:
        Captions(**options)
    assert str(caught.value).startswith(f"data.captions.{message}")


@pytest.mark.parametrize("data", ["shards", "folder"])
def test_the_config_has_the_defaults_and_takes_all_from_the_command_line(data):
    overrides = [f"data={data}", f"data.{data}=x", "data.global_batch_size=1"]
    config = compose("train", ["experiment=sd1_256", *overrides])
    assert Captions(**config.data.captions) == Captions(templates=[])
    mixed = "data.captions.sources={txt: 0.5, json.caption_long: 0.5}"
    templates = 'data.captions.templates=["a photo of {}", "{}"]'
    config = compose("train", ["experiment=sd1_256", *overrides, mixed, templates])
    captions = Captions(**config.data.captions)
    assert captions.weights == {"txt": 0.5, "json.caption_long": 0.5}
    assert len(captions.forms) == 2


# ---- a run -----------------------------------------------------------------------------------------------


@pytest.fixture
def long_shards(write, sample):
    extra = [{"caption_long": f"long {i}", "tags": [f"{t}{i}" for t in "abc"]} for i in range(40)]
    return write("set/00000.tar", [sample(i, **extra[i]) for i in range(40)]).parent


def module(shards, **options):
    options = {"image_size": 8, "global_batch_size": 8, "seed": 3, "validation_filters": []} | options
    return ShardDataModule(str(shards), captions=EVERYTHING, **options)


def texts(loader, steps):
    batches = (batch for batch, _ in zip(loader, range(steps), strict=False))
    return {int(n): (key, text) for b in batches for n, key, text in zip(b.n, b.key, b.caption, strict=True)}


def test_a_run_with_json_captions_does_not_depend_on_workers_or_ranks(long_shards):
    alone = texts(module(long_shards).stream(), 15)
    assert len(alone) == 120
    workers = texts(module(long_shards, num_workers=2).stream(), 15)
    assert workers == alone
    ranks = texts(module(long_shards).stream(0, 2), 15) | texts(module(long_shards).stream(1, 2), 15)
    assert ranks == alone
    for key, text in alone.values():
        number = int(key.split("/")[1])
        assert f"picture {number}" in text or f"long {number}" in text or f"a{number}" in text
    kinds = Counter(text.split(" of ")[-1][0] for _, text in alone.values())
    assert kinds.keys() == {"p", "l", "a"}


def test_validation_has_the_first_source_always(long_shards):
    found = texts(module(long_shards).validation_stream(), 5)
    assert {text for _, text in found.values()} == {f"a photo of picture {i}" for i in range(40)}


def test_a_field_that_no_sample_has_is_named_before_the_run(long_shards, caplog):
    captions = {"sources": {"txt": 1, "json.captoin_long": 1}, "templates": ["{}, {zzz}"]}
    data = ShardDataModule(str(long_shards), image_size=8, global_batch_size=8, captions=captions)
    data.prepare_data()
    first, second = [text for text in caplog.messages if "data.captions" in text]
    said = "data.shards: data.captions: none of 16 samples has "
    assert first == f"{said}'captoin_long' in its json; did you mean caption_long?"
    assert second.startswith(f"{said}'zzz' in its json; have: url, status,")
    caplog.clear()
    module(long_shards).prepare_data()
    assert [text for text in caplog.messages if "data.captions" in text] == []
