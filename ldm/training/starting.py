"""Where the weights of a run come from: other checkpoints for a new run, its own record for a resumed one.

In a new run trained networks take theirs from `init_from`, and frozen ones from `NAME_from`, else from
`init_from` where that holds them; else they brought them (`pretrained`). All ranks read, and nothing is
written but by `store`: frozen weights that came from a checkpoint lie in the run; their source may go away.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoints import native
from ldm.checkpoints.differences import is_measured
from ldm.checkpoints.lazy import LazyTensor
from ldm.checkpoints.model import NETWORKS, Asked, Model
from ldm.checkpoints.networks import network_entry, network_path, open_network, store_network
from ldm.checkpoints.opening import open_model
from ldm.config import build, from_yaml, plain, to_yaml
from ldm.errors import InputError
from ldm.training.callbacks.checkpoint import require_same
from ldm.training.hidden import hidden, refuse_hidden, without_tags
from ldm.training.module import TrainingModule

PART = re.compile(r"parts\.[^.]+\.|")  # of a conditioner made of others
STATISTICS = ("latent_shift", "latent_scale")
SAMPLING = {"steps_offset"}  # of a noise scheduler: nothing that a network is trained for

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """A frozen network that the run is to store: what to build it by, and its name there if it has one."""

    tensors: Mapping[str, Tensor | LazyTensor]
    config_yaml: str
    sha256: str = ""

    def lies_in(self, run: Path) -> bool:
        return bool(self.sha256) and (run / "networks" / self.sha256).is_dir()


def opened(cfg: Any, newest: Path | None, stage: str = "") -> dict[str, Model]:
    """The checkpoints that the config names, by option; none for a run that is resumed."""
    if newest is not None and is_measured(cfg):
        what = f"has a checkpoint, {newest.name}, and a benchmark is no part of a run"
        raise InputError(f"run_name={cfg.run_name}", what, "choose another run_name")
    if newest is not None:
        return {}
    options = {"init_from": stage or None} | {f"{name}_from": None for name in NETWORKS}
    found = {option: _opened(cfg, option, stage) for option, stage in options.items()}
    return {option: model for option, model in found.items() if model is not None}


def building(cfg: Any, newest: Path | None, sources: Mapping[str, Model]) -> Any:
    """The config to build the networks by: no tags of weights that a checkpoint brings."""
    section = plain(cfg.get("conditioner") or {})
    bare = without_tags(section, tags_only=True)
    if bare == section:
        return cfg
    with torch.device("meta"):
        network = build(bare)
    source = sources.get("conditioner_from") or sources.get("init_from")
    try:
        if source is not None:
            _fitting("conditioner", network, cfg, source)
        elif not _recorded(network, newest):
            return cfg
    except InputError:  # it brings its own weights then, and why is said when they are filled in
        return cfg
    changed = copy.deepcopy(cfg)
    changed.conditioner = bare
    return changed


def _recorded(network: nn.Module, newest: Path | None) -> bool:
    """Whether the checkpoint names the weights of this conditioner."""
    entries = native.load_state(newest).get("networks", {}) if newest else {}
    if newest is None or "conditioner" not in entries:
        return False
    path = network_path(newest, entries["conditioner"])
    section = plain(from_yaml(native.load_document(path, "config.yaml"), f"{path}/config.yaml"))
    with torch.device("meta"):
        return hidden(build(section)) == hidden(network)


def fill(
    module: TrainingModule, cfg: Any, newest: Path | None, sources: Mapping[str, Model]
) -> dict[str, Kept]:
    """Give the module's networks the weights that the run starts with, or is resumed with from `newest`.

    `sources` are those of `opened`. Returns the frozen ones that did not bring theirs, by name. Raises
    InputError for what does not fit, and for a frozen network that nothing brings weights of, unless the run
    is only measured.
    """
    if any(
        getattr(part, "draws_only", False)
        for _, network, _ in _networks(module)
        for part in network.modules()
    ):
        raise InputError("conditioner", "reads what no training data has", "it is for sampling alone")
    if newest is not None:
        return _resumed(module, cfg, newest)
    init, kept = sources.get("init_from"), {}
    if init is not None:
        _compare_targets(cfg, init)
    for name, network, frozen in _networks(module):
        own = sources.get(f"{name}_from")
        found = own or (init if init is not None and (init.of(name) or not frozen) else None)
        empty = not is_measured(cfg) and (_unfilled(network) or (frozen and name == "autoencoder"))
        if found is not None:
            if frozen and name == "autoencoder":
                _require_measured(found)
            changed = _fill(name, network, cfg, found, optional=frozen and own is None and not empty)
            if frozen and (changed or empty):
                kept[name] = Kept(network.state_dict(), _rebuilding(name, network, cfg))
        elif empty:
            what = f"nothing brings the weights of the {name}, which are not trained here"
            raise InputError(f"{name}_from", what, "set it, or init_from, to a checkpoint that holds them")
    return kept


def store(kept: Mapping[str, Kept], run: Path, checkpoints: Path) -> dict[str, dict[str, str]]:
    """Put the networks into the run's `networks/`; returns what state.json says of them. On rank 0 alone."""
    entries = {}
    for name, one in kept.items():
        sha256 = one.sha256 if one.lies_in(run) else store_network(run, one.tensors, one.config_yaml)
        entries[name] = network_entry(run, sha256, checkpoints / "step")
    return entries


def nbytes(kept: Mapping[str, Kept], run: Path) -> int:
    """What `store` is going to write."""
    new = [one for one in kept.values() if not one.lies_in(run)]
    return sum(value.nbytes for one in new for value in one.tensors.values())


def _networks(module: TrainingModule) -> Iterator[tuple[str, nn.Module, bool]]:
    """(name, network, whether it is frozen) of those that have weights."""
    for name in NETWORKS:
        network = module.frozen.get(name) or getattr(module, name, None)
        if network is not None and network.state_dict():
            yield name, network, name in module.frozen


def _unfilled(network: nn.Module) -> bool:
    return any(getattr(part, "unfilled", False) for part in network.modules())


def _opened(cfg: Any, option: str, stage: str | None = None) -> Model | None:
    """The checkpoint of an option; what a foreign one cannot tell, and that alone, the config says."""
    path = cfg.get(option)
    if path in (None, ""):
        return None
    where = f"{option}={path}"
    if not isinstance(path, str | int):
        raise InputError(where, "is no path", "give one path")
    model = open_model(str(path), where=option, stage=stage, otherwise=_said(cfg))
    model.facts["where"] = where
    return model


def _where(source: Model) -> str:
    """The option that gave it, for messages."""
    return str(source.facts["where"])


def _said(cfg: Any) -> Asked:
    """What the config says of what a file may not tell."""
    section = {name: cfg.get(name) or {} for name in (*NETWORKS, "noise_scheduler")}
    towers = [section["conditioner"], *(section["conditioner"].get("parts") or {}).values()]
    sizes = [part["model"] for part in towers if isinstance(part.get("model"), Mapping)]
    said = {
        "num_heads": section["backbone"].get("num_heads"),
        "head_dim": section["backbone"].get("head_dim"),
        "text_heads": sizes[0].get("heads") if sizes else None,
        "prediction_type": section["noise_scheduler"].get("prediction_type"),
        "latent_scale": section["autoencoder"].get("latent_scale"),
    }
    usable: dict[str, Any] = {
        key: value for key, value in said.items() if isinstance(value, int | float | str)
    }
    return Asked(**usable)


def _compare_targets(cfg: Any, source: Model) -> None:
    """Warn of another process or prediction type: some change them on purpose."""
    theirs, ours = (sections.get("noise_scheduler") or {} for sections in (source.config, cfg))
    for key in sorted(theirs.keys() & ours.keys() - SAMPLING):
        if theirs[key] != ours[key]:
            said = key.strip("_"), theirs[key], ours[key]
            log.warning("%s was trained with %s=%s, this run has %s", _where(source), *said)


# ---- one network ---------------------------------------------------------------------------------------


def _fill(name: str, network: nn.Module, cfg: Any, source: Model, optional: bool = False) -> bool:
    """Copy the weights of the source into the network; returns whether any changed.

    `optional`: the network brought its own, and keeps them if those of the source belong to another.
    """
    try:
        found = _fitting(name, network, cfg, source)
    except InputError as error:
        if not optional:
            raise
        log.warning("%s: the %s keeps its own weights (%s)", _where(source), name, error)
        return False
    changed = False
    with torch.no_grad():
        for key, own in network.state_dict().items():
            value = found[key].to(own.dtype).read().to(own.device)
            changed = changed or not torch.equal(own, value)
            own.copy_(value)
    log.info("%s: weights of the %s", _where(source), name)
    return changed


def _fitting(name: str, network: nn.Module, cfg: Any, source: Model) -> dict[str, LazyTensor]:
    """Tensors of the source under the names of the network's state dict, of its shapes. Raises InputError."""
    found, wanted = source.of(name, "ema"), network.state_dict()
    if not found:
        fix = f"give a checkpoint of a stage that trained the {name}"
        raise InputError(_where(source), f"it holds no {name}", fix)
    renamed = _renaming(found, wanted)
    found = {renamed(key): value for key, value in found.items()}
    if name == "autoencoder":
        found = _with_statistics(found, wanted, cfg, source)
    if name == "backbone":
        found = _widened(found, wanted, _where(source))
    require_same(wanted, found, _where(source))
    section = source.config.get(name)
    if section is not None:
        with torch.device("meta"):
            theirs = build(without_tags(plain(section)))
        refuse_hidden(name, network, {renamed(k): v for k, v in hidden(theirs).items()}, _where(source))
    return found


def _renaming(theirs: Iterable[str], ours: Iterable[str]) -> Callable[[str], str]:
    """A tower alone (`text.`) and the only one among parts (`parts.NAME.text.`) are the same tower."""
    olds, news = ({PART.match(key)[0] for key in names} for names in (theirs, ours))  # type: ignore[index]
    if len(olds) != 1 or len(news) != 1:
        return str
    (old,), (new,) = olds, news
    return lambda key: new + key.removeprefix(old)


def _require_measured(source: Model) -> None:
    if source.facts.get("latents_measured") == 0:
        folder = source.facts["path"]
        what = f"{folder} is not the end of its stage: its latent shift and scale are not measured"
        raise InputError(_where(source), what, "let stage 1 finish")


def _with_statistics(
    found: dict[str, LazyTensor], wanted: Mapping[str, Tensor], cfg: Any, source: Model
) -> dict[str, LazyTensor]:
    """With the latent shift and scale of the source: among its tensors or in its config, else ours."""
    said, section = source.config.get("autoencoder") or {}, cfg.get("autoencoder") or {}
    for key in STATISTICS:
        if key in wanted and key not in found:
            value = torch.as_tensor(said[key]).expand_as(wanted[key]) if key in said else wanted[key]
            found[key] = LazyTensor.of(value)
        if key in section and key in found and found[key].shape == wanted[key].shape:
            theirs = found[key].to(wanted[key].dtype).read()
            if not torch.equal(theirs, wanted[key].cpu()):
                shown = [round(value, 5) for value in theirs.tolist()]
                log.info("%s: its %s %s in the place of autoencoder.%s", _where(source), key, shown, key)
    return found


def _widened(found: dict[str, LazyTensor], wanted: Mapping[str, Tensor], where: str) -> dict[str, LazyTensor]:
    """With zeros for input channels that the source lacks: whatever they hold, its output is the source's."""
    key = "conv_in.weight"
    if key not in found or key not in wanted or found[key].shape[1] >= wanted[key].shape[1]:
        return found
    if "conv_out.weight" in found and found[key].shape[1] != found["conv_out.weight"].shape[0]:
        what = f"its conv_in has {found[key].shape[1]} channels, and not all are the latents'"
        raise InputError(where, what, "give a checkpoint that is shown the latents alone")
    old, more = found[key], wanted[key].shape[1] - found[key].shape[1]
    shape = (old.shape[0], old.shape[1] + more, *old.shape[2:])
    log.info(
        "%s: backbone.conv_in from %d to %d channels, the new ones start at 0", where, old.shape[1], shape[1]
    )
    read = partial(_padded, old, (0, 0, 0, 0, 0, more))
    return found | {key: LazyTensor(shape, old.dtype, read)}


def _padded(tensor: LazyTensor, padding: tuple[int, ...]) -> Tensor:
    return F.pad(tensor.read(), padding)


def _rebuilding(name: str, network: nn.Module, cfg: Any) -> str:
    """The config section, as YAML, that gives the network back, but for its weights."""
    section = without_tags(plain(cfg[name]))
    with torch.device("meta"):
        again = build(section)
    where = f"{name}.model"
    refuse_hidden(name, network, hidden(again), where)  # an activation that only the tag told
    return to_yaml(section)


# ---- a resumed run -------------------------------------------------------------------------------------


def _resumed(module: TrainingModule, cfg: Any, newest: Path) -> dict[str, Kept]:
    """The frozen networks out of the run's own record; the rest is restored when the fit starts.

    If an option gives one of them, too, and it can still be opened, it must be the same.
    """
    entries, kept = native.load_state(newest).get("networks", {}), {}
    for name, network, frozen in _networks(module):
        if not frozen:
            continue
        if name not in entries:
            if name == "autoencoder" or _unfilled(network):
                raise InputError(f"{newest}", f"names no {name}, which the config does not train")
            _compare(name, network, cfg, "")
            continue
        entry = entries[name]
        found, text = open_network(newest, entry)
        require_same(network.state_dict(), found, f"{newest}")
        network.load_state_dict({key: value.read() for key, value in found.items()})
        _compare(name, network, cfg, entry["sha256"])
        kept[name] = Kept(found, text, entry["sha256"])
    return kept


def _compare(name: str, network: nn.Module, cfg: Any, sha256: str) -> None:
    path = cfg.get(f"{name}_from")
    if not path or not Path(str(path)).exists():
        return
    source = _opened(cfg, f"{name}_from")
    assert source is not None
    known = f" (sha256 {sha256[:12]})" if sha256 else ""
    given = _fitting(name, network, cfg, source)
    own = network.state_dict()
    if any(not torch.equal(given[key].to(value.dtype).read(), value) for key, value in own.items()):
        what = f"is another network than the one this run was trained with{known}"
        raise InputError(_where(source), what, "use the network that the run started with, or a new run_name")
