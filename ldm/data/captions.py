"""Which text goes with the n-th sample of the run: source, tags, length, template, in this order.

What is drawn depends on (seed, n) alone, through one keyed hash a draw (XXH3 of seed, n and purpose): the
tensors of `ldm.random` cost more than all of this does for one text. That a caption is sometimes dropped
altogether, for guidance, is the training module's (`module.drop`), not done here.
"""

from __future__ import annotations

import json
import math
import re
import string
import struct
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

import xxhash

from ldm.errors import InputError

CONTROL = (
    re.compile(  # C0, C1, zero width (not the joiners of emoji and Persian), directions, lone surrogates
        "[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]+"
    )
)
SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])\s*(?=\S)")
SOURCE, ITEM, TAG, WINDOW, TEMPLATE = range(5)  # what a draw is for
LONG = ("truncate", "sentences", "window")
WHERE = "data.captions"


def clean(text: str) -> str:
    """The text without control characters, white space trimmed and single."""
    if not text.isprintable():  # quicker than the expression, and true of most
        text = CONTROL.sub(" ", text)
    return " ".join(text.split())


def bits(seed: int, n: int, purpose: int, i: int = 0) -> int:
    """64 bits that depend on the four integers alone."""
    return xxhash.xxh3_64_intdigest(struct.pack("<QqII", seed & (1 << 64) - 1, n, purpose, i))


@dataclass(frozen=True)
class Captions:
    """Makes the caption of a sample from its members; picklable. The fields: configs/data/shards.yaml."""

    sources: Mapping[str, float] | None = None  # "txt" or "json.FIELD" -> weight
    templates: Sequence[str] | Mapping[str, float] | None = (
        None  # one listed twice counts twice; or -> weight
    )
    tag_sources: Sequence[str] | None = None
    tag_separator: str = ", "
    shuffle_tags: bool = False
    keep_tags: int = 0
    drop_tags: float = 0.0
    max_words: int | None = None
    long: Literal["truncate", "sentences", "window"] = "truncate"
    seed: int = 0
    fixed: bool = False  # always the first choice
    weights: dict[str, float] = field(init=False, repr=False)
    forms: dict[tuple[tuple[str, str | None], ...], float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check()
        given = self.templates or ()
        even: Mapping[str, float] = given if isinstance(given, Mapping) else Counter(given)
        forms = {parse_template(text): weight for text, weight in _weights("templates", even).items()}
        object.__setattr__(self, "weights", _weights("sources", self.sources or {"txt": 1.0}))
        object.__setattr__(self, "forms", forms)

    def _check(self) -> None:
        for name in self.sources or ():
            if name != "txt" and not (name.startswith("json.") and len(name) > len("json.")):
                raise InputError(
                    f"{WHERE}.sources", f"'{name}' is no source", f"write txt, or json.{name} for a field"
                )
        unknown = [name for name in self.tag_sources or () if name not in (self.sources or {"txt": 1})]
        if unknown:
            raise InputError(
                f"{WHERE}.tag_sources", f"'{unknown[0]}' is not among the sources", "add it there"
            )
        if not self.tag_separator.strip():
            raise InputError(f"{WHERE}.tag_separator", "is only white space", "write ', '")
        if not 0 <= self.drop_tags < 1:
            raise InputError(f"{WHERE}.drop_tags", f"expected a probability in [0, 1), got {self.drop_tags}")
        if self.keep_tags < 0:
            raise InputError(f"{WHERE}.keep_tags", f"expected at least 0 tags, got {self.keep_tags}")
        if self.max_words is not None and self.max_words < 1:
            raise InputError(
                f"{WHERE}.max_words", f"expected at least 1 word, got {self.max_words}", "or null"
            )
        if self.long not in LONG:
            raise InputError(f"{WHERE}.long", f"expected {', '.join(LONG)}, got '{self.long}'")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Members of a sample that it reads: the json only if something comes from there."""
        return ("caption",) * ("txt" in self.weights) + ("json",) * bool(self.fields)

    @property
    def fields(self) -> list[str]:
        """Fields of the json that it asks for."""
        of_sources = [name.removeprefix("json.") for name in self.weights if name != "txt"]
        return list(dict.fromkeys([*of_sources, *(name for form in self.forms for _, name in form if name)]))

    @property
    def varies(self) -> bool:
        """Whether a sample's text may be another one the next time."""
        drawn = len(self.weights) > 1 or len(self.forms) > 1 or any(name != "txt" for name in self.weights)
        cut = self.max_words is not None and self.long == "window"
        return not self.fixed and (drawn or self.shuffle_tags or self.drop_tags > 0 or cut)

    def warnings(self, jsons: Sequence[bytes]) -> list[str]:
        """A line for each field that none of these samples has: most often it is misspelt."""
        metas = [_object(data) for data in jsons]
        known = list(dict.fromkeys(name for meta in metas for name in meta))
        return [
            f"data.captions: none of {len(metas)} samples has '{name}' in its json; "
            + (
                f"did you mean {near[0]}?"
                if (near := get_close_matches(name, known, 1, 0.5))
                else f"have: {', '.join(known)}"
            )
            for name in self.fields
            if not any(name in meta for meta in metas)
        ]

    def plain(self) -> Captions:
        """The same without chance, for validation: the first source that has a text, the first template."""
        return replace(self, fixed=True)

    def __call__(self, parts: Mapping[str, bytes], n: int) -> str:
        """The text for place n of the run; empty if no source has one."""
        return _Draw(self, parts, n).caption()


class _Draw:
    """One sample at one place of the run; the json is read once, when something asks for it."""

    def __init__(self, options: Captions, parts: Mapping[str, bytes], n: int) -> None:
        self.options, self.parts, self.n = options, parts, n
        self.meta: dict[str, Any] | None = None

    def uniform(self, purpose: int, i: int = 0) -> float:
        """A number in [0, 1), keyed."""
        o = self.options
        return 0.0 if o.fixed else (bits(o.seed, self.n, purpose, i) >> 11) * 2.0**-53

    def caption(self) -> str:
        o = self.options
        name, text = self.source()
        if text and self.is_tags(name):
            text = o.tag_separator.join(self.tags(text))
        elif o.max_words and len(words := text.split()) > o.max_words:
            text = self.shortened(text, words)
        return self.filled(text) if o.forms else text

    # ---- source

    def source(self) -> tuple[str, str]:
        """A source drawn by weight among those that have a text, and its text."""
        weights = self.options.weights
        while True:
            name = _pick(weights, self.uniform(SOURCE, len(weights)))
            text = self.text(name)
            if text or len(weights) == 1:
                return name, text
            weights = {other: weight for other, weight in weights.items() if other != name}

    def text(self, name: str) -> str:
        if name == "txt":
            return clean(self.parts["caption"].decode("utf-8", "replace"))
        joined = name in (self.options.tag_sources or ())
        return self.value(name.removeprefix("json."), joined)

    def value(self, key: str, joined: bool = False) -> str:
        """A field of the json as text: of a list, one drawn, or all as tags; empty if there is none."""
        if self.meta is None:
            self.meta = _object(self.parts["json"])
        value = self.meta.get(key)
        if isinstance(value, list):
            texts = [text for item in value if (text := _scalar(item))]
            if joined:
                return self.options.tag_separator.join(texts)
            return texts[int(self.uniform(ITEM, zlib.crc32(key.encode())) * len(texts))] if texts else ""
        return _scalar(value)

    # ---- tags

    def is_tags(self, name: str) -> bool:
        o = self.options
        return name in o.tag_sources if o.tag_sources is not None else o.shuffle_tags or o.drop_tags > 0

    def tags(self, text: str) -> list[str]:
        """The first `keep_tags` in place, the others dropped and shuffled; whole ones that fit `max_words`.

        At least one stays: where chance would drop all, the one that it spares longest.
        """
        o = self.options
        tags = [tag for part in text.split(o.tag_separator.strip()) if (tag := part.strip())]
        if not o.fixed and (o.shuffle_tags or o.drop_tags):
            tags = tags[: o.keep_tags] + self.mixed(tags[o.keep_tags :], len(tags) > o.keep_tags > 0)
        if o.max_words is None:
            return tags
        whole = tags[: _fitting([len(tag.split()) for tag in tags], o.max_words)]
        return whole or [_cut(text.split(), o.max_words)]

    def mixed(self, tags: list[str], may_vanish: bool) -> list[str]:
        o = self.options
        words = [bits(o.seed, self.n, TAG, i) for i in range(len(tags))]
        if o.drop_tags and tags:
            limit = int(o.drop_tags * 2**32)
            left = [i for i, word in enumerate(words) if word & 0xFFFFFFFF >= limit]
            if not left and not may_vanish:
                left = [max(range(len(tags)), key=lambda i: words[i] & 0xFFFFFFFF)]
            tags, words = [tags[i] for i in left], [words[i] for i in left]
        if o.shuffle_tags:
            tags = [tags[i] for i in sorted(range(len(tags)), key=lambda i: words[i] >> 32)]
        return tags

    # ---- length

    def shortened(self, text: str, words: list[str]) -> str:
        o = self.options
        limit = o.max_words or len(words)
        if o.long != "truncate":
            sentences = SENTENCE.split(text)
            if o.long == "sentences":
                size = _fitting([len(s.split()) for s in sentences], limit)
                if size:
                    return " ".join(sentences[:size])
            elif window := self.window(sentences, " ", limit) or self.window(text.split(", "), ", ", limit):
                return window
        return _cut(words, limit)

    def window(self, pieces: list[str], glue: str, limit: int) -> str:
        """A run of neighbouring pieces, drawn among those that fit and lie in no longer one; or nothing."""
        sizes = [len(piece.split()) for piece in pieces]
        runs: list[tuple[int, int]] = []
        start = total = 0
        for stop, size in enumerate(sizes, 1):
            total += size
            while total > limit:
                total, start = total - sizes[start], start + 1
            if start < stop and (stop == len(sizes) or total + sizes[stop] > limit):
                runs.append((start, stop))
        if not runs:
            return ""
        start, stop = runs[int(self.uniform(WINDOW) * len(runs))]
        return glue.join(pieces[start:stop])

    # ---- template

    def filled(self, text: str) -> str:
        """A template drawn by weight among those whose fields this sample has; without one, the text."""
        forms = self.options.forms
        while forms:
            form = _pick(forms, self.uniform(TEMPLATE, len(forms)))
            values = [text if name == "" else self.value(name) for _, name in form if name is not None]
            if all(values):
                filling = iter(values)
                return clean("".join(lead + ("" if name is None else next(filling)) for lead, name in form))
            forms = {other: weight for other, weight in forms.items() if other != form}
        return text


def parse_template(text: str) -> tuple[tuple[str, str | None], ...]:
    """Pieces (text before, field): "" is the caption, None nothing. Fields are names, never looked into."""
    where = f"{WHERE}.templates"
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError:
        raise InputError(where, f"'{text}' has a lone brace", "write {{ or }} for a brace") from None
    if any(spec or conversion for _, _, spec, conversion in pieces):
        raise InputError(where, f"'{text}' has a format after ':' or '!'", "write {} or {name}")
    return tuple((lead, name) for lead, name, _, _ in pieces)


def _weights(name: str, given: Mapping[str, float]) -> dict[str, float]:
    for key, weight in given.items():
        if not (isinstance(weight, (int, float)) and math.isfinite(weight) and weight >= 0):
            raise InputError(f"{WHERE}.{name}", f"weight of '{key}': expected a number >= 0, got {weight!r}")
    if given and not sum(given.values()) > 0:
        raise InputError(f"{WHERE}.{name}", "all weights are 0", "give one a weight above 0")
    return {key: float(weight) for key, weight in given.items() if weight > 0}


def _pick(weights: Mapping[Any, float], u: float) -> Any:
    """The key in whose share of the weights u of [0, 1) falls."""
    left = u * sum(weights.values())
    for key, weight in weights.items():
        last = key
        left -= weight
        if left < 0:
            break
    return last


def _cut(words: Sequence[str], limit: int) -> str:
    return " ".join(words[:limit]).rstrip(" ,;:")


def _fitting(sizes: Sequence[int], limit: int) -> int:
    """How many of the first pieces have at most `limit` words together."""
    total = 0
    for i, size in enumerate(sizes):
        total += size
        if total > limit:
            return i
    return len(sizes)


def _object(data: bytes) -> dict[str, Any]:
    """The json of a sample; empty if there is none or it is none (the index says so, too)."""
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _scalar(value: Any) -> str:
    """A text or a number as text; anything else is no text."""
    if isinstance(value, str):
        return clean(value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{value:g}" if number and math.isfinite(value) else ""
