"""Walk the 512-byte headers of a plain tar, and say where it is damaged.

Not `tarfile`: that ends without an error at a bad header, a zeroed block or a cut between members, so damage
is mostly silent there. Here the end marker is required, checksums are verified, and after a bad header the
walk goes on at the next good one. Nothing is ever extracted. Format: POSIX pax interchange, GNU long names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
MAX_HEADER_DATA = 1 << 20  # bytes of a pax header or a long name


class Member(NamedTuple):
    """A regular file of the tar: `size` bytes at `offset`."""

    name: str
    offset: int
    size: int


class Damage(NamedTuple):
    """Reason `truncated` (cut, or no end marker) or `bad_header`, at a byte offset."""

    reason: str
    offset: int


class Header(NamedTuple):
    name: str
    size: int
    kind: bytes


def number(field: bytes) -> int | None:
    """A size field: octal digits, or GNU's base 256; None if it is neither, or negative."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else None
    try:
        value = int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return None
    return value if value >= 0 else None


def parse(block: bytes) -> Header | None:
    """The header in a block of 512 bytes, or None if its checksum or size field is wrong."""
    checksum = number(block[148:156])
    if checksum != sum(block) - sum(block[148:156]) + 8 * 32:  # the field itself counts as spaces
        return None
    size = number(block[124:136])
    if size is None:
        return None
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    full = prefix + b"/" + name if prefix else name
    return Header(full.decode("utf-8", "surrogateescape"), size, block[156:157])


def pax_records(data: bytes) -> dict[str, bytes]:
    """The "LENGTH KEY=VALUE" lines of a pax header; what is malformed ends the list."""
    records: dict[str, bytes] = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            break
        record, data = data[len(length) + 1 : int(length) - 1], data[int(length) :]
        key, _, value = record.partition(b"=")
        records[key.decode("utf-8", "replace")] = value
    return records


def walk(file: BinaryIO, total: int) -> Iterator[Member | Damage]:
    """Regular members and damage of a tar of `total` bytes, in file order.

    Damage inside a member's data cannot be seen here, except that the file ends in it.
    """
    at = zeros = 0
    lost = False  # after a bad header, until the next good one
    name: str | None = None  # a long name, and a size, for the member that follows
    override: int | None = None
    while at + BLOCK <= total:
        file.seek(at)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            break
        if not block.strip(b"\0"):
            zeros, at = zeros + 1, at + BLOCK
            continue
        header = None if lost and block[257:262] != b"ustar" else parse(block)
        if (header is None or zeros) and not lost:  # zeros before the end are a wiped header
            yield Damage("bad_header", at - zeros * BLOCK)
            lost, name, override = True, None, None
        zeros = 0
        if header is None:
            at += BLOCK
            continue
        lost = False
        size = header.size if override is None or header.kind in (b"x", b"g", b"L", b"K") else override
        start, at = at + BLOCK, at + BLOCK + -(-size // BLOCK) * BLOCK
        if start + size > total:
            yield Damage("truncated", start)
            return
        if header.kind in (b"x", b"L"):
            if size > MAX_HEADER_DATA:
                yield Damage("bad_header", start)
                continue
            data = file.read(size)
            if header.kind == b"L":
                name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
                continue
            records = pax_records(data)
            if "path" in records:
                name = records["path"].decode("utf-8", "surrogateescape")
            if records.get("size", b"").isdigit():
                override = int(records["size"])
        elif header.kind in (b"g", b"K"):
            continue
        else:
            if header.kind in (b"0", b"\0", b"7"):
                yield Member(name or header.name, start, size)
            name, override = None, None
    if zeros < 2:
        yield Damage("truncated", at)
