"""The pages say only what is true of the code.

Every command of the README is run on a tiny checkpoint, or taken apart by the parser it is meant for; every
file and symbol that the pages name exists.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from ldm import cli
from ldm.config import compose, split_arguments
from ldm.data.inspect_page import MEANING
from ldm.pictures import recipe, save_png

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHECKPOINTS = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
READING = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SYMBOL = re.compile(r"`([\w/]+\.py):([\w.]+)`")
SET_UP = (
    "pip install -e . && python train.py experiment=quickstart\n",
    'pip install -e ".[test]" && pytest\n',
)


def blocks(text, language):
    return [body for kind, body in FENCE.findall(text) if kind == language]


def commands(text):
    """Each command of the shell blocks as words; lines are joined at backslashes and cut at &&."""
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(part) for line in lines for part in line.split(" && ")]


def of(*start):
    """The pages' commands that begin so, without that, and without those that differ in nothing."""
    lines = commands(README) + commands(CHECKPOINTS) + commands(DATA)
    found = [tuple(words[len(start) :]) for words in lines if words[: len(start)] == list(start)]
    assert found, f"the README has no command {' '.join(start)}"
    return list(dict.fromkeys(found))


def shown(words):
    return " ".join(words)


def test_every_command_is_of_a_kind_that_is_checked_here():
    known = (
        "python train.py",
        "python sample.py",
        "sbatch slurm/train.sbatch",
        "pip install",
        "pytest",
        "ldm",
    )
    lines = commands(README) + commands(CHECKPOINTS) + commands(DATA)
    assert [words for words in lines if not shown(words).startswith(known)] == []


# ---- set-up ----------------------------------------------------------------------------------------------


def test_the_first_section_is_the_two_commands():
    section = re.split(r"^## .*\n", README, flags=re.M)[1]
    assert tuple(body for _, body in FENCE.findall(section)) == SET_UP
    assert FENCE.findall(README)[:2] == [("bash", command) for command in SET_UP]


def test_ci_runs_the_two_commands_as_they_stand():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    program = re.search(r"awk '(.+)' README\.md", script)[1]
    done = subprocess.run(["awk", program, "README.md"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "".join(SET_UP)


@pytest.mark.parametrize("script", [".ci/run", "slurm/train.sbatch", "slurm/data_cache.sbatch"])
def test_shell_scripts_are_well_formed(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", of("pip", "install"), ids=shown)
def test_extras_exist(words):
    flag, package = words
    extras = set(re.findall(r"\w+", package))
    assert (flag, package[0]) == ("-e", ".")
    assert extras <= PROJECT["project"]["optional-dependencies"].keys()


# ---- train -----------------------------------------------------------------------------------------------


def composed(words):
    """All configs that `train.py` would make of a command line: one, or one a stage."""
    flags, overrides = split_arguments(words)
    assert flags in ({}, {"cfg": "job"})
    cfg = compose("train", overrides)
    common = [word for word in overrides if not word.startswith("experiment=")]
    return [compose("train", [f"experiment={name}", *common]) for name in cfg.stages or []] or [cfg]


@pytest.mark.parametrize("words", of("python", "train.py"), ids=shown)
def test_training_commands_compose(words):
    assert all(cfg.trainer.max_steps > 0 for cfg in composed(words))


@pytest.mark.parametrize("words", of("sbatch", "slurm/train.sbatch"), ids=shown)
def test_slurm_commands_compose(words):
    script = (ROOT / "slurm" / "launch.sh").read_text(encoding="utf-8")
    added = re.search(r'set -- "\$@" (trainer=.+)$', script, re.M)[1].split()
    [cfg] = composed([*words, *added])
    assert cfg.trainer.strategy["_target_"] == "ldm.training.strategies.ddp"


# ---- sample ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(make_run, tmp_path, monkeypatch):
    """A working directory with a tiny run of the quickstart's name, and what its commands read."""
    for home in ("runs/quickstart", "weights/sd15"):
        make_run(tmp_path / home, config={"run_name": "quickstart"})
    for name in ("sketch", "mask"):
        Image.new("RGB", (40, 30), "white").save(tmp_path / f"{name}.png")
    (tmp_path / "prompts.txt").write_text("a pizza --n blurry --d 7 --s 2 --ss euler_a\na tree\n")
    first = recipe("a tree", "", {"Steps": 2, "Sampler": "DDIM", "Seed": 7})
    (tmp_path / "samples" / "quickstart").mkdir(parents=True)
    save_png(tmp_path / "samples" / "quickstart" / "00000.png", Image.new("RGB", (16, 16)), first)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", of("python", "sample.py"), ids=shown)
def test_sampling_commands_draw(words, folder):
    spec = importlib.util.spec_from_file_location("sample_for_readme", ROOT / "sample.py")
    sample = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sample)
    assert sample.main(words) == 0
    output = next((word[7:] for word in words if word.startswith("output=")), "samples/quickstart")
    made = {path.name for path in (folder / output).iterdir()} - {"00000.png"}
    assert "--help" in words or made & {"00001.png", "samples-00000.npz"}


@pytest.mark.parametrize("code", blocks(README, "python"), ids=lambda code: code.split("\n")[0])
def test_python_runs(code, folder, capsys):
    exec(compile(code, "README.md", "exec"), {})
    assert (folder / "apple.png").is_file()
    assert capsys.readouterr().out.startswith("red apple on a blue background\n")


# ---- the ldm command -------------------------------------------------------------------------------------


class Parsed(Exception):
    """The command line was understood; nothing is to be done."""


class Parser(cli.Parser):
    def parse_args(self, args=None, namespace=None):
        super().parse_args(args, namespace)
        raise Parsed

    def parse_intermixed_args(self, args=None, namespace=None):
        super().parse_intermixed_args(args, namespace)
        raise Parsed


@pytest.mark.parametrize("words", of("ldm"), ids=shown)
def test_ldm_commands_parse(words):
    verb = next(v for v in cli.VERBS if shown(words).startswith(v))
    with pytest.raises(Parsed):
        cli.VERBS[verb](Parser(prog=verb), list(words[len(verb.split()) :]))


# ---- what the pages name ---------------------------------------------------------------------------------


def test_the_layout_is_the_trees():
    tree = next(body for body in blocks(README, "text") if "train.py  " in body)
    named = [line.split()[0] for line in tree.splitlines()]
    assert [name for name in named if not (ROOT / name).exists()] == []
    parts = [
        path for path in (ROOT / "ldm").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    ]
    parts = {f"ldm/{path.name}{'/' if path.is_dir() else ''}" for path in parts} - {"ldm/__init__.py"}
    assert parts == {name for name in named if name.startswith("ldm/")}


@pytest.mark.parametrize("page", ["README.md", "docs/data.md", "docs/reading.md", "docs/log.md"])
def test_nothing_is_left_open(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
    assert re.findall(r"@@\w+@@", text) == []


def test_the_data_page_explains_every_reason():
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", DATA, re.M)
    assert dict(rows) == MEANING


def test_the_data_page_is_five_commands():
    section = DATA.split("## Five commands")[1].split("\n## ")[0]
    assert len(commands(section)) == 5


def names_in(body, prefix=""):
    """Dotted names of all functions, classes, methods and assignments below some statements."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from names_in(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


@pytest.mark.parametrize(("file", "symbol"), sorted(set(SYMBOL.findall(READING + README + DATA))))
def test_symbols_exist(file, symbol):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert symbol in set(names_in(tree.body))


def test_reading_states_the_size_of_files():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", READING, re.M)
    assert len(rows) >= 10
    sizes = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file, _ in rows}
    assert [(f, n, sizes[f]) for f, n in rows if abs(int(n) - sizes[f]) > max(10, sizes[f] // 10)] == []


def test_ten_questions_with_ten_answers():
    questions, answers = (re.split(r"^## Answers$", READING, flags=re.M)[i] for i in (0, 1))
    assert [re.findall(r"^(\d+)\. ", part, re.M) for part in (questions, answers)] == [
        [str(i) for i in range(1, 11)]
    ] * 2
    assert all(SYMBOL.search(answer) for answer in re.split(r"^\d+\. ", answers, flags=re.M)[1:])
