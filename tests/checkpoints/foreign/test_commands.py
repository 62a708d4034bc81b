"""What a user types: a foreign file drawn from, imported, exported in each format, and opened again."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import sample
from ldm import cli
from ldm.checkpoints.importing import store
from ldm.checkpoints.lazy import LazyTensor, write_safetensors
from ldm.checkpoints.model import Asked
from ldm.checkpoints.opening import open_model
from ldm.errors import InputError

HEADS = ["--head-dim", "16", "--text-heads", "4", "--prediction-type", "epsilon", "--latent-scale", "0.18215"]


@pytest.fixture
def ldm(capsys):
    """Run `ldm ...`; returns its lines."""

    def run(*words):
        capsys.readouterr()
        assert cli.main([str(word) for word in words]) == 0
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture(scope="module")
def file(family_shapes, random_tensors, tmp_path_factory):
    """A small model of SD 1's kind in one file, its weights large enough for pictures that show them."""
    tensors = random_tensors(family_shapes("sd1", True, with_buffers=False))
    path = tmp_path_factory.mktemp("commands") / "small.safetensors"
    lively = {n: v if n.endswith("position_ids") else 3 * v for n, v in tensors.items()}
    write_safetensors(path, {name: LazyTensor.of(value) for name, value in lively.items()})
    return path


def drawn(checkpoint, output):
    """[64 64 3], and the recipe."""
    words = [f"checkpoint={checkpoint}", "prompt=a red apple, on (blue) wood", f"output={output}"]
    assert sample.main([*words, "num_steps=3", "height=64", "width=64", "seed=5"]) == 0
    with Image.open(output / "00000.png") as picture:
        return np.asarray(picture).astype(int), picture.info["parameters"]


def test_the_same_picture_from_every_form(file, ldm, tmp_path):
    *table, last = ldm("import", file, tmp_path / "mine", *HEADS)
    assert last.startswith(f"stored in {tmp_path / 'mine'}")
    assert table == ldm("info", file, *HEADS)
    first, _ = drawn(tmp_path / "mine", tmp_path / "0")
    assert first.std() > 5  # there is something in it
    ldm("export", tmp_path / "mine", tmp_path / "out")
    ldm("export", tmp_path / "out", tmp_path / "one.safetensors", "--format", "single-file")
    assert (tmp_path / "out/README.md").is_file()
    assert (tmp_path / "one.md").is_file()
    ldm("import", tmp_path / "one.safetensors", tmp_path / "one", *HEADS)
    for name in ("out", "one"):
        assert (drawn(tmp_path / name, tmp_path / f"p-{name}")[0] == first).all(), name


def test_half_precision_is_near(file, ldm, tmp_path):
    ldm("import", file, tmp_path / "mine", *HEADS)
    half = ["--format", "diffusers", "--dtype", "fp16"]
    lines = ldm("export", tmp_path / "mine", tmp_path / "half", *half)
    assert sum("relative" in line for line in lines) == 3
    first, other = (drawn(tmp_path / name, tmp_path / f"p-{name}")[0] for name in ("mine", "half"))
    assert 0 < np.abs(first - other).max() <= 16


def test_a_file_that_does_not_say_all_is_asked_about(file, tmp_path, capsys):
    for words in (["import", f"{file}", f"{tmp_path}/mine"], ["info", f"{file}"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(words)
        assert stopped.value.code == 2
        assert "--num-heads N or --head-dim N" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("name", ["file/mine", "a" * 300, "n" * 250])
def test_an_import_into_a_place_that_cannot_be_written(name, file, tmp_path):
    (tmp_path / "file").touch()
    model = open_model(file, Asked(head_dim=16, text_heads=4, latent_scale=0.2, prediction_type="epsilon"))
    with pytest.raises(InputError, match="cannot write there"):
        store(model, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_import_is_a_checkpoint_of_this_house(file, ldm, tmp_path, capsys):
    ldm("import", file, tmp_path / "mine", *HEADS)
    facts = open_model(tmp_path / "mine").facts
    assert (facts["format"], facts["family"], facts["source"]) == (
        "ldm",
        "sd1",
        "single file small.safetensors",
    )
    with pytest.raises(SystemExit):
        cli.main(["import", f"{file}", f"{tmp_path}/mine", *HEADS])
    assert "is there already; choose a new folder" in capsys.readouterr().err
    assert "Model hash: " in drawn(tmp_path / "mine", tmp_path / "0")[1]
