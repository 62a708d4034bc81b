"""Train: compose the config, build the objects, fit, stage after stage.

    python train.py experiment=quickstart

The same command resumes its run. Options are KEY=VALUE; `--cfg job` prints all of them with their values.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

import ldm
from ldm.checkpoints import native
from ldm.checkpoints.run import RunDirectory, Stage
from ldm.config import build, compose, plain, split_arguments, to_yaml
from ldm.errors import global_rank, reported
from ldm.training import assembly, fingerprint, launch, rollback, starting
from ldm.training.log import log_to_file, log_to_terminal, recorded
from ldm.training.summary import comments, log_summary


@assembly.flags_restored()
def train_stage(cfg: DictConfig, run: RunDirectory, stage: Stage) -> int:
    """Train one stage to its end, from its newest checkpoint; finds wrong input before it writes anything."""
    newest = native.newest(stage.checkpoints)
    done = native.load_state(newest)["step"] if newest else 0
    if run.finished(stage.name) is not None and done >= cfg.trainer.max_steps:
        return 0
    run.check_config(plain(cfg), stage.name)
    if newest is None and cfg.resume:
        newest = native.resolve(Path(str(cfg.resume)), stage.name or None, "resume")
    with recorded() as said:
        sources = starting.opened(cfg, newest, stage.name)
        datamodule = build(cfg.data)
        module = assembly.build_module(starting.building(cfg, newest, sources))
        kept = starting.fill(module, cfg, newest, sources)
    fingerprint.connect(module, datamodule)
    stored = starting.nbytes(kept, run.path)
    native.require_space(run.path, stored + assembly.checkpoint_bytes(module))
    callbacks, metrics, checkpoints = assembly.build_callbacks(cfg, run, stage, newest)
    trainer = assembly.build_trainer(cfg, callbacks, datamodule, module)
    if run.rank == 0:
        datamodule.setup()

    run.start()
    run.settle_config(plain(cfg), stage.name)
    if run.rank == 0:
        log_to_file(run.path / "log.txt", said)
        log_summary(plain(cfg))
        checkpoints.networks |= starting.store(kept, run.path, stage.checkpoints)
    kept.clear()  # else it holds the memory that the networks leave when they go to their device
    checkpoints.skip = rollback.windows(run, stage)
    trainer.fit(module, datamodule=datamodule)
    if code := rollback.outcome(run, stage, newest, trainer, checkpoints.guard):
        return code
    if trainer.is_global_zero:
        result = metrics.summary()
        if cfg.report:
            result = build(cfg.report)(ldm.load(stage.folder), run.path, datamodule)
        minutes, seconds = divmod(round(checkpoints.seconds), 60)
        name, steps = stage.name or run.name, f"{trainer.global_step:,} steps"
        run.finish(stage.name, f"{name:<11}  {steps:<11}  {minutes}:{seconds:02d}   {result}")
    return 0


def main(cfg: DictConfig, overrides: list[str]) -> int:
    """Run the config, or one after another the experiments that its `stages` names; returns the exit code."""
    stages = assembly.build_stages(cfg, overrides)
    run = RunDirectory(cfg.run_root, cfg.run_name, planned=[str(stage.stage) for stage in stages])
    with run.lock():
        for stage in stages:
            while (code := train_stage(stage, run, run.stage(stage.stage))) == rollback.AGAIN:
                pass
            if code:
                return code
    if run.rank == 0:
        print("\n".join(run.finished(stage.stage) or "" for stage in stages))
    return 0


def command(argv: list[str]) -> int:
    """The command line: KEY=VALUE overrides, --cfg job, --help."""
    with reported():
        flags, overrides = split_arguments(argv)
        if "help" in flags:
            print(__doc__)
            return 0
        cfg = compose("train", overrides)
        if "cfg" in flags:
            print(to_yaml(cfg), *comments(assembly.build_stages(cfg, overrides)), sep="\n")
        else:
            log_to_terminal(global_rank())
            code = main(cfg, overrides)
            return code if global_rank() == 0 else 0  # one rank speaks for all
    return 0


if __name__ == "__main__":
    sys.exit(launch.noted(command, sys.argv[1:]))
