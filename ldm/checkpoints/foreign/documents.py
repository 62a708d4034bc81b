"""JSON documents of diffusers folders."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.errors import InputError


def load_json(path: Path, required: bool = True) -> dict[str, Any]:
    """The mapping in a file; without the file {}, or if it is `required` an InputError."""
    where = f"{path.parent.name}/{path.name}"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise InputError(where, "no such file", "a diffusers folder has it") from None
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(where, f"cannot be read as JSON ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise InputError(where, "is no mapping of names to values")
    return found


@contextlib.contextmanager
def understood(where: str) -> Iterator[None]:
    """InputError that names the document `where` for whatever its values make fail in the block."""
    try:
        yield
    except InputError as error:
        if str(error).startswith(where):
            raise
        raise InputError(where, f"{error}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(where, f"has a value that makes no sense ({said:.120})") from None


def refuse_others(found: Mapping[str, Any], same: Mapping[str, Any], where: str) -> None:
    """InputError for a field of `found` that has another value than in `same` (or in its tuple)."""
    for name, allowed in same.items():
        values = allowed if isinstance(allowed, tuple) else (allowed,)
        if name in found and found[name] not in values:
            what = f"{name}={found[name]!r} changes the computation, and there is no such option here"
            raise InputError(where, what, f"have: {', '.join(map(repr, values))}")
