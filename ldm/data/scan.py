"""One tar shard -> a row for each good sample, and a count of what is wrong with the rest.

A sample is adjacent members KEY.jpg|jpeg|png|webp, KEY.txt and, if there, KEY.json (img2dataset's layout).
Its class is the number in KEY.cls (webdataset's), which may stand for the text, or else `label` of the json.
Nothing is decoded: image sizes come from headers. What a stranger wrote is capped and checked here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.data.columns import SIZES
from ldm.data.image import BadImage, header_size
from ldm.data.tar import Damage, Member, walk
from ldm.errors import InputError

IMAGES = ("jpg", "jpeg", "png", "webp")
KINDS = {**dict.fromkeys(IMAGES, "image"), "txt": "caption", "json": "json", "cls": "label"}
CAPS = {"image": 64 << 20, "caption": 1 << 20, "json": 1 << 20, "label": 64}  # bytes of a member
KEY = re.compile(r"[0-9A-Za-z_/-]{1,128}")
COLUMN = re.compile(r"[0-9A-Za-z_.:-]{1,64}")
MAX_COLUMNS = 64
HEAD = 8 << 10  # bytes of an image read for its size; most headers fit
FIELDS = {
    "key": "S1",
    "image_offset": "i8",
    "image_size": "i4",
    "caption_offset": "i8",
    "caption_size": "i4",
    "json_offset": "i8",
    "json_size": "i4",  # 0: none
    **dict.fromkeys(SIZES, "i4"),
}
REPORTED = 10  # problems of a shard that are kept by name


class Problem(NamedTuple):
    """One thing that is wrong: where, which sample (empty: the shard), reason code, byte offset."""

    shard: str
    key: str
    reason: str
    offset: int


@dataclass
class Part:
    """What one shard holds; `digest` covers names, sizes, captions, metadata and image headers."""

    samples: NDArray[Any]  # FIELDS, then float32 columns of the numbers in the json, NaN where missing
    digest: str
    damage: Counter[str] = field(default_factory=Counter)  # reason -> count
    problems: list[Problem] = field(default_factory=list)  # the first few


class Rejected(ValueError):
    """A sample that cannot be used; the message is the reason code."""


def groups(file: BinaryIO, total: int) -> Iterator[tuple[str, dict[str, Member], bool] | Damage]:
    """Key, members by kind, and whether the file was cut in it, of each run of adjacent members."""
    key = ""
    group: dict[str, Member] = {}
    for item in walk(file, total):
        if isinstance(item, Damage):
            if item.reason == "truncated" and group:
                yield key, group, True
                group = {}
            yield item
            continue
        folder, slash, base = item.name.rpartition("/")
        stem, _, extension = base.partition(".")
        kind = KINDS.get(extension.lower())
        if kind is None:
            continue
        if group and (folder + slash + stem != key or kind in group):
            yield key, group, False
            group = {}
        key, group[kind] = folder + slash + stem, item
    if group:
        yield key, group, False


def numbers(meta: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a sample's json; whole numbers that float32 cannot hold are ids, not scores."""
    found = {}
    for name, value in meta.items():
        if isinstance(value, (int, float)) and COLUMN.fullmatch(name) and name not in FIELDS:
            if isinstance(value, int) and abs(value) > 1 << 24 or not np.isfinite(value):
                continue
            found[name] = float(value)
    return found


def read_meta(data: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError):
        raise Rejected("bad_json") from None
    if not isinstance(meta, dict):
        raise Rejected("bad_json")
    return meta


def read_label(data: bytes) -> int:
    """The class in a .cls member."""
    try:
        return int(data)
    except ValueError:
        raise Rejected("bad_label") from None


def length_of(value: Any, default: int) -> int:
    """A side in pixels from the json, if it is one."""
    return int(value) if isinstance(value, (int, float)) and 0 < value < 1 << 31 else default


class Scanner:
    """Reads the members of one open shard into rows."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.seen: set[str] = set()
        self.rows: list[tuple[Any, ...]] = []
        self.scores: dict[str, dict[int, float]] = {}

    def read(self, member: Member, size: int | None = None) -> bytes:
        self.file.seek(member.offset)
        data = self.file.read(member.size if size is None else min(size, member.size))
        self.hash.update(data)
        return data

    def size_of(self, image: Member) -> tuple[int, int]:
        try:
            return header_size(self.read(image, HEAD))
        except BadImage as error:
            if str(error) != "not_image" or image.size <= HEAD:
                raise
        return header_size(self.read(image))  # a long EXIF or colour profile comes first, or it is WebP

    def add(self, key: str, group: dict[str, Member], cut: bool) -> None:
        """Append the sample's row, or raise `Rejected` or `BadImage`."""
        seen, complete = key in self.seen, "image" in group and bool(group.keys() & {"caption", "label"})
        self.seen.add(key)
        if not KEY.fullmatch(key):
            raise Rejected("bad_name")
        if cut:
            raise Rejected("truncated")
        if seen:
            raise Rejected("duplicate" if complete else "unordered")
        if not complete:
            raise Rejected("no_caption" if "image" in group else "no_image")
        if any(member.size > CAPS[kind] for kind, member in group.items()):
            raise Rejected("too_large")
        image, meta, label = group["image"], group.get("json"), group.get("label")
        caption = group.get("caption", Member(image.name, image.offset, 0))
        self.hash.update(f"{key} {image.name} {image.size} {caption.size} {meta and meta.size}\n".encode())
        width, height = self.size_of(image)
        try:
            text = self.read(caption).decode("utf-8").strip()
        except UnicodeDecodeError:
            raise Rejected("bad_caption") from None
        facts = {} if label is None else {"label": read_label(self.read(label))}  # first: columns are limited
        facts = {**facts, **(read_meta(self.read(meta)) if meta else {}), **facts}
        for name, value in numbers(facts).items():
            if name in self.scores or len(self.scores) < MAX_COLUMNS:
                self.scores.setdefault(name, {})[len(self.rows)] = value
        sizes = (
            width,
            height,
            length_of(facts.get("original_width"), width),
            length_of(facts.get("original_height"), height),
            len(text),
        )
        places = (image.offset, image.size, caption.offset, caption.size)
        self.rows.append((key.encode(), *places, *((meta.offset, meta.size) if meta else (0, 0)), *sizes))

    def samples(self) -> NDArray[Any]:
        widest = max((len(row[0]) for row in self.rows), default=1)
        fields = [(name, f"S{widest}" if name == "key" else kind) for name, kind in FIELDS.items()]
        table = np.empty(len(self.rows), fields + [(name, "f4") for name in self.scores])
        for i, name in enumerate(FIELDS):
            table[name] = [row[i] for row in self.rows]
        for name, values in self.scores.items():
            table[name] = np.nan
            table[name][list(values)] = list(values.values())
        return table


def scan_shard(path: str | Path) -> Part:
    """Index one plain tar; raises `InputError` if it is compressed: that leaves no byte offsets."""
    shard = Path(path).name
    part = Part(np.empty(0, list(FIELDS.items())), "")

    def problem(reason: str, key: str, offset: int) -> None:
        part.damage[reason] += 1
        if len(part.problems) < REPORTED:
            part.problems.append(Problem(shard, key, reason, offset))

    with open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        if file.read(2) == b"\x1f\x8b":
            what = f"{path} is gzip-compressed, which leaves no byte offsets"
            raise InputError("data.shards", what, "unpack it with gunzip")
        scanner = Scanner(file)
        for item in groups(file, total):
            if isinstance(item, Damage):
                problem(item.reason, "", item.offset)
                continue
            key, group, cut = item
            try:
                scanner.add(key, group, cut)
            except (Rejected, BadImage) as error:
                problem(str(error), key, min(member.offset for member in group.values()))
    if not scanner.seen:
        part.damage.clear()
        part.problems.clear()
        problem("not_tar" if total else "empty", "", 0)
    part.samples = scanner.samples()
    scanner.hash.update(repr(sorted(part.damage.items())).encode())
    part.digest = scanner.hash.hexdigest()
    return part
