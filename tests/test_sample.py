"""sample.py: prompts word for word, pictures with recipes that are never overwritten, errors of one line."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ldm.pictures import parse_recipe

ROOT = Path(__file__).parent.parent
PROMPTS = [
    "a cat, sleeping, (soft:1.2) [day|night]",
    'she said "hi" & left; $HOME {a,b} a=b',
    "it's 100 % \\ back",
    "--help",
    "two\nlines",
    "",
]


@pytest.fixture(scope="session")
def sample():
    spec = importlib.util.spec_from_file_location("sample_script", ROOT / "sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def opened(path):
    with Image.open(path) as picture:
        picture.load()
        return picture


def recipes(folder):
    return [parse_recipe(opened(p).text["parameters"]) for p in sorted(folder.glob("[0-9]*.png"))]


def test_prompts_arrive_word_for_word_through_the_real_command_line(tiny_run, tmp_path):
    odd = tmp_path / "out, [1]=x"
    command = [sys.executable, str(ROOT / "sample.py"), f"checkpoint={tiny_run}", f"output={odd}", "seed=7"]
    command += [f"prompt={p}" for p in PROMPTS] + ["negative_prompt=blurry, (bad) = worse", "num_steps=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=_environment())
    assert done.returncode == 0, done.stderr
    found = recipes(odd)
    assert [r["prompt"] for r in found] == PROMPTS
    assert {r["negative_prompt"] for r in found} == {"blurry, (bad) = worse"}
    assert [r["Seed"] for r in found] == [str(7 + i) for i in range(len(PROMPTS))]
    assert done.stdout.split("\n")[:-1] == [str(p) for p in sorted(odd.glob("*.png"))]


def _environment():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_options_reach_the_pictures_and_the_recipe_makes_one_again(sample, tiny_run, tmp_path):
    words = [
        f"checkpoint={tiny_run}",
        "prompt=red apple",
        "num_images=2",
        "num_steps=2",
        "sampler=euler_ancestral",
    ]
    words += ["guidance_scale=1.5", "guidance_rescale=0.5", "height=24", "width=16", "seed=3", "weights=raw"]
    assert sample.main([*words, f"output={tmp_path / 'a'}"]) == 0
    first, second = recipes(tmp_path / "a")
    assert (second["Steps"], second["Sampler"], second["CFG scale"]) == ("2", "Euler a", "1.5")
    assert (second["CFG rescale"], second["Size"], second["Seed"]) == ("0.5", "16x24", "4")
    assert first["Seed"] == "3"
    again = [w for w in words if not w.startswith(("seed", "num_images"))]
    assert sample.main([*again, f"seed={second['Seed']}", f"output={tmp_path / 'b'}"]) == 0
    one, other = opened(tmp_path / "a/00001.png"), opened(tmp_path / "b/00000.png")
    assert max(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True)) <= 1


def test_nothing_is_overwritten_and_several_make_a_sheet(sample, tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [f"checkpoint={tiny_run}", "prompt=a", "num_steps=1"]
    assert sample.main(words) == 0
    folder = tmp_path / "samples" / "tiny"
    assert sorted(p.name for p in folder.iterdir()) == ["00000.png"]
    before = (folder / "00000.png").read_bytes()
    assert sample.main([*words, "prompt=b", "num_images=2"]) == 0
    names = [*(f"0000{i}.png" for i in range(5)), "sheet-00001.png"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert (folder / "00000.png").read_bytes() == before
    assert [r["prompt"] for r in recipes(folder)] == ["a", "a", "a", "b", "b"]
    assert capsys.readouterr().out.split("\n")[-2] == str(Path("samples/tiny/sheet-00001.png"))


def test_prompt_file(sample, tiny_run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff# fruit\nred apple, ripe\n\n  # more\r\na=b # kept\r\n", encoding="utf-8")
    words = [f"checkpoint={tiny_run}", f"prompt_file={file}", "num_steps=1", f"output={tmp_path / 'o'}"]
    assert sample.main([*words, "prompt=first"]) == 0
    assert [r["prompt"] for r in recipes(tmp_path / "o")] == ["first", "red apple, ripe", "a=b # kept"]


def test_image_to_image(sample, tiny_run, tmp_path):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "in, 1.png")
    words = [f"checkpoint={tiny_run}", "prompt=a", f"init_image={tmp_path / 'in, 1.png'}", "strength=0.5"]
    assert sample.main([*words, f"output={tmp_path / 'o'}"]) == 0
    assert recipes(tmp_path / "o")[0]["Denoising strength"] == "0.5"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["num_steps=0"], "num_steps=0: need 1..1000"),
        (["num_steps=many"], "num_steps=many: need 1..1000"),
        (["height=500"], "height=500: must be a multiple of 8; nearest: 496, 504"),
        (["init_image=no, such.png"], "init_image=no, such.png: no such file"),
        (["init_image=no.png", "strength=2"], "strength=2: need a number in 0..1"),
        (["sampler=dpmpp2m"], "sampler=dpmpp2m: no such option; did you mean dpmpp_2m?"),
        (["weights=best"], "weights=best: no such option"),
        (["checkpoint=nowhere"], "checkpoint=nowhere: no such checkpoint"),
        (["checkpoint="], "checkpoint: missing value; set checkpoint=PATH"),
        (["seed=x"], "seed: expected int, got 'x'"),
        (["promt=a cat"], "promt: unknown key; did you mean prompt?"),
        (["a cat"], "a cat: not an override"),
        (["--steps", "5"], "--steps: unknown flag"),
        (["prompt_file=nowhere.txt"], "prompt_file=nowhere.txt: No such file"),
        (["prompt_file=empty.txt"], "prompt_file=empty.txt: no prompt in it"),
        (["prompt_file=odd.txt"], "prompt_file=odd.txt: not UTF-8 text"),
        (["output=empty.txt", "num_steps=1"], "output=empty.txt: cannot write there"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(sample, tiny_run, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfe\xfa")
    given = [] if any(w.startswith("checkpoint=") for w in words) else [f"checkpoint={tiny_run}"]
    with pytest.raises(SystemExit) as stop:
        sample.main([*given, "prompt=a", *words])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert lines[-1].startswith(f"ldm: error: {message}")
    assert sum(line.startswith("ldm: error") for line in lines) == 1


def test_texts_may_not_repeat_but_for_the_prompt(sample, tiny_run, capsys):
    with pytest.raises(SystemExit):
        sample.main([f"checkpoint={tiny_run}", "prompt=a", "output=x", "output=y"])
    assert "output: given 2 times; only prompt may repeat" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sample.main([f"checkpoint={tiny_run}"])
    assert 'prompt: there is none; give one: prompt="a red apple"' in capsys.readouterr().err


def test_help_and_config_draw_nothing(sample, capsys):
    assert sample.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "guidance_rescale: null # 0 to 1" in text
    assert sample.main(["--cfg", "job", "seed=5", "prompt=a: [b", "output=a, b"]) == 0
    from ldm.config import from_yaml

    shown = from_yaml(capsys.readouterr().out)
    assert (shown.seed, list(shown.prompt), shown.output) == (5, ["a: [b"], "a, b")


def test_script_is_short():
    assert len((ROOT / "sample.py").read_text().splitlines()) < 150
