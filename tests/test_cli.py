"""The `ldm` command: help without torch, nearest verbs, exit codes, and each verb on small data."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ldm import cli
from ldm.errors import say

ROOT = Path(__file__).parent.parent


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from ldm.cli import main; assert main(['--help']) == 0;"
        "heavy = {'torch', 'numpy', 'hydra', 'lightning', 'PIL'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for verb in cli.VERBS:
        assert f"ldm {verb}" in done.stdout


def test_each_line_is_one_write(monkeypatch):
    written = []
    stream = SimpleNamespace(write=written.append, flush=lambda: written.append("flushed"))
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    say("a", Path("b/c"))
    say("x", error=True)
    say()
    assert written == ["a\n", "b/c\n", "flushed", "x\n", "flushed", "flushed"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evalute", "runs/x"], "ldm evalute: no such command; did you mean ldm evaluate?"),
        (["data", "inspct", "x"], "ldm data inspct: no such command; did you mean ldm data inspect?"),
        (["xyzzy"], "ldm xyzzy: no such command; have: data pack, data index"),
        (["evaluate"], "ldm evaluate: the following arguments are required: RUN_OR_CHECKPOINT"),
        (["evaluate", "x", "--seed", "y"], "ldm evaluate: argument --seed: invalid int value: 'y'"),
        (["evaluate", "nowhere"], "checkpoint=nowhere: no such checkpoint"),
        (["evaluate", "nowhere", "--set", "coco"], "--set coco: no such set; have: quickstart"),
        (["evaluate", "x", "--features", "no.such:thing"], "--features no.such:thing: No module named 'no'"),
        (["ema", "nowhere", "out", "--length", "0.08"], "checkpoint=nowhere: no such checkpoint"),
        (["ema", "nowhere", "out"], "ldm ema: the following arguments are required: --length"),
        (["info", "nowhere"], "PATH=nowhere: no such checkpoint"),
        (["info", "nowhere", "--num-heads", "x"], "ldm info: argument --num-heads: invalid int value: 'x'"),
        (["data", "index", "nowhere.tar"], "shards: no shard matches 'nowhere.tar'"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ldm: error: {message}")


@pytest.mark.parametrize(("words", "code"), [([], 2), (["data", "--help"], 0), (["-h"], 0)])
def test_overview(words, code, capsys):
    assert cli.main(words) == code
    assert "ldm data inspect" in capsys.readouterr().out


def shard(path, count, damaged=1):
    """A tar of `count` samples of growing width with captions and scores, and some that are no pictures."""
    with tarfile.open(path, "w") as tar:
        for i in range(count + damaged):
            picture = io.BytesIO()
            Image.fromarray(np.full((8, 10 + i, 3), i, np.uint8)).save(picture, "PNG")
            content = picture.getvalue() if i < count else b"not a picture"
            meta = json.dumps({"width": 10 + i, "height": 8, "aesthetic": 4 + i}).encode()
            for name, data in (("png", content), ("txt", f"caption, {i}".encode()), ("json", meta)):
                info = tarfile.TarInfo(f"{i:05d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_data_index_and_inspect(tmp_path, capsys):
    shard(tmp_path / "00000.tar", 5)
    assert cli.main(["data", "index", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "1 shards, 5 samples; left out: not_image 1" in out
    assert "aesthetic" in out
    assert cli.main(["data", "inspect", str(tmp_path / "00000.tar"), "--captions", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    width = next(line.split() for line in lines if line.startswith("width"))
    assert width == ["width", "100.0%", "10", "12", "14"]
    assert next(line.split() for line in lines if line.startswith("aesthetic"))[2:] == ["4", "6", "8"]
    assert [line for line in lines if "caption, " in line] == [
        "00000/00000: caption, 0",
        "00000/00004: caption, 4",
    ]
    assert any("not_image" in line and "00005" in line for line in lines)


def test_data_pack(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    (folder / "a.txt").write_text("a red square")
    Image.new("RGB", (8, 8)).save(folder / "silent.png")
    assert cli.main(["data", "pack", str(folder), str(tmp_path / "out")]) == 0
    assert "1 samples in 1 shards; left out: no_caption 1" in capsys.readouterr().out
    assert cli.main(["data", "inspect", str(tmp_path / "out")]) == 0
    assert "a red square" in capsys.readouterr().out


EMOJI = {
    "_target_": "ldm.data.sources.EmojiDataModule",
    "cache_dir": "datasets",
    "global_batch_size": 4,
    "image_size": 16,
    "num_objects": 4,
    "num_backgrounds": 2,
}
FEATURES = """
import torch

class Means(torch.nn.Module):
    name = "MEANS"

    def forward(self, images):
        return images.float().mean((2, 3))

def make():
    return Means()
"""


def test_evaluate_an_untrained_run_is_below_its_bars(make_run, tmp_path, capsys):
    run = tmp_path / "run"
    checkpoint = make_run(run, config={"data": EMOJI})
    files = sorted(p.name for p in checkpoint.iterdir())
    assert cli.main(["evaluate", str(run), "--seed", "3"]) == 1
    out = capsys.readouterr().out
    assert ">= 98 %" in out
    assert "BELOW" in out
    assert "(4 pairs; chance 50 %, 25 %)" in out
    found = json.loads((run / "evaluation.json").read_text())
    assert (found["passed"], found["seed"], found["bars"]["psnr"]) == (False, 3, 25.0)
    assert {"background", "object", "psnr", "psnr_pooled", "edge_energy"} <= set(found["scores"])
    assert len(found["pairs"]) == 4
    with Image.open(run / "evaluation.png") as sheet:
        assert sheet.width > 2 * 144
    assert sorted(p.name for p in checkpoint.iterdir()) == files  # the checkpoint itself is sealed
    first = (run / "evaluation.json").read_bytes()
    assert cli.main(["evaluate", str(checkpoint), "--seed", "3"]) == 1
    assert (run / "evaluation.json").read_bytes() == first


def test_evaluate_with_the_users_features(make_run, tmp_path, capsys, monkeypatch):
    pytest.importorskip("torchmetrics")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_features.py").write_text(FEATURES)
    make_run(tmp_path / "run", config={"data": EMOJI})
    words = ["--metrics", "kid,fid", "--features", "my_features:make", "--json", "x.json"]
    assert cli.main(["evaluate", "run", *words]) == 0  # these have no bar
    assert {"KID-MEANS", "FID-MEANS"} <= set(json.loads((tmp_path / "x.json").read_text())["scores"])
    assert not (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metrics", "psnr"], "metrics: unknown 'psnr'; choose from composition"),
        (["--json", "no/such/folder.json"], "no/such/folder.json: cannot write there"),
    ],
)
def test_evaluate_refuses(make_run, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run", config={"data": EMOJI})
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", "run", *words])
    assert stop.value.code == 2
    assert f"ldm: error: {message}" in capsys.readouterr().err


def test_evaluate_refuses_a_run_of_other_pictures(make_run, tmp_path, capsys):
    other = {"_target_": "ldm.data.datamodule.ShardDataModule", "shards": "x.tar", "global_batch_size": 1}
    make_run(tmp_path / "run", config={"data": {**other, "image_size": 16}})
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(tmp_path / "run")])
    assert (
        "--set quickstart: step-000000012 was not trained on the quickstart's pictures"
        in capsys.readouterr().err
    )
