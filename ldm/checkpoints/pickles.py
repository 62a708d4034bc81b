"""Files saved by torch (zip archives with a pickle in them), read without running anything that they say."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoints.lazy import AGAIN, LazyTensor, beginning, bytes_at, dtype_of, read_at
from ldm.checkpoints.unpickle import Refused, Stored, unpickle
from ldm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_PICKLE = 1 << 28  # bytes of data.pkl, where no values of tensors are: SD 1's has 0.5 MB
MOST_ENTRIES = 1 << 18  # visited in nested mappings, which may hold each other many times
DEEPEST = 16  # levels of them
LONGEST_TEXT = 10_000  # characters of a plain value
LEGACY = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch's own files began with before its version 1.6
)


def open_pickle(path: Path) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """(tensors, other values) of a file saved by torch, without running anything that it says.

    Tensors of `state_dict` have the names that they have in it; without it all do that lie in mappings, with
    dots between the levels. The other values are the plain ones at the top: global_step, epoch, ... Raises
    InputError for a file that is none, is damaged, or wants other code to run than torch's own.
    """
    archive = _Archive(path)
    try:
        found = unpickle(archive.read("data.pkl", LONGEST_PICKLE))
        named = dict(_named(found)) if isinstance(found, dict) else {}
        tensors = {name: archive.lazy(value) for name, value in named.items()}
    except Refused as error:
        what = f"asks to run {_shown(error)}; refused, and nothing of it was run"
        raise InputError(f"{path}", what, "get a .safetensors file of it") from None
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, struct.error) as error:
        raise InputError(f"{path}", f"its data.pkl cannot be read ({_shown(error)})", AGAIN) from None
    if not tensors:
        has = ", ".join(map(repr, list(found)[:5])) if isinstance(found, dict) else type(found).__name__
        raise InputError(f"{path}", f"holds no tensors by name, but {_shown(has)}", "give a checkpoint")
    return tensors, {str(key): value for key, value in found.items() if _is_plain(value)}


def _named(found: dict[Any, Any]) -> Iterator[tuple[str, Stored]]:
    """The tensors of `state_dict` if it has any, else all."""
    inner = found.get("state_dict")
    own = dict(_walk(inner)) if isinstance(inner, dict) else {}
    return iter(own.items()) if own else _walk(found)


def _walk(top: Mapping[Any, Any]) -> Iterator[tuple[str, Stored]]:
    """Tensors in nested mappings by dotted name, in order."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), top)]
    for _ in range(MOST_ENTRIES):
        if not waiting:
            return
        names, value = waiting.pop()
        if isinstance(value, Stored):
            yield ".".join(names), value
        elif isinstance(value, dict):
            if len(names) > DEEPEST:
                raise ValueError(f"its mappings are more than {DEEPEST} levels deep")
            waiting += [((*names, str(key)), inner) for key, inner in reversed(value.items())]
    raise ValueError(f"it has more than {MOST_ENTRIES} entries")


def _is_plain(value: Any) -> bool:
    """Whether it is one of the values that JSON has, and no container."""
    if isinstance(value, int):
        return abs(value) < 1 << 63
    return value is None or isinstance(value, float) or isinstance(value, str) and len(value) < LONGEST_TEXT


def _shown(text: object) -> str:
    """The file's own words, in one short line."""
    return str(text).encode("unicode_escape").decode()[:120]


# ---- the archive ---------------------------------------------------------------------------------------


class _Archive:
    """The members of a zip archive of torch, which lie in it as they are, in a folder of any name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        head, size = beginning(path, len(LEGACY))
        if head == LEGACY:
            convert = f"torch.save(torch.load({path.name!r}, weights_only=True), 'new.pt')"
            raise InputError(f"{path}", "was saved by torch before 1.6", f"convert it, in Python: {convert}")
        if not head.startswith(b"PK"):
            raise InputError(f"{path}", "was not saved by torch", "give a .safetensors, .ckpt or .pt file")
        try:
            with zipfile.ZipFile(path) as archive:
                members = {member.filename: member for member in archive.infolist()}
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            what = f"is cut off or damaged, at {size:,} bytes ({_shown(error)})"
            raise InputError(f"{path}", what, AGAIN) from None
        if any(member.header_offset + member.compress_size > size for member in members.values()):
            raise InputError(f"{path}", f"is cut off, at {size:,} bytes", AGAIN)
        roots = [name.removesuffix("data.pkl") for name in members if name.count("/") == 1]
        roots = [root for root in roots if f"{root}data.pkl" in members]
        if len(roots) != 1:
            fix = "unpack it, and give a checkpoint that is in it"
            raise InputError(f"{path}", "is a zip archive that torch did not save", fix)
        self.members = {name.removeprefix(roots[0]): member for name, member in members.items()}
        if "constants.pkl" in self.members:
            raise InputError(f"{path}", "is a TorchScript program", "give the weights it was made from")
        if "byteorder" in self.members and self.read("byteorder", 16) != b"little":
            raise InputError(f"{path}", "was saved on a big-endian machine", "save it on a usual one")

    def place(self, name: str) -> int:
        """Where the bytes of a member begin."""
        member = self.members[name]
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise ValueError(f"{name} is compressed or encrypted")
        header = bytes_at(self.path, member.header_offset, 30)
        if not header.startswith(b"PK\3\4"):
            raise ValueError(f"{name} is not where the archive says")
        return member.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))

    def read(self, name: str, most: int) -> bytes:
        """A small member, whole."""
        size = self.members[name].file_size
        if size > most:
            raise ValueError(f"{name} has {size:,} bytes")
        return bytes_at(self.path, self.place(name), size)

    def lazy(self, stored: Stored) -> LazyTensor:
        name, needed = f"data/{stored.storage.key}", stored.storage.nbytes
        have = self.members[name].file_size
        if have < needed:
            raise ValueError(f"{name} has {have:,} bytes, its tensors need {needed:,}")
        in_a_row = stored.strides in ((), (1,))  # as numbers and tables are
        raw = (lambda: bytes_at(self.path, *self.extent(stored))) if in_a_row else None
        return LazyTensor(stored.shape, stored.format, lambda: self.values(stored), raw)

    def extent(self, stored: Stored) -> tuple[int, int]:
        """Where its bytes begin, and how many they are."""
        begin = self.place(f"data/{stored.storage.key}") + stored.offset * stored.width
        return begin, stored.span * stored.width

    def values(self, stored: Stored) -> Tensor:
        import torch

        dtype = dtype_of(stored.format)
        if 0 in stored.shape:
            return torch.empty(stored.shape, dtype=dtype)
        numbers = read_at(self.path, *self.extent(stored)).view(dtype)
        return numbers.as_strided(stored.shape, stored.strides).contiguous()
