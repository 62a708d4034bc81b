"""slurm/*.sbatch with stand-ins for Slurm's programs: exit codes, requeueing, lack of progress, words.

tests/cluster/test_slurm_lab.py runs the same scripts on a real Slurm.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").iterdir())
# srun notes its words and what it passes on, then does what the file `deed` says, in bash.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$HOME/srun"
env > "$HOME/env"
echo x >> "$HOME/sruns"
script=$PPID
source "$HOME/deed"
"""
SCONTROL = """#!/bin/bash
case $1 in
    requeue) echo "$2" >> "$HOME/requeued"; exit $(cat "$HOME/refuses" 2>/dev/null || echo 0) ;;
    show) case $2 in
        hostnames) printf 'gpu-a07\\ngpu-a08\\n' ;;
        node) echo "NodeName=$4 Arch=x86_64 NodeAddr=$(cat "$HOME/address") NodeHostName=$4 Version=22.05" ;;
    esac ;;
esac
"""
GIVEN = {  # what Slurm gives a batch script
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "gpu-a[07-08]",
    "SLURM_CLUSTER_NAME": "big",
    "SLURM_CPUS_PER_TASK": "12",
}


class Cluster:
    """A checkout under `home`, and programs that stand for Slurm's."""

    def __init__(self, home: Path) -> None:
        self.home, self.here = home, home / "checkout"
        shutil.copytree(ROOT / "slurm", self.here / "slurm")
        (home / "bin").mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sleep", "#!/bin/bash\n")):
            (home / "bin" / name).write_text(text)
            (home / "bin" / name).chmod(0o755)
        (home / "address").write_text("10.0.0.7")
        self.run = self.here / "runs/x"

    def start(self, *words, deed="", restart=0, script="train", **env):
        """One start of the job; its exit code."""
        notes = '[[ -z ${LDM_JOB_DIR:-} ]] || echo "$PWD/runs/x" > "$LDM_JOB_DIR/run"\n'
        (self.home / "deed").write_text(notes + deed)
        path = f"{self.home}/bin:{os.environ['PATH']}"
        given = {**GIVEN, "PATH": path, "HOME": str(self.home), "SLURM_SUBMIT_DIR": str(self.here), **env}
        given |= {"SLURM_RESTART_COUNT": str(restart)} if restart else {}  # Slurm sets it from 1
        command = ["bash", str(self.here / f"slurm/{script}.sbatch"), *words]
        done = subprocess.run(command, env=given, cwd=self.home, capture_output=True, text=True, timeout=60)
        self.said = done.stderr
        return done.returncode

    def lines(self, name):
        file = self.home / name
        return file.read_text().splitlines() if file.exists() else []

    @property
    def environment(self):
        return dict(line.split("=", 1) for line in self.lines("env") if "=" in line)


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


# ---- exit codes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("srun", "noted", "code", "requeued"),
    [
        (0, None, 0, False),
        (2, "2", 2, False),
        (3, "3", 3, False),
        (143, "130", 130, False),  # Ctrl-C, or scancel --signal=INT
        (143, "2", 2, False),  # srun stopped the other ranks, and reports that
        (143, "3", 3, False),
        (2, None, 2, False),  # not our program, which would have left a note: python: can't open file
        (75, "75", 75, True),
        (143, "75", 75, True),
        (143, None, 143, True),
        (4, "4", 4, True),
        (1, "1", 1, True),
        (137, None, 137, True),
        (139, None, 139, True),
        (137, "1", 1, True),
    ],
)
def test_what_becomes_of_an_exit_code(cluster, srun, noted, code, requeued):
    note = f'echo {noted} > "$LDM_JOB_DIR/exit"\n' if noted else ""
    assert cluster.start(deed=f"{note}exit {srun}") == code
    assert cluster.lines("requeued") == (["123456"] if requeued else [])
    notes = [path.name for path in (cluster.here / ".ldm_jobs").iterdir()]
    assert notes == (["big-123456"] if requeued else []), "kept as long as the job may come back"
    assert bool(cluster.said) == (code != 0)


def test_an_old_note_does_not_count(cluster):
    assert cluster.start(deed='echo 75 > "$LDM_JOB_DIR/exit"; exit 75') == 75
    assert cluster.start(deed="exit 3", restart=1) == 3


def test_a_controller_that_does_not_answer_is_asked_again(cluster):
    (cluster.home / "refuses").write_text("1")
    assert cluster.start(deed="exit 75") == 75
    assert cluster.lines("requeued") == ["123456"] * 5
    assert "cannot requeue (try 5 of 5)" in cluster.said


# ---- restarts without progress -----------------------------------------------------------------------------

COMMIT = """
commit() {
    local folder
    folder=runs/x/$1/checkpoints/$(printf 'step-%09d' "$2")
    mkdir -p "$folder" && touch "$folder/MANIFEST.json"
}
"""


def play(cluster, deeds, **env):
    """(start at which the job was over, its exit code, starts that got to srun), or None within 12 starts.

    A number is a step committed in that start, `lost`: the batch script does not see the end. The last deed
    is done again and again.
    """
    for restart in range(12):
        deed = deeds[min(restart, len(deeds) - 1)]
        steps = [word.rpartition(":") for word in deed.split() if word[-1].isdigit()]
        made = "".join(f"commit '{stage}' {step}\n" for stage, _, step in steps)
        ending = 'kill -9 "$script"' if "lost" in deed else "exit 1"
        requeued = len(cluster.lines("requeued"))
        code = cluster.start(deed=f"{COMMIT}{made}{ending}", restart=restart, **env)
        if len(cluster.lines("requeued")) == requeued and code != -9:
            return restart, code, len(cluster.lines("sruns"))
    return None


@pytest.mark.parametrize(
    ("deeds", "over"),
    [
        (["fail"], (3, 3, 4)),
        (["lost"], (4, 3, 4)),  # the fifth start finds out, before it starts anything
        (["fail", "lost"], (4, 3, 4)),
        (["lost", "lost", "lost", "fail"], (3, 3, 4)),
        (["500", "fail"], (3, 3, 4)),
        (["fail", "fail", "100", "fail"], (5, 3, 6)),
        (["lost", "lost", "100 lost", "lost"], (6, 3, 6)),
        (["100", "100", "90", "100", "fail"], (3, 3, 4)),  # rolled back and made again: nothing new
        (["autoencoder:700", "diffusion:100", "diffusion:200", "fail"], (5, 3, 6)),
        ([str(100 * i) for i in range(1, 13)], None),
        ([f"{100 * i} lost" for i in range(1, 13)], None),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else " ".join(value or ["never"])[:40],
)
def test_when_it_gives_up(cluster, deeds, over):
    assert play(cluster, deeds) == over
    if over:
        assert "3 restarts made no new checkpoint" in cluster.said
        assert list((cluster.here / ".ldm_jobs").iterdir()) == []


def test_a_checkpoint_counts_once_it_is_whole(cluster):
    for start in range(4):
        (cluster.run / f"checkpoints/step-{start:09d}").mkdir(parents=True)  # without a manifest
        code = cluster.start(deed="exit 75", restart=start)
    assert (code, len(cluster.lines("requeued"))) == (3, 3)


def test_the_number_of_restarts_is_a_setting(cluster):
    assert play(cluster, ["fail"], LDM_MAX_RESTARTS="1") == (1, 3, 2)
    assert "1 restarts made no new checkpoint" in cluster.said


def test_a_job_that_somebody_requeues_has_its_restarts_again(cluster):
    assert play(cluster, ["fail"])[:2] == (3, 3)
    assert [cluster.start(deed="exit 1", restart=start) for start in range(4, 8)] == [1, 1, 1, 3]


def test_even_if_it_has_one_alone(cluster):
    assert play(cluster, ["fail"], LDM_MAX_RESTARTS="1")[:2] == (1, 3)
    codes = [cluster.start(deed="exit 1", restart=start, LDM_MAX_RESTARTS="1") for start in (2, 3)]
    assert codes == [1, 3]


def test_a_new_job_of_an_old_number_begins_anew(cluster):
    for start in range(3):
        cluster.start(deed="exit 1", restart=start)
    assert play(cluster, ["fail"])[0] == 3


# ---- what is started ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train", "preemptible"])
def test_training_is_started_once_a_task(cluster, script):
    assert cluster.start("experiment=x", "data.shards=/d/{0..3}.tar", script=script) == 0
    words = cluster.lines("srun")
    assert words[:3] == ["--kill-on-bad-exit=1", "--wait=0", "--cpu-bind=cores"]
    assert words[3:6] == ["python", "-u", "train.py"]
    assert words[6:] == ["experiment=x", "data.shards=/d/{0..3}.tar", "trainer=ddp"]
    found = cluster.environment
    assert found["SRUN_CPUS_PER_TASK"] == "12"
    assert (found["PYTHONFAULTHANDLER"], found["TORCH_NCCL_DUMP_ON_TIMEOUT"]) == ("1", "1")
    assert int(found["TORCH_FR_BUFFER_SIZE"]) > 0


def test_another_trainer_stays(cluster):
    cluster.start("trainer=gpu", "trainer.devices=2")
    assert cluster.lines("srun")[6:] == ["trainer=gpu", "trainer.devices=2"]
    cluster.start("trainer.devices=2")
    assert cluster.lines("srun")[6:] == ["trainer.devices=2", "trainer=ddp"]


def test_rank_0_is_found_by_the_address_that_slurm_uses(cluster):
    cluster.start()
    assert cluster.environment["MASTER_ADDR"] == "10.0.0.7"
    (cluster.home / "bin/scontrol").write_text(SCONTROL.replace("NodeAddr", "Other"))
    cluster.start()
    assert cluster.environment["MASTER_ADDR"] == "gpu-a07"


def test_ports_differ_by_job_and_by_restart(cluster):
    ports = set()
    for job, restart in (("123456", 0), ("123456", 1), ("123457", 0), ("7", 0), ("99999999", 0)):
        cluster.start(restart=restart, SLURM_JOB_ID=job)
        ports.add(int(cluster.environment["MASTER_PORT"]))
    assert len(ports) == 5
    assert all(20000 <= port < 32000 for port in ports)


def test_in_a_container_of_pyxis(cluster):
    cluster.start("a=1", LDM_IMAGE="nvcr.io#nvidia/pytorch:26.01-py3", LDM_MOUNTS="/data:/data")
    words, here = cluster.lines("srun"), str(cluster.here)
    assert words[3] == "--container-image=nvcr.io#nvidia/pytorch:26.01-py3"
    assert words[4:6] == [f"--container-mounts={here}:{here},/data:/data", f"--container-workdir={here}"]
    assert words[6:9] == ["python", "-u", "train.py"]
    assert cluster.environment["LDM_JOB_DIR"].startswith(f"{here}/"), "the notes are inside what is mounted"


def test_in_a_container_of_apptainer(cluster):
    cluster.start("a=1", LDM_IMAGE="/images/ldm.sif")
    words, here = cluster.lines("srun"), str(cluster.here)
    assert words[3:6] == ["apptainer", "exec", "--nv"]
    assert words[6:11] == ["--bind", f"{here}:{here}", "--pwd", here, "/images/ldm.sif"]
    assert words[11:14] == ["python", "-u", "train.py"]


def test_sampling_is_started_once_and_never_again(cluster):
    code = cluster.start("checkpoint=runs/x", "prompt=a, b", script="sample", deed="exit 1")
    assert (code, cluster.lines("requeued")) == (1, [])
    assert cluster.lines("srun")[3:] == ["python", "-u", "sample.py", "checkpoint=runs/x", "prompt=a, b"]
    assert "MASTER_PORT" not in cluster.environment


# ---- sweeps ------------------------------------------------------------------------------------------------

LINES = """# learning rates
optimizer.lr=1e-4

  # and one of another name
optimizer.lr=2e-4 run_name=twice
'callbacks.pictures.prompts=[a red apple, $HOME]' seed=1
"""


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (0, ["run_name=lr-00000", "optimizer.lr=1e-4"]),
        (1, ["optimizer.lr=2e-4", "run_name=twice"]),
        (2, ["run_name=lr-00002", "callbacks.pictures.prompts=[a red apple, $HOME]", "seed=1"]),
    ],
)
def test_a_task_of_a_sweep_is_a_line(cluster, task, words):
    (cluster.here / "lr.txt").write_text(LINES)
    code = cluster.start(
        "lr.txt", "experiment=x", script="sweep", SLURM_ARRAY_TASK_ID=str(task), deed="exit 75"
    )
    assert (code, cluster.lines("requeued")) == (75, ["123456"])
    assert cluster.lines("srun")[6:] == ["experiment=x", *words, "trainer=ddp"]


def test_lines_may_end_as_on_windows(cluster):
    (cluster.here / "lr.txt").write_bytes(LINES.replace("\n", "\r\n").encode())
    cluster.start("lr.txt", script="sweep", SLURM_ARRAY_TASK_ID="1")
    assert cluster.lines("srun")[6:] == ["optimizer.lr=2e-4", "run_name=twice", "trainer=ddp"]


def test_a_sweep_says_what_is_wrong(cluster):
    (cluster.here / "lr.txt").write_text(LINES)
    assert cluster.start("lr.txt", script="sweep", SLURM_ARRAY_TASK_ID="3") == 2
    assert cluster.said == "ldm: error: --array: no line 3: lr.txt has 3, from 0\n"
    assert cluster.start("lr.txt", script="sweep") == 1
    assert "start it with sbatch --array=0-2" in cluster.said
    assert cluster.lines("srun") == []


# ---- text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_well_formed(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", script], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["train", "preemptible", "sweep"])
def test_training_scripts_ask_for_what_a_restart_needs(name):
    text = (ROOT / f"slurm/{name}.sbatch").read_text(encoding="utf-8")
    options = {line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH ")}
    assert {"--requeue", "--open-mode=append", "--signal=USR2@300"} <= options
