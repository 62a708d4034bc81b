"""sample.py: prompts word for word, pictures with recipes that are never overwritten, errors of one line."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
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


def test_prompt_file_with_options(sample, tiny_run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("red apple --n blurry, dark --w 24 --h 8 --d 77 --s 2 --l 1.5 --ss euler_a\nplain\n")
    words = [f"checkpoint={tiny_run}", f"prompt_file={file}", "num_steps=1", f"output={tmp_path / 'o'}"]
    assert sample.main([*words, "seed=5", "num_images=2"]) == 0
    first, second, third, fourth = recipes(tmp_path / "o")
    assert (first["prompt"], first["negative_prompt"]) == ("red apple", "blurry, dark")
    assert (first["Size"], first["Steps"], first["CFG scale"]) == ("24x8", "2", "1.5")
    assert (first["Sampler"], first["Seed"], second["Seed"]) == ("Euler a", "77", "78")
    assert (third["prompt"], third["negative_prompt"], third["Steps"]) == ("plain", "", "1")
    assert (third["Size"], third["Sampler"]) == ("16x16", "DDIM")
    assert (third["Seed"], fourth["Seed"]) == ("7", "8")


def test_errors_of_prompt_files_name_the_line_before_any_work(sample, tiny_run, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    for line, message in (
        ("b --w 20", ":2: width=20: must be a multiple of 8; nearest: 16, 24"),
        ("b --s 0", ":2: num_steps=0: need 1..1000"),
        ("b --x 1", ":2: --x is no option of a prompt"),
    ):
        file.write_text(f"a\n{line}\n")
        with pytest.raises(SystemExit):
            sample.main([f"checkpoint={tiny_run}", f"prompt_file={file}", f"output={tmp_path / 'o'}"])
        assert f"ldm: error: {file}{message}" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


# ---- grids -----------------------------------------------------------------------------------------------


def test_grid_of_two_options(sample, tiny_run, tmp_path):
    words = [f"checkpoint={tiny_run}", "prompt=red apple", "seed=3", f"output={tmp_path / 'o'}"]
    assert sample.main([*words, "xy.x=guidance_scale:1,2.5,4", "xy.y=num_steps:1,2"]) == 0
    found = [(r["CFG scale"], r["Steps"], r["Seed"]) for r in recipes(tmp_path / "o")]
    assert found == [(scale, steps, "3") for steps in ("1", "2") for scale in ("1", "2.5", "4")]
    sheet = np.asarray(opened(tmp_path / "o/sheet-00000.png").convert("RGB"))
    cells = [np.asarray(opened(p).convert("RGB")) for p in sorted((tmp_path / "o").glob("0*.png"))]
    width = 9 * 16  # each pixel of a cell is 9 wide
    assert sheet.shape[1] > 3 * width
    for cell in cells:  # as it is, somewhere
        big = cell.repeat(9, 0).repeat(9, 1)
        rows = [y for y in range(sheet.shape[0] - width + 1) if (sheet[y, :, :] != 255).any()]
        assert any(
            (sheet[y : y + width, x : x + width] == big).all()
            for y in rows
            for x in range(0, sheet.shape[1] - width + 1)
            if (sheet[y, x] == big[0, 0]).all()
        )
    alone = tmp_path / "alone"
    assert sample.main([*words[:3], f"output={alone}", "guidance_scale=4", "num_steps=2"]) == 0
    assert (alone / "00000.png").read_bytes() == (tmp_path / "o/00005.png").read_bytes()


def test_grid_over_texts_samplers_their_options_and_lists(sample, tiny_run, make_run, tmp_path):
    words = [f"checkpoint={tiny_run}", "num_steps=2"]
    texts = ["xy.x=prompt:red, ripe: [a|b]", "xy.x=prompt:green", "xy.y=sampler:heun,euler_ancestral"]
    assert sample.main([*words, *texts, f"output={tmp_path / 'a'}"]) == 0
    found = [(r["prompt"], r["Sampler"]) for r in recipes(tmp_path / "a")]
    assert found == [(p, s) for s in ("Heun", "Euler a") for p in ("red, ripe: [a|b]", "green")]
    more = ["prompt=a", "sampler=ddim", "xy.x=sampler.eta:0,0.5", "xy.y=guidance_interval:[0,1],[1,inf]"]
    assert sample.main([*words, *more, f"output={tmp_path / 'b'}"]) == 0
    found = [(r.get("Sampler eta"), r["CFG interval"]) for r in recipes(tmp_path / "b")]
    assert found == [(eta, i) for i in ("0 to 1", "1 to inf") for eta in (None, "0.5")]
    make_run(tmp_path / "other", step=24)
    more = ["prompt=a", f"xy.x=checkpoint:{tiny_run}", f"xy.x=checkpoint:{tmp_path / 'other'}"]
    assert sample.main(["num_steps=1", *more, "xy.y=seed:1,5", f"output={tmp_path / 'c'}"]) == 0
    found = [(r["Model"], r["Seed"]) for r in recipes(tmp_path / "c")]
    assert found == [(f"tiny step-0000000{n}", seed) for seed in "15" for n in (12, 24)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["xy.x=num_steps:1,x"], "num_steps=x: need 1..1000"),
        (["xy.x=num_steps:1,0"], "num_steps=0: need 1..1000"),
        (["xy.x=promt_steps:1"], "promt_steps: unknown key"),
        (["xy.x=num_images:1,2"], "xy.x=num_images: is no option of a picture"),
        (["xy.x=7"], "xy.x=7: not one option with values"),
        (["xy.x=seed:1,2", "xy.y=seed:3,4"], "xy.y: sets what xy.x sets"),
        (["xy.x=height:8,16", "format=npz"], "format=npz: one array has one size of pictures, not 2"),
        (["format=gif"], "format=gif: no such option; have: png, npz"),
        (["precision=int4"], "precision=int4: no such option; have: fp32, bf16, fp16"),
        (["guidance_interval=[3,1]"], "guidance_interval=[3, 1]: need two numbers"),
        (["tile=20"], "tile=20: must be a multiple of 8"),
        (["mask_image=no.png"], "mask_image: there is no picture to mask; give it: init_image=FILE"),
        (["sampler=ddim", "sampler.eta=2"], "sampler=ddim: eta=2 is not within 0 and 1"),
        (["sampler=plms", "spacing=karras", "num_steps=9"], "sampler=plms: needs an even grid"),
        (["speed.cuda_graph=true"], "speed.cuda_graph: there is no GPU to record one on"),
        (["speed.graph=true"], "speed.graph: unknown key"),
        (["xy.x=speed.compile:true,false"], "xy.x=speed.compile: is no option of a picture"),
        (["batch_size=0"], "batch_size=0: need 1 or more"),
        (["--from-png", "no.png"], "--from-png no.png: no such file"),
        (["--from-png"], "--from-png : no such file"),
    ],
)
def test_what_cannot_be_drawn_draws_nothing(sample, tiny_run, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        sample.main([f"checkpoint={tiny_run}", "prompt=a", *words])
    assert stop.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ldm: error")]
    assert line.startswith(f"ldm: error: {message}")
    assert not (tmp_path / "samples").exists()


# ---- from a recipe ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["sampler=ddim", "sampler.eta=0.3", "guidance_scale=1.2345678", "spacing=karras", "weights=raw"],
        ["sampler=heun_churn", "guidance_interval=[0.5,30]", "guidance_rescale=0.7", "precision=bf16"],
        ["sampler=dpmpp_2m_sde", "height=32", "width=16", "tile=16", "negative_prompt=dark, (bad)"],
        ["sampler=unipc", "init_image=in.png", "mask_image=mask.png", "strength=0.55", "num_steps=5"],
    ],
    ids=lambda words: words[0],
)
def test_from_png_draws_the_same_bits(sample, tiny_run, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (20, 40, 3), dtype=np.uint8)).save("in.png")
    Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), ((0, 12), (12, 20)))).save("mask.png")
    base = [f"checkpoint={tiny_run}", "num_steps=3", "seed=41"]
    assert sample.main([*base, "prompt=red apple", "prompt=a, b", "num_images=2", *words, "output=a"]) == 0
    pictures = [w for w in words if "image=" in w]
    for name in ("00000", "00002"):
        again = [f"checkpoint={tiny_run}", "--from-png", f"a/{name}.png", *pictures]
        assert sample.main([*again, f"output=b{name}"]) == 0
        assert Path(f"b{name}/00000.png").read_bytes() == Path(f"a/{name}.png").read_bytes()
    assert sample.main([*again, "seed=7", "num_steps=2", "batch_size=1", "output=c"]) == 0
    [other] = recipes(tmp_path / "c")
    assert (other["prompt"], other["Seed"], other["Steps"]) == ("a, b", "7", "2")
    assert "Batch size" not in other
    assert opened("c/00000.png").tobytes() != opened("a/00002.png").tobytes()


def test_from_png_says_what_is_missing_or_not_the_same(
    sample, tiny_run, make_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name, colour in (("in", "red"), ("other", "blue"), ("mask", "white")):
        Image.new("RGB", (16, 16), colour).save(f"{name}.png")
    words = [f"checkpoint={tiny_run}", "prompt=a", "num_steps=1", "init_image=in.png", "mask_image=mask.png"]
    assert sample.main([*words, "output=a"]) == 0
    make_run(tmp_path / "else", config={"run_name": "else"}, step=36)
    make_run(tmp_path / "raw", ema=False)
    again, masked = ["--from-png", "a/00000.png", "output=b"], ["init_image=in.png", "mask_image=mask.png"]
    for more, message in (
        (
            [f"checkpoint={tiny_run}"],
            "was drawn over a picture, of which its recipe has only the hash; give it: init",
        ),
        (
            [f"checkpoint={tiny_run}", masked[0]],
            "was drawn inside a mask, of which its recipe has only the hash",
        ),
        (
            [f"checkpoint={tiny_run}", "init_image=other.png", masked[1]],
            "was drawn with another init_image (hash ",
        ),
    ):
        with pytest.raises(SystemExit):
            sample.main([*again, *more])
        assert f"ldm: error: --from-png a/00000.png: {message}" in capsys.readouterr().err
    changed = tmp_path / "changed"
    make_changed(make_run, changed)
    with pytest.raises(SystemExit):
        sample.main([*again, f"checkpoint={changed}", *masked])
    error = capsys.readouterr().err
    assert "a/00000.png: was drawn by tiny step-000000012 (hash " in error
    assert "; give that checkpoint" in error
    assert not Path("b").exists()
    assert sample.main([*again, f"checkpoint={changed}", "weights=raw", *masked]) == 0  # asked for


def make_changed(make_run, root):
    """A run like the tiny one, with other EMA weights."""
    from ldm.checkpoints import native

    folder = make_run(root)
    tensors = {name: native.load_tensors(folder, name) for name in ("model", "ema")}
    tensors["ema"] = {key: value * 0.5 for key, value in tensors["ema"].items()}
    documents = {name: native.load_document(folder, name) for name in ("state.json", "config.yaml")}
    native.save(
        folder.parent, 13, tensors, {**documents, "config.yaml": (folder / "config.yaml").read_text()}
    )


def test_from_png_of_another_tool(sample, tiny_run, tmp_path, capsys):
    from ldm.pictures import save_png

    text = (
        "cat, (best:1.2)\nNegative prompt: bad\nhands\nSteps: 2, Sampler: DPM++ 2M Karras, CFG scale: 3.5, "
        'Seed: 9, Size: 24x16, Model hash: 6ce0161689, Model: v1-5, Lora hashes: "x: 1, y: 2", Version: v1.9'
    )
    save_png(tmp_path / "a.png", Image.new("RGB", (8, 8)), text)
    words = [f"checkpoint={tiny_run}", f"--from-png={tmp_path / 'a.png'}", f"output={tmp_path / 'o'}"]
    assert sample.main(words) == 0
    [r] = recipes(tmp_path / "o")
    assert (r["prompt"], r["negative_prompt"]) == ("cat, (best:1.2)", "bad\nhands")
    assert (r["Steps"], r["Sampler"], r["Schedule type"]) == ("2", "DPM++ 2M", "Karras")
    assert (r["CFG scale"], r["Seed"], r["Size"]) == ("3.5", "9", "24x16")
    for wrong, message in (
        ("Steps: x, Seed: 1, Size: 8x8", "Steps: 'x' in its recipe cannot be read"),
        ("Steps: 1, Seed: 1, Size: big", "Size: 'big' in its recipe cannot be read"),
        ("Steps: 1, Seed: 1, Sampler: LMS", "sampler LMS: no such sampler; have: ddim"),
        ("no recipe", "carries no recipe"),
    ):
        path = tmp_path / f"{message[:9]}.png"
        save_png(path, Image.new("RGB", (8, 8)), wrong)
        with pytest.raises(SystemExit):
            sample.main([f"checkpoint={tiny_run}", "--from-png", str(path)])
        assert f"--from-png {path}: {message}" in capsys.readouterr().err


# ---- many processes, arrays ------------------------------------------------------------------------------


FOUR_PROCESSES = """
import os, sys
import ldm.pipeline, sample  # once for all, which is most of the time
children = []
for rank in range(4):
    children.append(os.fork())
    if not children[-1]:
        os.environ |= {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": str(rank)}
        code = sample.main(sys.argv[1:])
        sys.stdout.flush()
        os._exit(code)
sys.exit(max(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.mark.slow
def test_64_prompts_over_4_processes_are_the_files_of_one(sample, tiny_run, tmp_path, monkeypatch, capsys):
    lines = [f"fruit {i}" + (" --s 2 --ss euler_a" if 20 <= i < 30 else "") for i in range(64)]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    words = [f"checkpoint={tiny_run}", f"prompt_file={tmp_path / 'p.txt'}", "num_steps=1", "seed=5"]
    assert sample.main([*words, f"output={tmp_path / 'one'}"]) == 0
    command = [sys.executable, "-c", FOUR_PROCESSES, *words, f"output={tmp_path / 'four'}"]
    env = _environment() | {"PYTHONUNBUFFERED": "1"}  # as in containers: each write is on the pipe at once
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    one, many = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "four"))
    assert len(one) == 65  # with the sheet
    assert sorted(many) == sorted(one)
    assert [name for name in one if many[name] != one[name]] == []
    printed = [Path(line).name for line in done.stdout.split("\n")[:-1]]
    assert sorted(printed) == sorted(one)  # each file is said once
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit):  # a second time: nothing is overwritten, and whose file it is says so
        sample.main([*words, f"output={tmp_path / 'four'}"])
    assert "00008.png is there already" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "four").iterdir()} == many


def test_processes_are_those_of_torchrun_or_srun(sample, tiny_run, tmp_path, monkeypatch, capsys):
    from ldm.sampling.output import processes

    monkeypatch.setenv("SLURM_NTASKS", "4")  # as in an sbatch script that starts one process
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert processes() == (0, 1, 0)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "2")
    assert processes() == (2, 4, 0)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert processes() == (0, 2, 0)
    words = [f"checkpoint={tiny_run}", "prompt=a", "num_steps=1", f"output={tmp_path / 'o'}"]
    with pytest.raises(SystemExit):
        sample.main([*words, "format=npz"])
    assert "format=npz: one array is written by one process" in capsys.readouterr().err
    assert sample.main(words) == 0
    assert "ldm: only 1 of 2 processes draw" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["00000.png"]
    with pytest.raises(SystemExit):
        sample.main(words)
    assert "00000.png is there already; several processes number from 00000" in capsys.readouterr().err


def test_array_for_evaluation(sample, tiny_run, tmp_path):
    words = [f"checkpoint={tiny_run}", "prompt=a", "prompt=b", "num_images=2", "num_steps=1", "height=24"]
    assert sample.main([*words, f"output={tmp_path / 'p'}"]) == 0
    for name in ("samples-00000.npz", "samples-00001.npz"):
        assert sample.main([*words, f"output={tmp_path / 'n'}", "format=npz"]) == 0
        with np.load(tmp_path / "n" / name) as file:
            array, texts = file["arr_0"], file["parameters"]
        assert (array.dtype, array.shape) == (np.uint8, (4, 24, 16, 3))
        for i, picture in enumerate(array):
            png = opened(tmp_path / "p" / f"{i:05d}.png")
            assert (picture == np.asarray(png)).all()
            assert texts[i] == png.text["parameters"]
    assert sorted(p.name for p in (tmp_path / "n").iterdir()) == ["samples-00000.npz", "samples-00001.npz"]


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
        (
            ["weights=ema:0.08"],
            "weights=ema:0.08: no snapshots of averages beside step-000000012; train with",
        ),
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
    assert "output: given 2 times; only prompt, xy.x, xy.y may repeat" in capsys.readouterr().err
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
