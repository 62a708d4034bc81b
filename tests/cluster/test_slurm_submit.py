"""`ldm slurm submit`: what is refused before sbatch hears of it, the command, and what is told afterwards."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from ldm import cli

ROOT = Path(__file__).parents[2]
RECIPE = ["experiment=laion_subset", "data.shards=/d/{0..3}.tar", "autoencoder_from=runs/ae"]
SBATCH = """#!/bin/bash
printf '%s\\n' "$@" > "$HOME/sbatch"
echo "$LDM_IMAGE" > "$HOME/image"
cat "$HOME/answer"
[[ ! -e $HOME/refuses ]] || { echo 'sbatch: error: invalid partition specified: x' >&2; exit 1; }
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A checkout to submit from, with a stand-in for sbatch."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    (folder / "train.py").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text(SBATCH)
    (tmp_path / "bin/sbatch").chmod(0o755)
    (tmp_path / "answer").write_text("4711\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return folder


def submit(*words):
    return cli.main(["slurm", "submit", *words])


def test_shows_and_submits(here, capsys, tmp_path):
    options = ["--nodes", "2", "--time", "1:00:00", "--partition", "p", "--account", "a"]
    assert submit(*RECIPE, *options, "--", "--qos=high", "-w", "n1") == 0
    out = capsys.readouterr().out
    words = (tmp_path / "sbatch").read_text().splitlines()
    assert shlex.split(out.splitlines()[0]) == ["sbatch", *words]
    assert words == [
        *("--parsable", "--job-name=laion_subset", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8"),
        *("--time=1:00:00", "--partition=p", "--account=a", "--qos=high", "-w", "n1"),
        *("slurm/train.sbatch", *RECIPE),
    ]
    assert (ROOT / "slurm/train.sbatch").read_text().rstrip() in out
    assert out.splitlines()[-2:] == [
        "job 4711: runs/laion_subset",
        "log laion_subset-4711.log      next: ldm status runs/laion_subset",
    ]


def test_a_dry_run_needs_no_slurm(here, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert submit(*RECIPE, "--dry-run", "--preemptible", "--container", "ldm.sqsh") == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("LDM_IMAGE=ldm.sqsh sbatch --parsable")
    assert " --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 slurm/preemptible.sbatch " in first
    assert not (tmp_path / "sbatch").exists()


def test_the_job_knows_its_container(here, tmp_path):
    assert submit(*RECIPE, "--container", "ldm.sqsh") == 0
    assert (tmp_path / "image").read_text() == "ldm.sqsh\n"


def test_a_job_without_gpus_has_as_many_processes_as_devices(here, tmp_path):
    words = ["trainer.accelerator=cpu", "trainer.devices=2", "--gpus-per-node", "0", "--nodes", "2"]
    assert submit(*RECIPE, *words) == 0
    found = (tmp_path / "sbatch").read_text().splitlines()
    assert {"--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0"} <= set(found)


def test_a_sweep_is_an_array_of_its_lines(here, capsys, tmp_path):
    (here / "lr.txt").write_text("# rates\noptimizer.lr=1e-4\n\noptimizer.lr=2e-4 run_name=other\n")
    assert submit(*RECIPE, "--array", "lr.txt", "--nodes", "1") == 0
    words = (tmp_path / "sbatch").read_text().splitlines()
    assert words[-6:] == ["--array=0-1", "slurm/sweep.sbatch", "lr.txt", *RECIPE]
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "job 4711: runs/lr-00000 and 1 more",
        "log lr-4711_*.log      next: ldm status runs/lr-00000",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["experiment=laion_subst"], "experiment=laion_subst: no such option; did you mean laion_subset?"),
        ([*RECIPE, "optimizer.lr=fast"], "optimizer.lr: expected float, got 'fast'"),
        ([*RECIPE, "--nodes", "0"], "--nodes 0: expected at least 1"),
        ([*RECIPE, "--gpus-per-node", "-1"], "--gpus-per-node -1: expected at least 0"),
        (
            [*RECIPE, "--nodes", "7"],
            "data.global_batch_size=2048: not divisible by world_size*accumulate = 56*1 = 56; "
            "nearest: 2016, 2072",
        ),
        (
            [*RECIPE, "trainer.devices=4"],
            "trainer.devices=4: but --gpus-per-node=8; set trainer.devices=8",
        ),
        (
            [*RECIPE, "trainer.num_nodes=2", "--nodes", "4"],
            "trainer.num_nodes=2: but --nodes=4; set trainer.num_nodes=4",
        ),
        ([*RECIPE, "--array", "none.txt"], "--array none.txt: cannot be read (No such file or directory)"),
        (
            [*RECIPE, "--array", "empty.txt"],
            "--array empty.txt: has no line; write the overrides of one run into each",
        ),
        ([*RECIPE, "--array", "open.txt"], "--array open.txt: No closing quotation; close the quotes on"),
        ([*RECIPE, "--array", "wrong.txt"], "optimizer.lrr: unknown key; did you mean optimizer.lr?"),
        ([*RECIPE, "--array", "twice.txt"], "--array twice.txt: runs/a is the run of two lines; give them"),
        ([*RECIPE, "--array", "x", "--preemptible"], "--array: not with --preemptible; give --partition"),
        (["--nodes", "x"], "ldm slurm submit: argument --nodes: invalid int value: 'x'"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_refused_before_anything_is_submitted(words, line, here, capsys, tmp_path):
    (here / "empty.txt").write_text("# nothing\n\n")
    (here / "open.txt").write_text("'a\n")
    (here / "wrong.txt").write_text("optimizer.lr=1\noptimizer.lrr=2\n")
    (here / "twice.txt").write_text("run_name=a seed=1\nrun_name=a seed=2\n")
    with pytest.raises(SystemExit) as stop:
        submit(*words)
    assert stop.value.code == 2
    [found] = capsys.readouterr().err.splitlines()
    assert found.startswith(f"ldm: error: {line}")
    assert not (tmp_path / "sbatch").exists()


def failed(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        submit(*words)
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    return line.removeprefix("ldm: error: ")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("#SBATCH --gres=gpu:8", "slurm/train.sbatch: has no #SBATCH --gpus-per-node=N; give --gpus"),
        ("#SBATCH --gpus-per-node=a100:8", "slurm/train.sbatch: no number in its #SBATCH --gpus-per-node"),
        ("#SBATCH --gpus-per-node 4", ""),
    ],
)
def test_a_script_that_somebody_changed(line, said, here, capsys, tmp_path):
    script = here / "slurm/train.sbatch"
    script.write_text(script.read_text().replace("#SBATCH --gpus-per-node=8", line))
    if said:
        assert failed(capsys, *RECIPE).startswith(said)
        assert submit(*RECIPE, "--gpus-per-node", "2") == 0
    else:
        assert submit(*RECIPE) == 0
        assert "--ntasks-per-node=4" in (tmp_path / "sbatch").read_text().splitlines()


def test_another_run_of_that_name_is_refused(here, capsys, tmp_path):
    folder = here / "runs/laion_subset"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 7\n")
    assert failed(capsys, *RECIPE).startswith("runs/laion_subset: has a run with ")
    assert not (tmp_path / "sbatch").exists()


def test_what_sbatch_says_is_passed_on(here, capsys, tmp_path):
    (tmp_path / "refuses").touch()
    (tmp_path / "answer").write_text("")
    assert failed(capsys, *RECIPE) == "sbatch: invalid partition specified: x"


def test_no_sbatch(here, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert failed(capsys, *RECIPE).startswith("sbatch: no such program on this machine; submit where")


def test_elsewhere_than_in_a_checkout(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert failed(capsys, *RECIPE).startswith("slurm/train.sbatch: not found; run this in the root of a")


def test_a_federated_number(here, capsys, tmp_path):
    (tmp_path / "answer").write_text("4711;big\n")
    assert submit(*RECIPE) == 0
    assert "job 4711: " in capsys.readouterr().out


def test_lines_are_split_as_the_script_splits_them(here):
    """shlex here, xargs there."""
    from ldm.cluster.slurm import sweep_lines

    lines = ["a=1 b=2", "'c=[x, y]' d=$HOME", '"e=a b"   f=', "g=\\'x", "h='a'\"b\"c"]
    lines += ['i="\\d+" j', "k=a#b #c", 'l="x \\y"']
    (here / "lines.txt").write_text("\n".join(lines) + "\n")
    for line, words in zip(lines, sweep_lines(here / "lines.txt"), strict=True):
        command = ["xargs", "-n", "1", "printf", "%s\\n"]
        done = subprocess.run(command, input=line, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines() == words


def test_the_commands_of_the_page(here, capsys, tmp_path):
    (here / "lr.txt").write_text("optimizer.lr=5e-5\noptimizer.lr=1e-4\n")
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", page, re.S)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert len(commands) >= 3
    for words in commands:
        assert words[:3] == ["ldm", "slurm", "submit"]
        assert submit(*words[3:]) == 0
    for name in re.findall(r"slurm/\w+\.sbatch", page):
        assert (ROOT / name).is_file()
