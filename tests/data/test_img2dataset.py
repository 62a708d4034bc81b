"""slurm/img2dataset.sbatch: what it asks img2dataset for, and that it goes on after a stop."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "img2dataset.sbatch"
# Stands for the program: notes how it was called, and finishes as many shards as the file `shards` says.
PROGRAM = """#!/bin/bash
printf '%s\\n' "$@" > "$HOME/called"
while [[ $1 != --output_folder ]]; do shift; done
for ((i = 0; i < $(< "$HOME/shards"); i++)); do
    shard=$(printf '%s/%05d' "$2" $i)
    for suffix in .tar .parquet _stats.json; do echo "$i" > "$shard$suffix"; done
done
echo half > "$2/00009.tar.tmp"
"""


@pytest.fixture
def home(tmp_path):
    """A home with the program in bin/, and two parts of 25,000 urls."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "img2dataset"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    (tmp_path / "urls").mkdir()
    columns = {
        "URL": ["http://x"] * 25_000,
        "TEXT": ["a"] * 25_000,
        "punsafe": [0.0] * 25_000,
        "other": [1] * 25_000,
    }
    pq.write_table(pa.table(columns), tmp_path / "urls" / "part-0.parquet")
    names = {"URL": "url", "TEXT": "caption"}
    renamed = pa.table(
        {names.get(name, name): values for name, values in columns.items() if name != "punsafe"}
    )
    pq.write_table(renamed, tmp_path / "urls" / "part-1.parquet")
    return tmp_path


def start(home, *options, task="0", shards=3, **more):
    (home / "shards").write_text(str(shards))
    environment = {"PATH": f"{home}/bin:{os.environ['PATH']}", "HOME": str(home), "SLURM_CPUS_PER_TASK": "4"}
    environment |= more | ({"SLURM_ARRAY_TASK_ID": task} if task else {})
    command = ["bash", str(SCRIPT), str(home / "urls"), str(home / "out"), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_is_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SCRIPT)], check=True)


def test_a_part_becomes_shards(home):
    done = start(home, "--image_size", "1024")
    assert done.returncode == 0, done
    called = (home / "called").read_text().splitlines()
    given = dict(zip(called[:-2:2], called[1:-2:2], strict=True))
    assert called[-2:] == ["--image_size", "1024"]
    expected = {
        "--url_list": str(home / "urls" / "part-0.parquet"),
        "--url_col": "URL",
        "--caption_col": "TEXT",
        "--save_additional_columns": '["punsafe"]',
        "--output_format": "webdataset",
        "--image_size": "512",
        "--resize_mode": "keep_ratio",
        "--min_image_size": "256",
        "--encode_format": "jpg",
        "--processes_count": "4",
        "--retries": "1",
        "--timeout": "10",
        "--incremental_mode": "incremental",
    }
    assert expected.items() <= given.items()
    names = [f"00000-0000{i}{suffix}" for i in range(3) for suffix in (".parquet", ".tar", "_stats.json")]
    assert sorted(path.name for path in (home / "out").iterdir()) == [".parts", *names]
    assert (home / "out" / "00000-00002.tar").read_text() == "2\n"
    assert [path.name for path in (home / "out" / ".parts").iterdir()] == ["00000.done"]
    (home / "called").unlink()
    assert "done before" in start(home).stdout
    assert not (home / "called").exists()


def test_other_names_of_columns(home):
    assert start(home, task="1").returncode == 0
    called = (home / "called").read_text().splitlines()
    given = dict(zip(called[::2], called[1::2], strict=True))
    assert (given["--url_col"], given["--caption_col"]) == ("url", "caption")
    assert json.loads(given["--save_additional_columns"]) == []
    assert (home / "out" / "00001-00000.tar").exists()


def test_an_unfinished_part_shows_nothing_and_goes_on(home):
    done = start(home, shards=2)
    assert (done.returncode, done.stderr) == (
        1,
        f"{home}/urls/part-0.parquet: 2 of 3 shards are finished; run it again\n",
    )
    assert [path.name for path in (home / "out").iterdir()] == [".parts"]
    assert start(home).returncode == 0
    assert len(list((home / "out").glob("*.tar"))) == 3


def test_the_size_of_a_shard_is_a_setting(home):
    done = start(home, "--number_sample_per_shard", "5000")
    assert (done.returncode, done.stderr[:26]) == (2, "--number_sample_per_shard:")
    assert not (home / "called").exists()
    done = start(home, shards=3, LDM_PER_SHARD="5000")
    assert done.stderr.endswith("3 of 5 shards are finished; run it again\n")
    words = (home / "called").read_text().splitlines()
    assert words[words.index("--number_sample_per_shard") + 1] == "5000"
    assert start(home, shards=5, LDM_PER_SHARD="5000").returncode == 0
    assert len(list((home / "out").glob("*.tar"))) == 5


def test_a_stop_between_moves(home):
    assert start(home).returncode == 0
    work = home / "out" / ".parts" / "00000"
    work.mkdir()
    (work.with_suffix(".done")).unlink()
    (work / "complete").touch()
    shutil.move(home / "out" / "00000-00002.tar", work / "00002.tar")
    (home / "called").unlink()
    assert start(home).returncode == 0
    assert not (home / "called").exists()
    assert len(list((home / "out").glob("*.tar"))) == 3


@pytest.mark.parametrize(("task", "message"), [("2", "no part 2"), ("", "start it with sbatch --array=0-1")])
def test_wrong_tasks(home, task, message):
    done = start(home, task=task)
    assert done.returncode != 0
    assert message in done.stderr
