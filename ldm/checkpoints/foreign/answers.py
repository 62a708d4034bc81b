"""What no tensor of a single file tells: number of heads, prediction type, latent scale, noise schedule.

The answer comes from the user, the original YAML, marks and metadata in the file, or the published model of
just these sizes, in this order, and what came from the last is noted; then from a run's config, if it is one
that reads the file; else it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.checkpoints.foreign.betas import table_of
from ldm.checkpoints.foreign.families import (
    LATENT_SCALES,
    PREDICTIONS,
    SD_SCHEDULE,
    Family,
    Schedule,
    Section,
    Tower,
)
from ldm.checkpoints.foreign.original import Original
from ldm.checkpoints.foreign.shapes import VQ
from ldm.checkpoints.lazy import LazyTensor
from ldm.checkpoints.model import Asked
from ldm.config import build
from ldm.errors import InputError

VARIANCE_PRESERVING = "ldm.diffusion.noise_scheduler.VariancePreserving"
KNOWN = "a model of these sizes"
SPEC = "modelspec."  # keys of metadata by ModelSpec 1.0
SPEC_PREDICTIONS = {
    "epsilon": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "sample": "sample",
}


@dataclass
class Answers:
    """For one file; `notes` are for the user, `asking` is what nothing answered: the options that would.

    Arguments `published` are the family if the U-Net's sizes are the published ones, else None.
    """

    where: str
    asked: Asked
    said: Original
    tensors: Mapping[str, LazyTensor]
    other: Mapping[str, Any]
    notes: list[str]
    otherwise: Asked | None = None  # of the run that reads it
    taken: list[str] = field(default_factory=list)  # from the published model
    asking: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_heads", "head_dim", "text_heads"):
            value = getattr(self.asked, name)
            if value is not None and not (isinstance(value, int) and value > 0):
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} {value}", "is no number above 0", "give another, or leave it out")

    def finish(self, family: Family | None) -> None:
        """Notes what was taken for granted; raises InputError, one line for all that nothing answered."""
        if self.taken:
            self.notes.append(
                f"as published with {family.title if family else KNOWN}: {', '.join(self.taken)}"
            )
        if self.asking:
            what = f"its tensors do not tell {' nor '.join(self.asking)}"
            options = " and ".join(self.asking.values())
            fix = f"ldm import it first, with {options}" if self.otherwise else f"give {options}"
            raise InputError(self.where, what, fix)

    @property
    def text_heads(self) -> int | None:
        return self.asked.text_heads or (self.otherwise or Asked()).text_heads

    def heads(self, published: Family | None) -> Mapping[str, int]:
        """num_heads or head_dim of the U-Net."""
        asked = {"num_heads": self.asked.num_heads, "head_dim": self.asked.head_dim}
        given = {name: value for name, value in asked.items() if value is not None}
        if len(given) > 1:
            raise InputError("--num-heads and --head-dim", "both are given", "give one of them")
        if given or self.said.heads:
            return given or self.said.heads
        if published is not None:
            self.taken += [f"{name} {value}" for name, value in published.heads.items()]
            return published.heads
        for name in asked:
            if value := getattr(self.otherwise, name, None):
                return {name: value}
        self.asking["the heads of the U-Net"] = "--num-heads N or --head-dim N"
        return {}

    def check_heads(self, tower: Tower) -> None:
        """Raises InputError for a number that does not divide the width."""
        heads = tower.model["heads"] if isinstance(tower.model, Mapping) else 1
        if heads is None:
            self.asking[f"the heads of a text tower of width {tower.width}"] = "--text-heads N"
        elif tower.width % heads:
            what = f"does not divide the width {tower.width} of its text tower"
            raise InputError(f"--text-heads {heads}", what, "give another")

    def prediction_type(self, published: Family | None) -> str:
        """As VariancePreserving names it; empty: nothing told it."""
        asked = self.asked.prediction_type
        if asked is not None and asked not in PREDICTIONS:
            raise InputError(f"--prediction-type {asked}", "no such type", f"have: {', '.join(PREDICTIONS)}")
        marked = "v_prediction" if "v_pred" in self.tensors else None
        spec = self.other.get(f"{SPEC}prediction_type")
        described = SPEC_PREDICTIONS.get(str(spec))
        told = asked or self.said.prediction_type or marked or described
        if told is None and not spec and published is not None and published.prediction_type is not None:
            told = published.prediction_type
            self.taken.append(f"prediction type {told}")
        if told is None and self.otherwise and self.otherwise.prediction_type in PREDICTIONS:
            told = self.otherwise.prediction_type
        if told is None:  # a word that is not known here goes before what was published, too
            own = f" ({SPEC}prediction_type is {spec!s:.40})" if spec else ""
            self.asking[f"the prediction type{own}"] = f"--prediction-type {'|'.join(PREDICTIONS)}"
        return told or ""

    def latent_scale(self, section: Section, published: Family | None) -> float:
        """Of an autoencoder; the file's own `scale_factor` goes before all. Raises InputError."""
        asked = self.asked.latent_scale
        if (own := self.tensors.get("scale_factor")) is not None:
            if own.count != 1:
                raise InputError(self.where, f"its scale_factor has {own.count} numbers, not one")
            scale = _scale(float(own.numbers()[0]), f"{self.where}: scale_factor")
            if asked not in (None, scale):
                self.notes.append(f"latent scale {scale} is the file's own, and not --latent-scale {asked}")
            return scale
        for value, where in ((asked, "--latent-scale"), (self.said.latent_scale, self.said.where)):
            if value is not None:
                return _scale(value, where)
        if published is not None:
            self.taken.append(f"latent scale {published.latent_scale}")
            return published.latent_scale
        sizes = (section["_target_"] == VQ, tuple(section["block_out_channels"]), section["latent_channels"])
        if sizes in LATENT_SCALES:
            self.taken.append(f"latent scale {LATENT_SCALES[sizes]}")
            return LATENT_SCALES[sizes]
        if self.otherwise and self.otherwise.latent_scale is not None:
            return self.otherwise.latent_scale
        self.asking["the latent scale"] = (
            "--latent-scale S (0.18215 in Stable Diffusion 1 and 2, 0.13025 in XL)"
        )
        return 1.0

    def noise_scheduler(self, family: Family | None, published: Family | None) -> Section:
        """Config of the noise scheduler; the file's own table goes before all, and is exact."""
        prediction = self.prediction_type(published)
        found = table_of(self.tensors, self.where)
        given, said_steps = self.said.schedule, self.said.num_train_timesteps
        said_steps = 1000 if said_steps is None else said_steps
        said = None if given is None else (given, said_steps)
        if found and said and found[:2] != said:
            here, there = (
                f"{' '.join(map(str, schedule))} in {steps} steps" for schedule, steps in (said, found[:2])
            )
            what = f"the noise schedule is {here}, and {there} in the tensors"
            raise InputError(self.said.where, what, "is it the YAML of this file?")
        if found is None and said is None:
            said = (family.schedule if family else SD_SCHEDULE), 1000
            self.taken.append(f"noise schedule {' '.join(map(str, said[0]))}")
        schedule, steps, ends = found or (*said, False)  # type: ignore[misc]
        ends = ends or "ztsnr" in self.tensors
        if ends and prediction == "epsilon":
            what = "its noise schedule ends in pure noise, of which prediction type epsilon says nothing"
            raise InputError(self.where, what, "give --prediction-type v_prediction")
        section = scheduler_section(schedule, steps, ends, prediction)
        if given and prediction:  # what a YAML says may be impossible; all others are known to be possible
            try:
                build(section)
            except InputError as error:
                raise InputError(self.said.where, f"{error}") from None
        return section


def _scale(value: float, where: str) -> float:
    if not (math.isfinite(value) and value > 0):
        raise InputError(where, f"the latent scale {value} is no finite number above 0", "give another")
    return value


def scheduler_section(schedule: Schedule, steps: int, ends: bool, prediction_type: str) -> Section:
    """Config of the noise scheduler; `ends` in pure noise. Stable Diffusion's own grids are one off."""
    name, start, end = schedule
    return {
        "_target_": VARIANCE_PRESERVING,
        "num_train_timesteps": steps,
        "schedule": name,
        "beta_start": start,
        "beta_end": end,
        "zero_terminal_snr": ends,
        "prediction_type": prediction_type,
        "steps_offset": 0 if ends else 1,
    }
