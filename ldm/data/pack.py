"""A folder of pictures and captions -> tar shards in img2dataset's layout, and the writer of such shards.

00000.tar holds KEY.jpg (or png, webp), KEY.txt, KEY.json for each sample, KEY = shard and place in it; beside
it lies 00000_stats.json. The same input gives the same bytes. What cannot be used is counted and named.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import webdataset
from PIL import Image, ImageOps

from ldm.data.image import BadImage, decode, header_size, refusing
from ldm.errors import InputError

VERBATIM = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with more after it
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
DATASET, METADATA = "dataset.json", "metadata.jsonl"
OURS = ("key", "caption", "status")  # columns of the json that the writer fills in
MAX_CAPTION = 100_000  # characters
NAMED = 20  # left-out files that the report names
log = logging.getLogger(__name__)


class ShardWriter:
    """Writes samples into out/00000.tar, out/00001.tar, ...; a shard has its name once it is complete."""

    def __init__(self, out: Path, samples_per_shard: int) -> None:
        self.out, self.samples_per_shard = out, samples_per_shard
        self.digits = max(4, len(str(samples_per_shard - 1)))
        self.shards: list[Path] = []
        self.count = 0  # samples in the open shard
        self.file: BinaryIO | None = None
        out.mkdir(parents=True, exist_ok=True)

    def write(self, image: bytes, extension: str, caption: str, facts: dict[str, Any]) -> str:
        """Append a sample and return its key; `facts` goes into its json, after key and caption."""
        if self.file is None:
            self.file = self._shard(".tar.tmp").open("wb")
            self.tar = webdataset.TarWriter(self.file, encoder=False, mtime=0)
        key = f"{len(self.shards):05d}{self.count:0{self.digits}d}"
        meta = json.dumps({"key": key, "caption": caption, **facts, "status": "success"}).encode()
        self.tar.write({"__key__": key, extension: image, "txt": caption.encode(), "json": meta})
        self.count += 1
        if self.count == self.samples_per_shard:
            self._finish()
        return key

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is None:
            return
        if kind is None:
            self._finish()
        else:
            with suppress(OSError):  # a full disk
                self.tar.close()
            self.file.close()
            self._shard(".tar.tmp").unlink()

    def _shard(self, end: str) -> Path:
        return self.out / f"{len(self.shards):05d}{end}"

    def _finish(self) -> None:
        assert self.file is not None
        self.tar.close()
        self.file.close()
        facts = {"count": self.count, "successes": self.count, "status_dict": {"success": self.count}}
        self._shard("_stats.json").write_text(json.dumps(facts) + "\n")
        shard = self._shard(".tar")
        os.replace(self._shard(".tar.tmp"), shard)
        self.shards.append(shard)
        self.file, self.count = None, 0


@dataclass
class Packed:
    """What `pack` did: the shards, how many samples they hold, and what was left out and why."""

    shards: list[Path] = field(default_factory=list)
    samples: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> files (or lines of metadata.jsonl)
    named: list[str] = field(default_factory=list)  # "reason: file" of the first few

    def leave_out(self, reason: str, name: str) -> None:
        self.left_out[reason] += 1
        if len(self.named) < NAMED:
            self.named.append(f"{reason}: {name}")

    def reasons(self) -> str:
        return ", ".join(f"{reason} {count:,}" for reason, count in self.left_out.most_common())

    def summary(self) -> list[str]:
        """Lines for the user."""
        head = f"{self.samples:,} samples in {len(self.shards):,} shards"
        if not self.left_out:
            return [head]
        rest = self.left_out.total() - len(self.named)
        return [
            f"{head}; left out: {self.reasons()}",
            *self.named,
            *([f"and {rest:,} more"] if rest else []),
        ]


class Entry(NamedTuple):
    """One picture of the folder, before anything is read."""

    name: str  # relative to the folder, with slashes
    path: Path
    row: dict[str, Any] | None  # of metadata.jsonl; None: the caption is in a .txt beside the picture


class Rejected(ValueError):
    """A caption that cannot be used; the message is the reason code."""


def pack(
    folder: str | Path, out: str | Path, samples_per_shard: int = 10_000, progress: bool = True
) -> Packed:
    """Pack the pictures under `folder` that have a caption, ordered by name, into shards in `out`.

    Captions come from img.txt beside img.jpg (columns from img.json, if there), or from lines
    {"file_name", "text", ...} of any metadata.jsonl in it (its other columns go along). JPEG, PNG and WebP
    are copied byte for byte, other formats become PNG (their first frame). `out` must be new, empty, or
    packed before. Raises `InputError` if nothing can be used.
    """
    folder, out = Path(folder), Path(out)
    if samples_per_shard < 1:
        raise InputError(f"samples_per_shard={samples_per_shard}", "expected at least 1")
    if not folder.is_dir():
        raise InputError(str(folder), "no such folder", "give a folder of pictures with captions")
    report = Packed()
    entries = _entries(folder, report)
    _claim(out)
    with ShardWriter(out, samples_per_shard) as writer:
        for entry in _shown(entries, progress):
            try:
                caption, facts = _caption(entry)
                image, extension, (width, height) = _image(entry.path)
            except (Rejected, BadImage) as error:
                report.leave_out(str(error), entry.name)
                continue
            size = {"width": width, "height": height, "original_width": width, "original_height": height}
            writer.write(image, extension, caption, {**facts, **size, "file_name": entry.name})
            report.samples += 1
    report.shards = writer.shards
    if not report.samples:
        raise InputError(
            str(folder),
            f"no picture with a caption in it ({report.reasons() or 'it is empty'})",
            f"put img.txt beside img.jpg, or write {METADATA} with file_name and text",
        )
    facts = {"samples": report.samples, "shards": len(report.shards), "left_out": report.left_out}
    _mark(out, complete=True, **facts)
    return report


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` if it is not there yet; it appears whole, whichever process is first."""
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        make(temporary)
        os.rename(temporary, folder)
    except OSError as error:
        if not folder.is_dir():  # nobody was faster
            raise InputError(
                "data.cache_dir", f"cannot make {folder}: {error}", "name a folder that can be written"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def listing(folder: Path) -> str:
    """One line a file of the folder, name, size and time of change: what `pack` would read."""
    lines = []
    for path in _walk(folder):
        stat = path.stat()
        lines.append(f"{path.relative_to(folder).as_posix()} {stat.st_size} {stat.st_mtime_ns}")
    return "\n".join(lines)


def _walk(folder: Path) -> Iterator[Path]:
    """Files under the folder, sorted, without hidden ones; links to folders are followed, not in circles."""
    seen = {folder.resolve()}
    for here, folders, files in os.walk(folder, followlinks=True):
        new = {name: (Path(here) / name).resolve() for name in sorted(folders) if not name.startswith(".")}
        folders[:] = [name for name, real in new.items() if real not in seen]
        seen.update(new.values())
        yield from (Path(here) / name for name in sorted(files) if not name.startswith("."))


def _entries(folder: Path, report: Packed) -> list[Entry]:
    """The pictures to pack; files that are none, or that nothing describes, go into the report."""
    files = {path.relative_to(folder).as_posix(): path for path in _walk(folder)}
    pictures = {name for name, path in files.items() if path.suffix.lower() in SUFFIXES}
    tables = [name for name, path in files.items() if path.name == METADATA]
    if tables:
        entries = [entry for name in tables for entry in _table(folder, files[name], report)]
        used = {entry.name for entry in entries} | set(tables)
    else:
        entries = [Entry(name, files[name], None) for name in sorted(pictures)]
        stems = {name.rpartition(".")[0] for name in pictures}
        used = pictures | {f"{stem}{end}" for stem in stems for end in (".txt", ".json")}
    for name in sorted(files.keys() - used):
        reason = "no_caption" if name in pictures else "no_image" if name.endswith(".txt") else "other_file"
        report.leave_out(reason, name)
    return entries


def _table(folder: Path, table: Path, report: Packed) -> Iterator[Entry]:
    """The lines of one metadata.jsonl, whose file names are relative to it."""
    where = table.relative_to(folder).as_posix()
    for i, line in enumerate(table.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            path = Path(os.path.normpath(table.parent / row["file_name"]))
            name = path.relative_to(os.path.normpath(folder)).as_posix()
        except (ValueError, KeyError, TypeError):  # no JSON, no such column, or a file outside the folder
            report.leave_out("bad_line", f"{where} line {i}")
            continue
        if path.is_file():
            yield Entry(name, path, row)
        else:
            report.leave_out("no_image", f"{name} ({where} line {i})")


def _caption(entry: Entry) -> tuple[str, dict[str, Any]]:
    """The caption and the other columns of a picture."""
    facts: dict[str, Any] = {}
    if entry.row is not None:
        text = entry.row.get("text")
        facts = {key: value for key, value in entry.row.items() if key not in ("file_name", "text")}
    else:
        try:
            text = entry.path.with_suffix(".txt").read_bytes().decode("utf-8-sig")
        except FileNotFoundError:
            raise Rejected("no_caption") from None
        except UnicodeDecodeError:
            raise Rejected("bad_caption") from None
        beside = entry.path.with_suffix(".json")
        if beside.is_file():
            try:
                facts = dict(json.loads(beside.read_bytes()))
            except (ValueError, TypeError):
                raise Rejected("bad_json") from None
    if not isinstance(text, str) or not text.strip():
        raise Rejected("no_caption")
    if (
        len(text) > MAX_CAPTION or text.encode("utf-8", "ignore").decode() != text
    ):  # JSON can hold half a pair
        raise Rejected("bad_caption")
    return text.strip(), {key: value for key, value in facts.items() if key not in OURS}


def _image(path: Path) -> tuple[bytes, str, tuple[int, int]]:
    """Bytes for the shard, their extension, and width and height; the whole picture was decoded once."""
    with refusing("unreadable"):
        data = path.read_bytes()
    with refusing("not_image"):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        extension = VERBATIM.get(image.format or "")
    if extension is None:
        with refusing("corrupt_image"):
            data, extension = _png(image), "png"
    size = header_size(data)
    decode(data, 1)
    return data, extension, size


def _png(image: Image.Image) -> bytes:
    """The first frame as PNG, upright, with its transparency."""
    image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode not in ("L", "LA", "RGB", "RGBA", "I;16"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _claim(out: Path) -> None:
    """Make `out` ours and clear it of an earlier packing; refuse a folder with anything else in it."""
    if out.exists() and not out.is_dir():
        raise InputError(str(out), "is a file", "give a folder for the shards")
    if out.is_dir() and any(out.iterdir()):
        try:
            ours = json.loads((out / DATASET).read_bytes())["made_by"] == "ldm data pack"
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise InputError(str(out), "is not empty, and was not made by ldm data pack", "give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.tar", "*.tar.tmp", "*_stats.json"):
        for path in out.glob(pattern):
            path.unlink()
    _mark(out, complete=False)


def _mark(out: Path, **facts: Any) -> None:
    """The file by which a folder is known as ours."""
    (out / DATASET).write_text(json.dumps({"made_by": "ldm data pack", **facts}, indent=1) + "\n")


def _shown(entries: Sequence[Entry], progress: bool) -> Iterator[Entry]:
    """The entries, under a progress bar."""
    if not progress:
        yield from entries
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(entries, "packing", console=Console(stderr=True), transient=True)
