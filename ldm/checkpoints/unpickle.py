"""What a pickle of torch says, without running anything of it.

A pickle is a program: it names functions of any module and has them called. Here nothing is ever looked up
by such a name. A small machine follows the instructions (the standard library's pickletools lists them); it
has plain values, and the few functions that tensors and containers are written with, each replaced by one of
ours. Any other name may be mentioned (released SD 1 files have a Lightning class as a key) and is left out; a
pickle that wants it called is refused. Texts and whole numbers alone are hashed, compared or shown: other
values may hold each other so often that this would never end.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ldm.checkpoints.lazy import FORMAT_OF, FORMATS

STORAGES = {  # number formats, in safetensors' words
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
    "torch.ComplexFloatStorage": "C64",
    "torch.storage.UntypedStorage": "U8",
}
NUMPY = {  # its codes, in struct's letters
    "f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b",
    "u8": "Q", "u4": "I", "u2": "H", "u1": "B", "b1": "?",
}  # fmt: skip
INERT = (  # classes of plain data: what a pickle makes of them is left out, and does not refuse the file
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "argparse.Namespace",
    "collections.defaultdict",
    "builtins.set",  # this and the next three: as protocol 2 writes them
    "builtins.frozenset",
    "__builtin__.set",
    "__builtin__.frozenset",
    "numpy.core.multiarray._reconstruct",  # of arrays
    "numpy._core.multiarray._reconstruct",
    "torch.device",
)


class Refused(Exception):
    """The pickle wants something called that is none of ours; the argument is its name."""


class Left:
    """A value that is left out."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function, and no more than that."""

    name: str


@dataclass(slots=True)
class NumpyFormat:
    code: str
    order: str = "<"


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of `count` numbers of a format, in a part of the file that is called `key`."""

    key: str
    format: str
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * FORMATS[self.format][1]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a storage; offset and strides count numbers of its format."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    format: str

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return FORMATS[self.format][1]

    @property
    def span(self) -> int:
        """How many numbers lie from its first to its last."""
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return 0 if 0 in self.shape else last + 1


# ---- the functions that may be called ------------------------------------------------------------------


def _tensor(storage: Storage, offset: int, shape: Any, strides: Any, *_: Any) -> Stored:
    return _stored(storage, offset, shape, strides, storage.format)


def _tensor_of_format(storage: Storage, offset: int, shape: Any, strides: Any, *rest: Any) -> Stored:
    return _stored(storage, offset, shape, strides, FORMAT_OF[rest[2].name])


def _stored(storage: Storage, offset: int, shape: Any, strides: Any, form: str) -> Stored:
    found = Stored(storage, offset, tuple(shape), tuple(strides), form)
    if not all(type(n) is int and n >= 0 for n in (offset, *found.shape, *found.strides)):
        raise ValueError("the shape, strides or offset of a tensor are no whole numbers")
    room = storage.nbytes
    if (offset + found.span) * found.width > room:
        raise ValueError(f"a tensor of shape {found.shape} reaches beyond its {room} bytes")
    return found


def _parameter(data: Stored, *_: Any) -> Stored:
    return data


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    _put(found, [item for key, value in pairs for item in (key, value)])
    return found


def _numpy_format(code: Any, *_: Any) -> NumpyFormat | Left:
    return NumpyFormat(code) if type(code) is str else Left()


def _scalar(kind: NumpyFormat, raw: bytes = b"") -> Any:
    return struct.unpack(kind.order + NUMPY[kind.code], raw)[0] if kind.code in NUMPY else Left()


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":  # the one that protocol 2 writes bytes in
        raise ValueError("it has text in another encoding than latin1")
    return text.encode("latin1")


CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_format,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": tuple,
    "collections.OrderedDict": _ordered,
    "numpy.dtype": _numpy_format,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "_codecs.encode": _encoded,
}


def _call(function: Any, args: Any) -> Any:
    """The value of a call: ours, nothing, or a refusal."""
    if not isinstance(function, Global) or not isinstance(args, (tuple, list)):
        raise ValueError(f"it calls a {type(function).__name__}")
    if function.name in CALLS:
        return CALLS[function.name](*args)
    if function.name in INERT:
        return Left()
    raise Refused(function.name)


def _put(target: Any, items: list[Any]) -> None:
    """Key, value, key, value ... into a mapping; an entry is left out if its key is no text or number."""
    if isinstance(_changed(target), dict):
        pairs = zip(items[::2], items[1::2], strict=True)
        target.update((key, value) for key, value in pairs if type(key) in (str, int))
    elif not isinstance(target, Left):
        raise ValueError(f"it puts entries into a {type(target).__name__}")


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(_changed(target), list):
        target.extend(items)
    elif not isinstance(target, Left):
        raise ValueError(f"it adds to a {type(target).__name__}")


def _set_state(target: Any, state: Any) -> None:
    """Attributes of an OrderedDict, a tensor, and what is left out go nowhere."""
    if isinstance(_changed(target), NumpyFormat):
        target.order = ">" if state[1] == ">" else "<"
    elif not isinstance(target, (dict, Stored, Left)):
        raise ValueError(f"it sets the state of a {type(target).__name__}")


def _changed(target: Any) -> Any:
    """The same, unless it is a class or function: to change that counts as a call."""
    if isinstance(target, Global):
        raise Refused(target.name)
    return target


def _storage(found: Any) -> Storage:
    """What a persistent id stands for."""
    word, kind, key, _, count = found[:5]
    if word != "storage" or type(key) is not str or type(count) is not int or count < 0:
        raise ValueError("a persistent id is no storage")
    if kind.name not in STORAGES:
        raise ValueError(f"numbers in a {kind.name}")
    return Storage(key, STORAGES[kind.name], count)


# ---- the machine ---------------------------------------------------------------------------------------

PUSHED = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
    "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
UNKNOWN = {"PERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
MADE: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,  # as a list: what a pickle says is not hashed, but for text and numbers
}


def unpickle(pickle: bytes) -> Any:
    """Plain values, `Stored` tensors, and `Global` and `Left` in the place of all else.

    Raises Refused, or what bad data raises: ValueError, TypeError, LookupError, AttributeError, struct.error.
    """
    machine = Machine()
    for opcode, arg, _ in pickletools.genops(pickle):
        if opcode.name == "STOP":
            break
        machine.step(opcode.name, arg)
    return machine.stack.pop()


class Machine:
    """A stack, those that marks set aside, and a memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, arg: Any) -> None:
        stack = self.stack
        match name:
            case _ if name in PUSHED:
                stack.append(arg)
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self.memo[arg] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self.memo[arg])
            case _ if name in MADE:
                stack.append(MADE[name]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(items)))
            case "GLOBAL":
                stack.append(Global(arg.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(Global(".".join((module, name))))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                args = stack.pop()
                stack.append(_call(stack.pop(), args))
            case "NEWOBJ_EX":  # its named arguments go: nothing of ours has any
                _, args = stack.pop(), stack.pop()
                stack.append(_call(stack.pop(), args))
            case "BUILD":
                state = stack.pop()
                _set_state(stack[-1], state)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _put(stack[-1], [key, value])
            case "APPEND":
                value = stack.pop()
                _extend(stack[-1], [value])
            case "DUP":
                stack.append(stack[-1])
            case "POP" if stack:
                stack.pop()
            case "MARK":
                self.marks.append(stack)
                self.stack = []
            case "PROTO" | "FRAME":
                pass
            case _ if name in UNKNOWN:
                raise ValueError(f"it uses {name}, which torch never does")
            case _:
                self.step_to_mark(name, arg)

    def step_to_mark(self, name: str, arg: Any) -> None:
        """Steps that take all that lies above the last mark."""
        items, stack = self.stack, self.marks.pop()
        self.stack = stack
        match name:
            case "SETITEMS":
                _put(stack[-1], items)
            case "APPENDS" | "ADDITEMS":
                _extend(stack[-1], items)
            case "TUPLE":
                stack.append(tuple(items))
            case "LIST" | "FROZENSET":
                stack.append(items)
            case "DICT":
                stack.append({})
                _put(stack[-1], items)
            case "INST":
                stack.append(_call(Global(arg.replace(" ", ".", 1)), items))
            case "OBJ":
                stack.append(_call(items[0], items[1:]))
            case "POP" | "POP_MARK":
                pass
