"""`ldm slurm submit`: check a run as far as a login node can, then hand a script of slurm/ to sbatch.

Nothing here runs inside the job: what a submitted job does is in slurm/*.sbatch, which work as well by hand.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import InputError

SCRIPTS = Path("slurm")  # from the root of a checkout, where jobs start and find train.py


@dataclass(frozen=True)
class Wish:
    """What to ask Slurm for. None leaves it to the script's own #SBATCH lines.

    array     file of overrides, one run a line
    container image for LDM_IMAGE
    options   more options for sbatch, as they stand
    """

    overrides: tuple[str, ...]
    nodes: int | None = None
    gpus_per_node: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    preemptible: bool = False
    array: str | None = None
    container: str | None = None
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """A command for sbatch, the environment it adds, its script, and the runs it makes."""

    command: list[str]
    environment: dict[str, str]
    script: str
    runs: list[str]

    def lines(self) -> list[str]:
        """The command for a shell, and the script below it."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return [" ".join([*words, shlex.join(self.command)]), "", self.script.rstrip()]


def plan(wish: Wish) -> Job:
    """Compose and check every run that the job would make; raises `InputError`, and submits nothing."""
    kind = "sweep" if wish.array else "preemptible" if wish.preemptible else "train"
    if wish.array and wish.preemptible:
        raise InputError("--array", "not with --preemptible", "give --partition to a sweep instead")
    file = SCRIPTS / f"{kind}.sbatch"
    if not file.is_file() or not Path("train.py").is_file():
        raise InputError(f"{file}", "not found", "run this in the root of a checkout, which all nodes see")
    script = file.read_text(encoding="utf-8")
    given = _directives(script)
    nodes = _number(given, "nodes", file) if wish.nodes is None else wish.nodes
    gpus = _number(given, "gpus-per-node", file) if wish.gpus_per_node is None else wish.gpus_per_node
    for option, value, least in (("--nodes", nodes, 1), ("--gpus-per-node", gpus, 0)):
        if value < least:
            raise InputError(f"{option} {value}", f"expected at least {least}")
    checked = [check(words, nodes, gpus) for words in command_lines(wish)]
    runs, tasks = [run for run, _ in checked], {tasks for _, tasks in checked}
    if len(set(runs)) < len(runs):
        twice = next(run for run in runs if runs.count(run) > 1)
        raise InputError(f"--array {wish.array}", f"{twice} is the run of two lines", "give them run_name=")
    if len(tasks) > 1:
        raise InputError(f"--array {wish.array}", "its lines differ in trainer.devices", "make two files")
    name = (
        Path(wish.array).stem if wish.array else Path(runs[0]).name
    )  # squeue shows it, the log is called so
    command = ["sbatch", "--parsable", f"--job-name={name}", f"--nodes={nodes}"]
    command += [f"--ntasks-per-node={tasks.pop()}", f"--gpus-per-node={gpus}"]
    for option in ("time", "partition", "account"):
        command += [f"--{option}={value}"] if (value := getattr(wish, option)) else []
    command += [f"--array=0-{len(runs) - 1}"] if wish.array else []
    command += [*wish.options, str(file), *([wish.array] if wish.array else []), *wish.overrides]
    return Job(command, {"LDM_IMAGE": wish.container} if wish.container else {}, script, runs)


def command_lines(wish: Wish) -> list[list[str]]:
    """The overrides of each run; a sweep's as slurm/sweep.sbatch puts them together."""
    if wish.array is None:
        return [list(wish.overrides)]
    found = []
    for i, line in enumerate(sweep_lines(Path(wish.array))):
        name = [] if _chooses(line, "run_name") else [f"run_name={Path(wish.array).stem}-{i:05d}"]
        found.append([*wish.overrides, *name, *line])
    return found


def check(overrides: Sequence[str], nodes: int, gpus_per_node: int) -> tuple[str, int]:
    """The folder of the run that train.py would make of them, and its processes a node; or `InputError`."""
    from ldm.checkpoints.run import RunDirectory
    from ldm.config import build, compose, plain
    from ldm.training.assembly import build_stages

    words = list(overrides) if _chooses(overrides, "trainer") else [*overrides, "trainer=ddp"]
    with _slurm_nodes(nodes):
        cfg = compose("train", words)
        stages = build_stages(cfg, words)
        run = RunDirectory(cfg.run_root, cfg.run_name, rank=0)
        for stage in stages:
            run.check_config(plain(stage), stage.stage)
            trainer = plain(stage.trainer)
            devices = _devices(trainer)
            tasks = gpus_per_node or devices or 1
            if devices not in (None, tasks):
                what, fix = f"but --gpus-per-node={tasks}", f"set trainer.devices={tasks}"
                raise InputError(f"trainer.devices={devices}", what, fix)
            if trainer["num_nodes"] != nodes:
                what, fix = f"but --nodes={nodes}", f"set trainer.num_nodes={nodes}"
                raise InputError(f"trainer.num_nodes={trainer['num_nodes']}", what, fix)
            build(stage.data).check_batch(nodes * tasks, int(trainer["accumulate_grad_batches"]))
    return str(run.path), tasks


def _devices(trainer: dict[str, Any]) -> int | None:
    """Processes a node by the config; None for all that a node has, whatever there are on this machine."""
    from ldm.training.launch import devices_of

    return None if trainer.get("devices") in (-1, "-1", "auto", None) else devices_of(trainer)


def submit(job: Job) -> list[str]:
    """Hand the job to sbatch; returns what to tell the user."""
    if shutil.which("sbatch") is None:
        what = "no such program on this machine"
        raise InputError(
            "sbatch", what, "submit where Slurm's commands are; --dry-run shows what it would be"
        )
    done = subprocess.run(
        job.command, env={**os.environ, **job.environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).replace("sbatch: error: ", "").split())
        raise InputError("sbatch", said or f"ended with exit code {done.returncode}")
    number = done.stdout.strip().partition(";")[0]  # NUMBER;CLUSTER on federated clusters
    name = next(w for w in job.command if w.startswith("--job-name=")).partition("=")[2]
    array = any(word.startswith("--array=") for word in job.command)
    log = f"{name}-{number}_*.log" if array else f"{name}-{number}.log"
    more = f" and {len(job.runs) - 1} more" if len(job.runs) > 1 else ""
    return [f"job {number}: {job.runs[0]}{more}", f"log {log}      next: ldm status {job.runs[0]}"]


def sweep_lines(file: Path) -> list[list[str]]:
    """The overrides of each run, as slurm/sweep.sbatch counts and splits the lines."""
    try:
        texts = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"--array {file}", f"cannot be read ({error.strerror})") from None
    lines = [text for text in texts if text.strip() and not text.lstrip().startswith("#")]
    if not lines:
        raise InputError(f"--array {file}", "has no line", "write the overrides of one run into each")
    try:
        return [_split(line) for line in lines]
    except ValueError as error:
        raise InputError(f"--array {file}", f"{error}", "close the quotes on that line") from None


def _split(line: str) -> list[str]:
    """Words as xargs finds them: a backslash within quotes is one, and # begins no comment."""
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.commenters, lexer.escapedquotes = True, "", ""
    return list(lexer)


@contextmanager
def _slurm_nodes(nodes: int) -> Iterator[None]:
    """Inside the job trainer.num_nodes comes from this variable, by configs/trainer/ddp.yaml."""
    before = os.environ.get("SLURM_NNODES")
    os.environ["SLURM_NNODES"] = str(nodes)
    try:
        yield
    finally:
        os.environ.pop("SLURM_NNODES")
        if before is not None:
            os.environ["SLURM_NNODES"] = before


def _directives(script: str) -> dict[str, str]:
    """Long options of the script's #SBATCH lines, --name=value or --name value."""
    words = [w for line in script.splitlines() if line.startswith("#SBATCH ") for w in line.split()[1:]]
    found = {}
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            found[name[2:]] = value if equals or after.startswith("-") else after
    return found


def _number(given: Mapping[str, str], name: str, file: Path) -> int:
    value = given.get(name, "")
    if not value.isdigit():
        what = f"no number in its #SBATCH --{name}" if name in given else f"has no #SBATCH --{name}=N"
        raise InputError(f"{file}", what, f"give --{name}")
    return int(value)


def _chooses(overrides: Sequence[str], group: str) -> bool:
    return any(word.startswith(f"{group}=") for word in overrides)
