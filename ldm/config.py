"""Configs to objects: compose the YAML groups, check what the user typed, build what `_target_` names.

Beside the entry points this is the only module that knows hydra and omegaconf. Every mistake of a user ends
in an `InputError` of one line. What `_target_` may name is in `ldm.build`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.build import built, nearest
from ldm.errors import InputError

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"

RENAMED = {  # what other trainers call our keys
    "learning_rate": "optimizer.lr",
    "train_batch_size": "data.batch_size",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "max_train_steps": "trainer.max_steps",
    "mixed_precision": "trainer.precision",
    "snr_gamma": "module.weighting.gamma",
    "resume_from_checkpoint": "resume",
}

SECRET = re.compile(r"(^|_)(api_?key|access_?key|secret|secret_key|password|passwd|credentials?|token)$")
NOT_SECRET = re.compile(r"(placeholder|initializer|pad|eos|bos|unk|mask|null|start|end)_token$")

ABSENT = "(absent)"  # what a node has under a key that it does not have


# ---- compose -------------------------------------------------------------------------------------------


def compose(name: str, overrides: Sequence[str], config_dir: Path | None = None) -> DictConfig:
    """The config NAME.yaml with its groups and the user's overrides, checked: all of it resolves."""
    folder = Path(config_dir or CONFIG_DIR).absolute()
    if not (folder / f"{name}.yaml").is_file():
        raise InputError(f"{folder}/{name}.yaml", "no such config", "run from a checkout of the repository")
    groups = _groups(folder)
    parsed = [_parse(text) for text in overrides]
    values = [override for override in parsed if override.key_or_group not in groups]
    choices = [_line(override, groups) for override in parsed if override.key_or_group in groups]
    for override in parsed:
        if override.key_or_group in groups:
            _check_option(override, groups)
    reference = _composed(folder, name, choices)
    known = OmegaConf.to_container(reference, resolve=False)
    for override in values:
        _check_key(override, known, groups)
    config = _composed(folder, name, [_line(override, groups) for override in parsed])
    _check_missing(config)
    _check_secrets(OmegaConf.to_container(config, resolve=False))
    for override in values:
        if not override.is_delete():
            key = override.key_or_group
            _check_type(key, _select(reference, key), _select(config, key))
    plain(config)
    return config


def _groups(folder: Path) -> dict[str, list[str]]:
    """Names of the options of each group folder, nested ones as `a/b`."""
    groups: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.yaml")):
        if file.parent != folder:
            groups.setdefault(file.parent.relative_to(folder).as_posix(), []).append(file.stem)
    return groups


def _parse(text: str) -> Override:
    key, equals, value = text.partition("=")
    if not equals and not text.startswith("~"):
        raise InputError(text, "not an override", "write KEY=VALUE")
    parser = OverridesParser.create()
    try:
        override = parser.parse_override(text)
    except HydraException:
        quote = next((q for q in "\"'" if q not in value), None)
        fix = f"quote it, for the shell too: '{key}=\"{value}\"'"
        if not quote or value.startswith(("[", "{", "(", '"', "'")) or "${" in value or not key:
            raise InputError(key or text, f"cannot read the value {value!r}", fix) from None
        try:  # a text that is no value of hydra's grammar, as /data/{00..31}.tar: meant as it stands
            override = parser.parse_override(f"{key}={quote}{value}{quote}")
        except HydraException:
            raise InputError(key, f"cannot read the value {value!r}", fix) from None
    if not isinstance(override.key_or_group, str) or not override.key_or_group:
        raise InputError(text, "no key before '='", "write KEY=VALUE")
    if override.is_sweep_override():
        fix = f"write a list as '{key}=[{value}]', a text as '{key}=\"{value}\"'"
        raise InputError(key, f"{value!r} is a sweep, and one command is one run", fix)
    return override


def _line(override: Override, groups: Mapping[str, list[str]]) -> str:
    """The override as hydra takes it, which knows `~GROUP` where our users write `GROUP=null`."""
    nothing = override.key_or_group in groups and not override.is_delete() and override.value() is None
    return f"~{override.key_or_group}" if nothing else str(override.input_line)


def _check_option(override: Override, groups: Mapping[str, list[str]]) -> None:
    group, chosen = override.key_or_group, override.value()
    options = groups[group]
    for choice in chosen if isinstance(chosen, list) else [chosen]:
        if choice is None or (isinstance(choice, str) and choice.removesuffix(".yaml") in options):
            continue
        near = nearest(str(choice), options)
        fix = (f"did you mean {near}? " if near else "") + f"(have: {', '.join(options)})"
        raise InputError(f"{group}={_shown(choice)}", "no such option", fix)


def _composed(folder: Path, name: str, overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    OmegaConf.register_new_resolver("gpu", _gpu, replace=True)
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            return hydra_compose(config_name=name, overrides=overrides)
    except OmegaConfBaseException as error:
        raise _unresolved(error) from None
    except (HydraException, yaml.YAMLError) as error:
        raise _refused(error, name) from None


def _gpu(there: Any, absent: Any) -> Any:
    """${gpu:a,b}: a where this machine has a GPU for torch, else b."""
    import torch  # late: most configs do not ask, and it takes seconds

    return there if torch.cuda.is_available() else absent


def _refused(error: Exception, name: str) -> InputError:
    """One line for what hydra says in many."""
    text = " ".join(str(error).split("Config search path")[0].split())
    if match := re.search(r"Could not override '([^']+)'. No match in the defaults list.*use (\S+)", text):
        return InputError(match[1], f"{name}.yaml has no such group", f"add it with {match[2]}")
    if match := re.search(r"Multiple values for (\S+?)\.", text):
        return InputError(
            match[1], f"{name}.yaml has a choice for this group", f"write {match[1]}=... without +"
        )
    if match := re.search(r"In '([^']+)': Could not find '([^']+)'(.*)", text):
        return InputError(f"{match[1]}.yaml", f"names {match[2]}, which does not exist", match[3].strip())
    return InputError(f"{name}.yaml", text)


def _unresolved(error: OmegaConfBaseException) -> InputError:
    """One line for an interpolation that leads nowhere, naming the key that holds it."""
    what = str(error).splitlines()[0].rstrip(".")
    return InputError(
        str(error.full_key or "config"), what, "correct the ${...} there, or set the key it names"
    )


def _check_key(override: Override, known: Any, groups: Mapping[str, list[str]]) -> None:
    """Refuse a key that the config does not have; `+key=` and `++key=` add one on purpose."""
    key = override.key_or_group
    _refuse_secret(key, override.value())
    parts, node, depth = key.split("."), known, 0
    while depth < len(parts) and (child := _child(node, parts[depth])) is not ABSENT:
        node, depth = child, depth + 1
    if depth == len(parts):
        if override.is_add():
            raise InputError(key, "already in the config", f"write {key}=... without +")
        return
    if override.is_add() or override.is_force_add():
        return
    parent = ".".join(parts[:depth])
    unknown = f"{parent}.{parts[depth]}" if parent else parts[depth]
    children = [str(child) for child in node] if isinstance(node, dict) else []
    if near := _nearest_key(parts, parent, children if parent else [*children, *groups], known):
        raise InputError(unknown, "unknown key", f"did you mean {near}?")
    raise InputError(unknown, "unknown key", f"{parent or 'config'} has: {', '.join(children)}")


def _child(node: Any, part: str) -> Any:
    if isinstance(node, dict):
        return node.get(part, ABSENT)
    if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
        return node[int(part)]
    return ABSENT


def _nearest_key(parts: list[str], parent: str, children: list[str], known: Any) -> str | None:
    """Our name of a foreign key; else a child of the parent; else a key elsewhere with such a last word."""
    if parts[-1] in RENAMED:
        return RENAMED[parts[-1]]
    if parent and not children:  # the parent is a value, not a mapping
        return parent
    if near := nearest(parts[parent.count(".") + 1 if parent else 0], children):
        return f"{parent}.{near}" if parent else near
    elsewhere = {leaf.rpartition(".")[2]: leaf for leaf in reversed(list(_leaves(known)))}
    near = nearest(parts[-1], elsewhere)
    return elsewhere[near] if near else None


def _leaves(node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of all values that are not mappings."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _check_missing(config: DictConfig) -> None:
    stack: list[tuple[str, Any]] = [("", OmegaConf.to_container(config, resolve=False))]
    while stack:
        key, value = stack.pop()
        if isinstance(value, str) and value == "???":
            raise InputError(key, "missing value", f"set {key}=...")
        if isinstance(value, dict):
            stack += [(f"{key}.{child}" if key else str(child), value[child]) for child in reversed(value)]
    for key in config.get("required") or []:  # for where the default is null, which ??? does not replace
        if _select(config, key) is None:
            raise InputError(key, "missing value", f"set {key}=...")


def _select(config: DictConfig, key: str) -> Any:
    """The resolved value at a dotted key; None where there is none."""
    try:
        value = OmegaConf.select(config, key, throw_on_missing=False)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException:
        return None


def _check_type(key: str, default: Any, value: Any) -> None:
    """Refuse a value whose type differs from that of the default; None on either side says nothing."""
    if default is None or value is None:
        return
    if isinstance(default, dict) and isinstance(value, dict):
        for child in default.keys() & value.keys():
            _check_type(f"{key}.{child}", default[child], value[child])
        return
    if isinstance(default, dict):
        raise InputError(key, f"expected a mapping, got {value!r}", f"set {key}.NAME=...")
    if isinstance(default, bool):
        wrong = not isinstance(value, bool)
    elif isinstance(default, int):
        wrong = not isinstance(value, int) or isinstance(value, bool)
    else:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        wrong = isinstance(default, float) and not number
    if wrong:
        whole = isinstance(default, int) and isinstance(value, float) and value.is_integer()
        fix = f"write {int(value)}" if whole else ""
        raise InputError(key, f"expected {type(default).__name__}, got {value!r}", fix)


def _check_secrets(node: Any, path: str = "") -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            _check_secrets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for value in node:
            _check_secrets(value, path)
    else:
        _refuse_secret(path, node)


def _refuse_secret(key: str, value: Any) -> None:
    """Configs are stored, logged and shared: a key, token or password in one is refused, unseen."""
    *_, parent, last = ["", *key.lower().split(".")]
    if value in (None, "", "???") or isinstance(value, bool) or NOT_SECRET.search(last):
        return
    if SECRET.search(last):
        variable = f"{parent}_{last}" if parent and SECRET.fullmatch(last) else last
        raise InputError(key, "do not put secrets in the config", f"set {variable.upper()}")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


# ---- plain containers and text -------------------------------------------------------------------------


def plain(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The config as resolved dicts, lists, strings and numbers."""
    if not isinstance(config, DictConfig):
        return dict(config)
    try:
        found = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise _unresolved(error) from None
    assert isinstance(found, dict)
    return found  # type: ignore[return-value]


def to_yaml(config: DictConfig | Mapping[str, Any]) -> str:
    """Resolved YAML text, keys in their order; refuses secrets."""
    values = plain(config)
    _check_secrets(values)
    return OmegaConf.to_yaml(OmegaConf.create(values))


def from_yaml(text: str, where: str = "config.yaml") -> DictConfig:
    """What `to_yaml` wrote; an interpolation is refused, because it could read this machine's environment."""
    try:
        config = OmegaConf.create(text)
        if not isinstance(config, DictConfig):
            raise InputError(where, "not a mapping of keys to values")
        stack = list(OmegaConf.to_container(config, resolve=False).items())  # type: ignore[union-attr]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(where, "not a YAML config: " + " ".join(str(error).split())) from None
    while stack:
        key, value = stack.pop()
        if isinstance(value, dict):
            stack += [(f"{key}.{child}", value[child]) for child in value]
        elif isinstance(value, list):
            stack += [(f"{key}[{i}]", item) for i, item in enumerate(value)]
        elif isinstance(value, str) and "${" in value:
            raise InputError(f"{where}: {key}", "a stored config holds no ${...}", "write the value itself")
    return config


def split_arguments(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Flags ({"cfg": "job"} and {"help": ""} are all there are) and overrides of a command line."""
    flags: dict[str, str] = {}
    overrides = []
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            overrides.append(word)
        elif word in ("-h", "--help"):
            flags["help"] = ""
        elif word in ("-c", "--cfg") or word.startswith("--cfg="):
            value = word.partition("=")[2] if "=" in word else next(words, "")
            if value != "job":
                raise InputError("--cfg", f"expected job, got {value!r}", "write --cfg job")
            flags["cfg"] = value
        else:
            raise InputError(word, "unknown flag", "options are KEY=VALUE; flags are --help and --cfg job")
    return flags, overrides


def build(config: DictConfig | Mapping[str, Any], /, **kwargs: Any) -> Any:
    """The object that `_target_` names, nested ones first; `_partial_: true` gives a partial function.

    `kwargs` are objects handed to the outermost constructor, over what the config says. Containers arrive as
    plain dicts and lists. What is not allowed, or what a constructor refuses, names the key of its section.
    """
    path = str(config._get_full_key(None)) if isinstance(config, DictConfig) else ""
    return built(plain(config), path, kwargs)
