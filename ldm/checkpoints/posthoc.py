"""Averages of the weights of any length, made after training from snapshots of a few others.

Karras et al., "Analyzing and improving the training dynamics of diffusion models", 2023 (arXiv 2312.02696),
section 3 and appendix C. The power profile of exponent g that ends at step T gives the weights of step t the
share (g + 1) t^g / T^(g + 1). Its length is its standard deviation as a share of T (their sigma_rel), so it
grows with the run. The sum of snapshots that comes nearest to a wanted profile is found by least squares; we
add two conditions: shares sum to 1, and their mean step is the wanted one. So weights that stand still or
move evenly come out exactly, however few snapshots there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ldm.checkpoints.files import load_document, load_tensors, staged, write_tensors
from ldm.checkpoints.native import NAME, load_state, save
from ldm.checkpoints.networks import load_network, network_entry, store_network
from ldm.checkpoints.pieces import open_pieces
from ldm.errors import InputError

FOLDER = "ema"  # of a stage: step-000005000/ema-0.05.safetensors, and so on
LONGEST = 12**-0.5  # length of the plain mean over the whole run, exponent 0
WORST = 0.05  # largest error of a profile that is still passed off as it, relative L2 norm
FILE = re.compile(r"ema-([0-9.e-]+?)(\.rank-\d+-of-\d+)?\.safetensors")  # in a snapshot, and in a checkpoint


class Profile(NamedTuple):
    """The average of `length` that ends at `step`."""

    step: int
    length: float


# ---- profiles ------------------------------------------------------------------------------------------


def exponent(length: float) -> float:
    """Exponent g of the profile of this length, where (g + 1) / ((g + 2)^2 (g + 3)) = length^2."""
    if not 0 < length < LONGEST:
        raise ValueError(f"length {length} must be above 0 and below {LONGEST:.4f}, the mean of all steps")
    q = length**-2
    return float(np.roots([1, 7, 16 - q, 12 - q]).real.max())


def inner(a: Sequence[Profile], b: Sequence[Profile]) -> NDArray[np.float64]:
    """Inner products [a b] of profiles: the integrals of p_a(t) p_b(t), in closed form."""
    (step_a, g_a), (step_b, g_b) = (_columns(p) for p in (a, b))
    step_a, g_a = step_a[:, None], g_a[:, None]
    last = np.maximum(step_a, step_b)
    ratio = np.minimum(step_a, step_b) / last
    product: NDArray[np.float64] = (g_a + 1) * (g_b + 1) / ((g_a + g_b + 1) * last)
    return product * ratio ** np.where(step_a < step_b, g_b, g_a)


def solve(have: Sequence[Profile], wanted: Profile) -> tuple[NDArray[np.float64], float]:
    """Factor for each profile of `have` whose sum is nearest to `wanted`, and its error, relative L2 norm."""
    have = [Profile(p.step / wanted.step, p.length) for p in have]  # type: ignore[arg-type]
    target = [Profile(1, wanted.length)]
    gram, with_target = inner(have, have), inner(have, target)[:, 0]
    moments = [np.stack([np.ones(len(p)), _mean_steps(p)]) for p in (have, target)]
    given, asked = (m[: len(have)] for m in moments)  # a single profile cannot meet both conditions
    matrix = np.block([[gram, given.T], [given, np.zeros((len(given), len(given)))]])
    x = np.linalg.lstsq(matrix, np.concatenate([with_target, asked[:, 0]]), rcond=None)[0][: len(have)]
    own = inner(target, target)[0, 0]
    return x, float(np.sqrt(max(own - 2 * with_target @ x + x @ gram @ x, 0) / own))


def _columns(profiles: Sequence[Profile]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and exponents."""
    return np.array([p.step for p in profiles], float), np.array([exponent(p.length) for p in profiles])


def _mean_steps(profiles: Sequence[Profile]) -> NDArray[np.float64]:
    steps, g = _columns(profiles)
    return steps * (g + 1) / (g + 2)


# ---- snapshots -----------------------------------------------------------------------------------------


def write_snapshot(root: Path, step: int, averages: Mapping[float, Mapping[str, Tensor]]) -> None:
    """Write `root/step-NNNNNNNNN/`, a file for each length; it is there whole or it is not there."""
    with staged(root / f"step-{step:09d}") as folder:
        for length, tensors in averages.items():
            write_tensors(folder / f"ema-{length}.safetensors", tensors)


def snapshots(root: Path) -> dict[int, Path]:
    """Folders of the snapshots in `root` by their step, in rising order; empty if there is no such folder."""
    found = ((NAME.fullmatch(path.name), path) for path in root.glob("step-*"))
    return dict(sorted((int(name[1]), path) for name, path in found if name))


@dataclass(frozen=True)
class Combination:
    """A sum of snapshots: `terms` are (file, factor); `error` is that of its profile, relative L2 norm."""

    profile: Profile
    terms: list[tuple[Path, float]]
    error: float

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 tensor) one by one, summed in float64: no more than a tensor is held at a time."""
        files = [open_pieces(path.parent, path.stem) for path, _ in self.terms]
        for name in files[-1]:
            pairs = zip(files, self.terms, strict=True)
            total = sum(file[name].read().double() * factor for file, (_, factor) in pairs)
            assert isinstance(total, Tensor)
            yield name, total.float()


def combine(checkpoint: Path, length: float, step: int | None = None, where: str = "length") -> Combination:
    """The average of `length` that ends at `step`: a snapshot's, or by default the checkpoint's own.

    The checkpoint holds the last of the averages, in float32; earlier snapshots lie in the stage's folder.
    """
    stage = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    last = int(load_state(checkpoint)["step"])
    folders = {s: path for s, path in snapshots(stage / FOLDER).items() if s < last} | {last: checkpoint}
    files = {
        Profile(s, float(name[1])): folder / f"ema-{name[1]}.safetensors"
        for s, folder in folders.items()
        for path in sorted(folder.iterdir())
        if (name := FILE.fullmatch(path.name))
    }
    if not files:
        fix = "train with module.ema_lengths=[0.05,0.1]"
        raise InputError(where, f"no snapshots of averages beside {checkpoint.name}", fix)
    end = last if step is None else step
    ends = sorted({p.step for p in files})
    if end not in ends:
        near = ", ".join(str(s) for s in sorted(sorted(ends, key=lambda s: abs(s - end))[:2]))
        raise InputError(f"step {end}", f"no snapshot was taken there ({len(ends)} were)", f"nearest: {near}")
    have = [p for p in files if p.step <= end]
    wanted = Profile(end, length)
    try:
        factors, error = solve(have, wanted)
    except ValueError as bad:
        raise InputError(where, str(bad)) from None
    if error > WORST:
        what = f"{len(have)} snapshots miss this profile by {error:.0%}, the limit is {WORST:.0%}"
        raise InputError(where, what, f"nearest that they give: {_nearest(have, wanted)}")
    return Combination(wanted, [(files[p], float(x)) for p, x in zip(have, factors, strict=True)], error)


def _nearest(have: Sequence[Profile], wanted: Profile) -> str:
    """The next lengths below and above the wanted one that the snapshots give."""
    ends = {p.length for p in have if p.step == wanted.step}
    tried = sorted({*ends, *(round(float(s), 4) for s in np.geomspace(0.005, 0.28, 80))})
    good = [length for length in tried if solve(have, Profile(wanted.step, length))[1] <= WORST]
    below, above = [s for s in good if s < wanted.length][-1:], [s for s in good if s > wanted.length][:1]
    return ", ".join(str(s) for s in below + above)


def store(checkpoint: Path, out: Path, average: Combination) -> Path:
    """Make the folder `out` with a checkpoint like `checkpoint` whose EMA is `average`; returns that.

    It brings along the frozen networks that it needs, and cannot be resumed: it has no optimizer.
    """
    if out.exists():
        raise InputError(f"{out}", "is there already", "choose a new folder")
    state = load_state(checkpoint)
    kept: dict[str, Any] = {key: state[key] for key in ("step", "images", "latents_measured") if key in state}
    kept["ema"] = {**average.profile._asdict(), "error": average.error, "snapshots": len(average.terms)}
    tensors = {"model": load_tensors(checkpoint, "model"), "ema": dict(average.tensors())}
    try:
        with staged(out) as folder:
            hashes = {
                name: store_network(folder, *load_network(checkpoint, entry))
                for name, entry in state.get("networks", {}).items()
            }
            target = folder / f"step-{state['step']:09d}"
            kept["networks"] = {name: network_entry(folder, h, target) for name, h in hashes.items()}
            config = load_document(checkpoint, "config.yaml")
            save(folder, state["step"], tensors, {"state.json": kept, "config.yaml": config})
    except OSError as error:
        raise InputError(f"{out}", f"cannot write there ({error.strerror or error})") from None
    return out / target.name
