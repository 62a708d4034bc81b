"""Tensors on the disk whose shapes are known and whose values are read when they are asked for.

A file of Stable Diffusion has 4 to 8 GB: what opens, converts and writes it holds one tensor at a time.
Values are read with seek and read: pages of a mapped file would count as this process's memory. torch takes
seconds to import, so what only looks at a file does without: it is imported where values become tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ldm.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Number formats of safetensors, torch's name and bytes of each, in the order in which its own writer stores
# them: the widest first, so that every tensor begins at a multiple of its width.
FORMATS: dict[str, tuple[str, int]] = {
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
    "F32": ("float32", 4),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "BF16": ("bfloat16", 2),
    "F16": ("float16", 2),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
FORMAT_OF = {f"torch.{word}": name for name, (word, _) in FORMATS.items()}  # by the text of torch's dtype
LETTERS = {"F64": "d", "F32": "f", "F16": "e", "BF16": "f"}  # struct's
LONGEST_HEADER = 100_000_000  # bytes; as safetensors itself allows
AGAIN = "get it again, or make it anew"
STARTS = (  # what files that are something else begin with, and what to say
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself", "run git lfs pull there"),
    (b"<!", "is a web page", "get the file itself: a link to /resolve/, not to /blob/"),
    (b"<html", "is a web page", "get the file itself: a link to /resolve/, not to /blob/"),
    (b"GGUF", "is a GGUF file", "give the safetensors file that it was made from"),
    (b"\x89HDF", "is an HDF5 file", "give a safetensors file, or one saved by torch"),
    (b"\x93NUMPY", "is a NumPy array", "give a safetensors file, or one saved by torch"),
    (b"\x1f\x8b", "is compressed by gzip", "unpack it first"),
    (b"7z\xbc\xaf", "is a 7z archive", "unpack it first"),
)


class LazyTensor:
    """Shape and number format of a tensor, and `read()` that gives its values on the CPU, contiguous.

    The format is safetensors' name of it, or torch's dtype. `raw` gives the bytes as `read` has them, without
    torch; None: there is no such way.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype | str,
        read: Callable[[], Tensor],
        raw: Callable[[], bytes] | None = None,
    ) -> None:
        self.shape, self.read, self.raw = shape, read, raw
        self.format = dtype if isinstance(dtype, str) else FORMAT_OF[str(dtype)]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """One that is in memory already, on any device."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor.detach().cpu().contiguous())

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.format)

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * FORMATS[self.format][1]

    @property
    def is_floating_point(self) -> bool:
        return "float" in FORMATS[self.format][0]

    def numbers(self) -> list[float]:
        """Its values in a row, of files mostly read without torch: for tables, not for weights."""
        if self.raw is None or self.format not in LETTERS:
            return [float(value) for value in self.read().flatten().tolist()]
        raw = self.raw()
        if self.format == "BF16":  # the upper half of a float32
            raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
        return list(struct.unpack(f"<{self.count}{LETTERS[self.format]}", raw))

    def to(self, dtype: torch.dtype) -> LazyTensor:
        """In another number format; whole numbers stay what they are."""
        if dtype == self.dtype or not self.is_floating_point:
            return self
        return LazyTensor(self.shape, dtype, lambda: self.read().to(dtype))


Tensors = Mapping[str, LazyTensor]


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype of a number format."""
    import torch

    return getattr(torch, FORMATS[name][0])  # type: ignore[no-any-return]


# ---- reading -------------------------------------------------------------------------------------------


def open_tensors(path: Path) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """(tensors, other values) of a safetensors file or one saved by torch, by content and not by name."""
    from ldm.checkpoints.pickles import open_pickle

    head, size = beginning(path, 64)
    if size == 0:
        raise InputError(f"{path}", "is empty (0 bytes)", AGAIN)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= LONGEST_HEADER:
        return open_safetensors(path)
    for start, what, fix in STARTS:
        if head.lower().startswith(start.lower()):
            raise InputError(f"{path}", what, fix)
    if head.startswith((b"PK", b"\x80")):
        return open_pickle(path)
    what = f"is neither a safetensors file nor one saved by torch (it begins with {head[:8]!r})"
    raise InputError(f"{path}", what, "give a .safetensors, .ckpt or .pt file")


def open_safetensors(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file. Raises InputError for what is none, or is not whole."""
    head, size = beginning(path, 8)
    if size < 8:
        raise InputError(f"{path}", f"is no safetensors file: it has {size} bytes", AGAIN)
    (length,) = struct.unpack("<Q", head)
    if length > LONGEST_HEADER:
        raise InputError(f"{path}", "is no safetensors file (its first 8 bytes are no length)", AGAIN)
    if 8 + length > size:
        what = f"is cut off: it has {size:,} bytes, its header alone needs {8 + length:,}"
        raise InputError(f"{path}", what, AGAIN)
    try:
        header = json.loads(bytes_at(path, 8, length))
        metadata = header.pop("__metadata__", None) or {}
        entries = [(name, *_entry(name, fields)) for name, fields in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}", f"has a damaged safetensors header ({error})", AGAIN) from None
    end = 0
    for name, form, shape, begin, stop in sorted(entries, key=lambda entry: entry[3:]):
        if begin != end or stop - begin != math.prod(shape) * FORMATS[form][1]:
            what = f"has a damaged safetensors header (bytes {begin} to {stop} cannot be {name})"
            raise InputError(f"{path}", what, AGAIN)
        end = stop
    if 8 + length + end != size:
        state = "is cut off" if size < 8 + length + end else "has more bytes than it should"
        raise InputError(f"{path}", f"{state}: {size:,}, its header says {8 + length + end:,}", AGAIN)
    tensors = {name: _lazy(path, form, shape, 8 + length + b) for name, form, shape, b, _ in entries}
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def _entry(name: str, fields: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """Number format, shape, first and last byte of a tensor, as the header says."""
    if fields["dtype"] not in FORMATS:
        raise ValueError(f"{name} has the unknown number format {fields['dtype']}")
    shape, (begin, end) = tuple(fields["shape"]), fields["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name} has the shape {shape} and the bytes {begin} to {end}")
    return fields["dtype"], shape, begin, end


def _lazy(path: Path, form: str, shape: tuple[int, ...], offset: int) -> LazyTensor:
    def read() -> Tensor:
        import torch

        if 0 in shape:
            return torch.empty(shape, dtype=dtype_of(form))
        return read_at(path, offset, lazy.nbytes).view(lazy.dtype).reshape(shape)

    lazy = LazyTensor(shape, form, read, lambda: bytes_at(path, offset, lazy.nbytes))
    return lazy


def beginning(path: Path, count: int) -> tuple[bytes, int]:
    """(up to `count` first bytes, size) of a file. Raises InputError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(count), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise InputError(f"{path}", "not found", "check the path") from None
    except IsADirectoryError:
        raise InputError(f"{path}", "is a folder", "give a file in it") from None
    except OSError as error:
        raise InputError(f"{path}", f"cannot be read ({error.strerror})", "check its permissions") from None


def read_at(path: Path, offset: int, count: int) -> Tensor:
    """`count` bytes of a file, as uint8."""
    import torch

    found = torch.empty(count, dtype=torch.uint8)
    _fill(found.numpy().data, path, offset)
    return found


def bytes_at(path: Path, offset: int, count: int) -> bytes:
    """The same without torch, for few."""
    found = bytearray(count)
    _fill(memoryview(found), path, offset)
    return bytes(found)


def _fill(view: memoryview, path: Path, offset: int) -> None:
    count, have = len(view), 0
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while have < count and (more := file.readinto(view[have:])):
                have += more
    except OSError as error:
        raise InputError(f"{path}", f"cannot be read ({error.strerror})", "check its disk") from None
    if have < count:
        raise InputError(f"{path}", "has become shorter since it was opened", AGAIN)


# ---- writing -------------------------------------------------------------------------------------------


def write_safetensors(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file, on to the disk, holding one tensor at a time; it is there whole or not there.

    Equal tensors give equal bytes, those of safetensors' own writer. Raises OSError, as a full disk does.
    Returns the sha256 of what was written.
    """
    order = list(FORMATS)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].format), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        lazy, begin = tensors[name], end
        end += lazy.nbytes
        header[name] = {"dtype": lazy.format, "shape": list(lazy.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(part, "wb") as file:
            sha256 = hashlib.sha256()
            _put(struct.pack("<Q", len(text)) + text, file, sha256)
            for name in names:  # values are bound to no name here, which the next would be read beside
                _put(_bytes(tensors[name]), file, sha256)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return sha256.hexdigest()


def _put(values: bytes | memoryview, file: IO[bytes], sha256: Any) -> None:
    file.write(values)
    sha256.update(values)


def _bytes(lazy: LazyTensor) -> memoryview:
    import torch

    values = lazy.read()
    assert (tuple(values.shape), values.dtype) == (lazy.shape, lazy.dtype)
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().data
