"""Plain dicts with a `_target_` to objects, and the list of what a `_target_` may name.

A checkpoint carries its config, so whoever opens a stranger's checkpoint builds what a stranger wrote. Only
what is listed here is ever called: the object is judged, not the string, because one object has many names.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.errors import InputError

ROOTS = (  # (what a `_target_` may start with, where the object it names must be defined)
    ("ldm.", "ldm."),
    ("torch.optim.", "torch.optim."),
    ("lightning.pytorch.Trainer", "lightning.pytorch.trainer."),
    ("lightning.pytorch.callbacks.", "lightning.pytorch.callbacks."),
    ("lightning.pytorch.loggers.", "lightning.pytorch.loggers."),
    ("lightning.pytorch.profilers.", "lightning.pytorch.profilers."),
    ("lightning.pytorch.strategies.", "lightning.pytorch.strategies."),
)
NEVER = tuple(  # our own code that writes, deletes or starts things
    f"ldm.{part}."
    for part in ("build", "checkpoints", "cli", "cluster", "config", "errors", "pipeline", "sampling")
)
FUNCTIONS = (  # elsewhere only classes are built
    "ldm.autoencoder.discriminator.",
    "ldm.diffusion.",
    "ldm.evaluation.",
    "ldm.training.",
)
ALLOWED = (
    "ldm.*, torch.optim.*, lightning.pytorch.{Trainer,callbacks.*,loggers.*,profilers.*,strategies.*}; "
    "functions: ldm.{autoencoder.discriminator,diffusion,evaluation,training}.*"
)


def built(node: Any, path: str = "", kwargs: Mapping[str, Any] | None = None) -> Any:
    """The object described by `node`, nested ones first; `path` is its dotted place in the config.

    `kwargs` go to the outermost constructor, over the node's own arguments. Raises InputError.
    """
    if isinstance(node, (list, tuple)):
        return [built(value, f"{path}[{i}]") for i, value in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    kwargs = kwargs or {}
    values = {key: built(value, _join(path, key)) for key, value in node.items() if key not in kwargs}
    if "_target_" in values:
        return _call(values, path, kwargs)
    if kwargs:
        raise InputError(path or "config", "has no _target_, so it cannot be built")
    return values


def nearest(word: str, words: Iterable[Any]) -> str | None:
    """The most similar of `words`, if one is similar at all."""
    found = difflib.get_close_matches(word, [str(w) for w in words], n=1, cutoff=0.6)
    return found[0] if found else None


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _call(values: dict[str, Any], path: str, kwargs: Mapping[str, Any]) -> Any:
    target = resolved(values.pop("_target_"), path)
    partial = values.pop("_partial_", False)
    arguments = {**values, **kwargs}
    name = f"{target.__module__}.{target.__qualname__}"
    parameters = inspect.signature(target).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for key in arguments:
            if key not in parameters:
                near = nearest(key, parameters)
                fix = f"did you mean {near}?" if near else f"it takes: {', '.join(parameters) or 'nothing'}"
                raise InputError(_join(path, key), f"{name} takes no such argument", fix)
    if partial:
        return functools.partial(target, **arguments)
    try:
        return target(**arguments)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(path or name, " ".join(str(error).split()), f"raised by {name}") from error


def resolved(target: Any, path: str = "") -> Any:
    """The class, or function of ours, that a `_target_` names, if it is in the allowed list.

    Only real modules are imported, never attributes walked, and the object must be defined below the root
    that its name claims: an alias (`ldm.random.math.sqrt`, `logging.os.system`) or a re-export does not pass.
    """
    where = f"{_join(path, '_target_')}={target!r}"
    refused = InputError(where, f"is not in the allowed list ({ALLOWED})")
    if not isinstance(target, str) or not all(p.isidentifier() and p[0] != "_" for p in target.split(".")):
        raise refused
    home = next((home for prefix, home in ROOTS if target.startswith(prefix)), None)
    if home is None or target.startswith(NEVER):
        raise refused
    module_name, _, name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if "is not a package" in str(error):
            raise refused from None
        missing = error.name or str(error)
        package = missing.partition(".")[0]
        if package != missing and package != "ldm":
            raise refused from None
        what = (
            f"there is no module {missing}"
            if package == "ldm"
            else f"needs {package}, which is not installed"
        )
        raise InputError(where, what) from None
    if not hasattr(module, name):
        near = nearest(name, vars(module))
        raise InputError(where, f"{module_name} has no {name}", f"did you mean {near}?" if near else "")
    found = getattr(module, name)
    defined = f"{getattr(found, '__module__', '')}."
    buildable = inspect.isclass(found) or (inspect.isfunction(found) and defined.startswith(FUNCTIONS))
    if (
        not buildable
        or not defined.startswith(home)
        or defined.startswith(NEVER)
        or found.__qualname__ != name
    ):
        raise refused
    return found
