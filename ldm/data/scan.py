"""One tar shard -> a row for each good sample, and a count of what is wrong with the rest.

A sample is adjacent members KEY.jpg|jpeg|png|webp, KEY.txt and, if there, KEY.json (img2dataset's layout).
Its class is the number in KEY.cls (webdataset's), which may stand for the text, or else `label` of the json.
KEY.NAME.npy is an array of kind NAME; with one of those, a sample needs neither picture nor text.
Nothing is decoded: image sizes come from headers. What a stranger wrote is capped and checked here.
The file is read once, forwards: all of it, or without checksums the headers only.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from ldm.data.columns import SIZES
from ldm.data.hashes import HASHES, hashes_of
from ldm.data.image import BadImage, header_size
from ldm.data.remote import public
from ldm.data.sidecars import Sidecars
from ldm.data.storage import ReadAhead, is_remote, open_shard
from ldm.data.tar import Damage, Member, walk

IMAGES = ("jpg", "jpeg", "png", "webp")
KINDS = {**dict.fromkeys(IMAGES, "image"), "txt": "caption", "json": "json", "cls": "cls"}
ARRAY = re.compile(r"([a-z][a-z0-9_]{0,31})\.npy")
TEXTS = ("caption", "json", "cls")  # read whole; of the others the first HEAD bytes, if not for a checksum
CAP = 64 << 20  # bytes of a picture or an array
CAPS = {"image": CAP, "caption": 1 << 20, "json": 1 << 20, "cls": 64}  # bytes of a member
KEY = re.compile(r"[0-9A-Za-z_/-]{1,128}")
COLUMN = re.compile(r"[0-9A-Za-z_.:-]{1,64}(?<!_offset)(?<!_size)(?<!_check)")
MAX_COLUMNS = 64
HEAD = 8 << 10  # bytes of an image read for its size; most headers fit
BUFFER = 1 << 20  # bytes of a read of a local file
PLACE = {"offset": "i8", "size": "i4", "check": "u4"}  # of a member; size 0: none, check 0: not known
RESERVED = ("key", *SIZES, *HASHES)
REPORTED = 10  # problems of a shard that are kept by name


class Problem(NamedTuple):
    """One thing that is wrong: where, which sample (empty: the shard), reason code, byte offset."""

    shard: str
    key: str
    reason: str
    offset: int


@dataclass
class Part:
    """What one shard holds; `digest` covers names, sizes, texts, metadata, scores and image headers."""

    samples: NDArray[Any]  # key, place of each kind, SIZES, HASHES, then float32 scores, NaN where missing
    digest: str = ""
    damage: Counter[str] = field(default_factory=Counter)  # reason -> count
    problems: list[Problem] = field(default_factory=list)  # the first few
    checked: bool = True  # checksums are known
    promised: int | None = None  # samples, by the _stats.json beside the tar


class Rejected(ValueError):
    """A sample that cannot be used; the message is the reason code."""


class Found(NamedTuple):
    """A member, its first bytes or all of them, and the low 32 bits of their xxh3_64, or 0."""

    member: Member
    data: bytes
    check: int


def kind_of(extension: str) -> str | None:
    """What a member is, by its name after the key; None: nothing of ours."""
    array = ARRAY.fullmatch(extension)
    if array and array[1] not in KINDS.values():
        return array[1]
    return KINDS.get(extension)


def check_of(data: bytes) -> int:
    """The checksum of a member in the index; never 0, which stands for "not known"."""
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF or 1


def numbers(meta: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a sample's json; whole numbers that float32 cannot hold are ids, not scores."""
    found = {}
    for name, value in meta.items():
        if isinstance(value, (int, float)) and COLUMN.fullmatch(name) and name not in RESERVED:
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
    """A side in pixels, or a length, from the json, if it is one."""
    return int(value) if isinstance(value, (int, float)) and 0 < value < 1 << 31 else default


class Scanner:
    """Reads the members of one open shard into rows."""

    def __init__(self, file: BinaryIO, total: int, checksums: bool) -> None:
        self.file, self.total, self.checksums = file, total, checksums
        self.hash = hashlib.sha256()
        self.seen: set[str] = set()
        self.rows: list[tuple[Any, ...]] = []  # key, start, SIZES, HASHES
        self.places: dict[str, dict[int, Found]] = {"caption": {}, "json": {}}  # kind -> row -> place
        self.scores: dict[str, dict[int, float]] = {}

    def groups(self) -> Iterator[tuple[str, dict[str, Found], bool] | Damage]:
        """Key, members by kind, and whether the file was cut in it, of each run of adjacent members."""
        key = ""
        group: dict[str, Found] = {}
        for item in walk(self.file, self.total):
            if isinstance(item, Damage):
                if item.reason == "truncated" and group:
                    yield key, group, True
                    group = {}
                yield item
                continue
            folder, slash, base = item.name.rpartition("/")
            stem, _, extension = base.partition(".")
            kind = kind_of(extension.lower())
            if kind is None:
                continue
            if group and (folder + slash + stem != key or kind in group):
                yield key, group, False
                group = {}
            key, group[kind] = folder + slash + stem, self.take(kind, item)
        if group:
            yield key, group, False

    def take(self, kind: str, member: Member) -> Found:
        """Read what is needed of a member; nothing of one that is over its cap."""
        if member.size > CAPS.get(kind, CAP):
            return Found(member, b"", 0)
        whole = self.checksums or kind in TEXTS
        self.file.seek(member.offset)
        data = self.file.read(member.size if whole else min(HEAD, member.size))
        return Found(member._replace(name=""), data, check_of(data) if whole else 0)

    def size_of(self, image: Found) -> tuple[int, int]:
        try:
            return header_size(image.data)
        except BadImage as error:
            if str(error) != "not_image" or len(image.data) == image.member.size:
                raise
        self.file.seek(image.member.offset)  # a long EXIF or colour profile comes first, or it is WebP
        return header_size(self.file.read(image.member.size))

    def add(self, key: str, group: dict[str, Found], cut: bool) -> None:
        """Append the sample's row, or raise `Rejected` or `BadImage`."""
        arrays = group.keys() - set(KINDS.values())
        complete = bool(arrays) or "image" in group and bool(group.keys() & {"caption", "cls"})
        seen = key in self.seen
        self.seen.add(key)
        if not KEY.fullmatch(key):
            raise Rejected("bad_name")
        if cut:
            raise Rejected("truncated")
        if seen:
            raise Rejected("duplicate" if complete else "unordered")
        if not complete:
            raise Rejected("no_caption" if "image" in group else "no_image")
        if any(found.member.size > CAPS.get(kind, CAP) for kind, found in group.items()):
            raise Rejected("too_large")
        try:
            text = group["caption"].data.decode("utf-8").strip() if "caption" in group else ""
        except UnicodeDecodeError:
            raise Rejected("bad_caption") from None
        width, height = self.size_of(group["image"]) if "image" in group else (0, 0)
        label = {"label": read_label(group["cls"].data)} if "cls" in group else {}
        facts = {**label, **(read_meta(group["json"].data) if "json" in group else {}), **label}
        self._keep(key, group, facts, (width, height), len(text))

    def _keep(
        self, key: str, group: dict[str, Found], facts: dict[str, Any], size: tuple[int, int], length: int
    ) -> None:
        row = len(self.rows)
        for name, value in numbers(facts).items():
            if name in self.scores or len(self.scores) < MAX_COLUMNS:
                self.scores.setdefault(name, {})[row] = value
        for kind, found in group.items():
            self.hash.update(f"{key} {kind} {found.member.size}\n".encode())
            self.hash.update(found.data if kind in TEXTS else found.data[:HEAD])
            self.places.setdefault(kind, {})[row] = found._replace(data=b"")
        width, height = (
            side or length_of(facts.get(name), 0) for side, name in zip(size, SIZES[:2], strict=True)
        )
        sizes = (
            width,
            height,
            length_of(facts.get("original_width"), width),
            length_of(facts.get("original_height"), height),
            length if "caption" in group else length_of(facts.get("caption_length"), 0),
        )
        start = min(found.member.offset for found in group.values())
        self.rows.append((key.encode(), start, *sizes, *hashes_of(facts).values()))

    def samples(self) -> NDArray[Any]:
        """The rows as a table; a kind that a sample has not is 0 bytes at the sample's start."""
        widest = max((len(row[0]) for row in self.rows), default=1)
        names = ("key", "start", *SIZES, *HASHES)
        columns = dict(zip(names, zip(*self.rows, strict=True), strict=True)) if self.rows else {}
        hashes = [name for name in HASHES if any(columns.get(name, ()))]
        fields = [("key", f"S{widest}")]
        fields += [(f"{kind}_{what}", code) for kind in self.places for what, code in PLACE.items()]
        fields += [(name, "i4") for name in SIZES] + [(name, "u8") for name in hashes]
        table = np.zeros(len(self.rows), fields + [(name, "f4") for name in self.scores])
        for name in columns.keys() & set(table.dtype.names or ()):
            table[name] = columns[name]
        for kind, places in self.places.items():
            rows, found = list(places), places.values()
            table[f"{kind}_offset"] = columns.get("start", ())
            table[f"{kind}_offset"][rows] = [place.member.offset for place in found]
            table[f"{kind}_size"][rows] = [place.member.size for place in found]
            table[f"{kind}_check"][rows] = [place.check for place in found]
        for name, values in self.scores.items():
            table[name] = np.nan
            table[name][list(values)] = list(values.values())
        return table


def scan_shard(path: str | os.PathLike[str], checksums: bool = True) -> Part:
    """Index one plain tar or url, with what lies beside it; raises OSError if it cannot be read."""
    path = os.fspath(path)
    if not is_remote(path):
        with open(path, "rb", buffering=BUFFER) as file:
            return scan_file(file, file.seek(0, io.SEEK_END), path, checksums)
    with closing(open_shard(path)) as shard, ReadAhead(shard) as file:
        return scan_file(file, shard.size, path, checksums)


def scan_file(file: BinaryIO, total: int, path: str, checksums: bool) -> Part:
    """`scan_shard` of an open file of `total` bytes."""
    scanner, beside = Scanner(file, total, checksums), Sidecars(path)
    part = Part(np.empty(0, [("key", "S1")]), checked=checksums, promised=beside.promised())
    shard = PurePosixPath(public(path)).name

    def problem(reason: str, key: str = "", offset: int = 0, count: int = 1) -> None:
        part.damage[reason] += count
        if len(part.problems) < REPORTED:
            part.problems.append(Problem(shard, printable(key), reason, offset))

    file.seek(0)
    gzip = file.read(2) == b"\x1f\x8b"  # it leaves no byte offsets
    for item in () if gzip else scanner.groups():
        if isinstance(item, Damage):
            problem(item.reason, offset=item.offset)
            continue
        key, group, cut = item
        try:
            scanner.add(key, group, cut)
        except (Rejected, BadImage) as error:
            problem(str(error), key, min(found.member.offset for found in group.values()))
    if not scanner.seen:
        part.damage.clear()
        part.problems.clear()
        if part.promised != 0:
            problem("gzip" if gzip else "not_tar" if total else "empty")
    elif part.promised is not None and part.promised != len(scanner.seen):
        problem("count_mismatch", count=abs(part.promised - len(scanner.seen)))
    part.samples = beside.joined(scanner.samples(), scanner.hash, MAX_COLUMNS, usable)
    scanner.hash.update(repr(sorted(part.damage.items())).encode())
    part.digest = scanner.hash.hexdigest()
    return part


def printable(key: str) -> str:
    """A stranger's key for a terminal, a log and a page: no control characters, not endlessly long."""
    text = key[:128].encode("ascii", "backslashreplace").decode()
    return "".join(sign if sign.isprintable() else f"\\x{ord(sign):02x}" for sign in text)


def usable(name: str) -> bool:
    """Whether a table's column may become a score."""
    return COLUMN.fullmatch(name) is not None and name not in RESERVED
