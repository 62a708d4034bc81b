"""Pictures to files as they come, by one process or by many; nothing is ever overwritten.

Of many processes (srun, torchrun), rank r of W draws every W-th batch; no process group is needed. Their
files are numbered by the place in the list, so that they do not depend on W, and the sheets are made by
whoever sees the last picture.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.errors import InputError
from ldm.pictures import save_new, save_next, save_png

Sheet = tuple[Sequence[int], Callable[[list[Image.Image]], Image.Image]]  # which pictures, and how


def processes() -> tuple[int, int, int]:
    """(rank, how many, rank on this machine), from the environment of torchrun or of srun.

    Not SLURM_NTASKS: sbatch sets that for a script that starts one process, too.
    """
    found = os.environ
    if "RANK" in found and "WORLD_SIZE" in found:
        return int(found["RANK"]), int(found["WORLD_SIZE"]), int(found.get("LOCAL_RANK", "0"))
    if "SLURM_STEP_NUM_TASKS" in found:
        count = int(found["SLURM_STEP_NUM_TASKS"])
        return int(found.get("SLURM_PROCID", "0")), count, int(found.get("SLURM_LOCALID", "0"))
    return 0, 1, 0


class Folder:
    """PNG files numbered from 00000, in the order of the list.

    mine    places in the list that this process draws
    shared  others write there, too: then a number is the place itself, else the first free one
    """

    def __init__(self, folder: Path, mine: Sequence[int], shared: bool) -> None:
        self.folder, self.shared = folder, shared
        self.paths: dict[int, Path] = {}
        folder.mkdir(parents=True, exist_ok=True)
        taken = [self._named(i) for i in mine if shared and self._named(i).exists()]
        if taken:
            fix = "several processes number from 00000: give a new folder"
            what = f"{taken[0].name} is there already"
            raise InputError(f"output={folder}", what, fix, every_rank=True)

    def _named(self, place: int) -> Path:
        return self.folder / f"{place:05d}.png"

    def save(self, place: int, picture: Image.Image) -> Path:
        """Write the picture; returns where."""
        if self.shared:
            save_png(self._named(place), picture)
            self.paths[place] = self._named(place)
        else:
            start = int(next(reversed(self.paths.values())).stem) + 1 if self.paths else 0
            self.paths[place] = save_next(self.folder, picture, start=start)
        return self.paths[place]

    def finish(self, count: int, sheets: Sequence[Sheet]) -> list[Path]:
        """Make the sheets once all pictures are there; returns what this process wrote."""
        paths = {i: self._named(i) for i in range(count)} if self.shared else self.paths
        if not all(path.exists() for path in paths.values()):
            return list(self.paths.values())
        made, start = list(self.paths.values()), int(paths[0].stem)
        for number, (places, draw) in enumerate(sheets):
            sheet = draw([_opened(paths[i]) for i in places])
            if not self.shared:
                made.append(save_next(self.folder, sheet, prefix="sheet-", start=start))
                start = int(made[-1].stem.rpartition("-")[2]) + 1
                continue
            path = self.folder / f"sheet-{number:05d}.png"
            try:
                save_png(path, sheet)
                made.append(path)
            except FileExistsError:  # another process saw the last picture at the same time
                pass
        return made


class Array:
    """One samples-00000.npz, as evaluation suites read it: `arr_0` uint8 [n H W 3], and the recipes.

    The suites of ADM and latent diffusion ask for `arr_0`; `parameters` holds the n recipes as text.
    """

    def __init__(self, folder: Path, mine: Sequence[int], shared: bool) -> None:
        self.folder = folder
        self.pictures: dict[int, Image.Image] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, place: int, picture: Image.Image) -> None:
        """Keep the picture."""
        self.pictures[place] = picture

    def finish(self, count: int, sheets: Sequence[Sheet]) -> list[Path]:
        """Write the array; returns where."""
        pictures = [self.pictures[i] for i in range(count)]
        array = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
        recipes = np.array([picture.info.get("parameters", "") for picture in pictures])
        number = 0
        while True:
            try:
                path = self.folder / f"samples-{number:05d}.npz"
                save_new(path, lambda file: np.savez(file, arr_0=array, parameters=recipes))
                return [path]
            except FileExistsError:
                number += 1


FORMATS: dict[str, type[Folder] | type[Array]] = {"png": Folder, "npz": Array}


def opened(format: str, folder: Path, mine: Sequence[int], shared: bool, sizes: set[Any]) -> Folder | Array:
    """Where the pictures of these `sizes` go; raises InputError where they cannot."""
    if format not in FORMATS:
        raise InputError(f"format={format}", "no such option", f"have: {', '.join(FORMATS)}")
    if format == "npz" and shared:
        fix = "draw with one process, or format=png with many"
        raise InputError("format=npz", "one array is written by one process", fix)
    if format == "npz" and len(sizes) > 1:
        what = f"one array has one size of pictures, not {len(sizes)}"
        raise InputError("format=npz", what, "use format=png")
    return FORMATS[format](folder, mine, shared)


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")
