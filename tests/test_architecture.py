"""House rules for a machine: who imports whom, nothing happens at import, nobody prints, files are short.

Read from the syntax tree, so that nothing is imported; each rule is also shown something that breaks it.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENTRY_POINTS = [ROOT / name for name in ("train.py", "sample.py") if (ROOT / name).exists()]
PACKAGE = ROOT / "ldm" / "__init__.py"
SOURCES = sorted((ROOT / "ldm").rglob("*.py"))
IDS = [path.relative_to(ROOT).as_posix() for path in SOURCES]

# Dependency direction (house.md 6): each part of ldm and the parts below it; siblings are in neither set.
CONTRACTS = {"errors", "random", "types"}
NETWORKS = {"nn", "autoencoder", "backbones", "conditioning"}
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "random": set(),
    "pictures": CONTRACTS,
    "build": {"errors"},
    "config": {"errors", "build"},
    "nn": CONTRACTS,
    "autoencoder": CONTRACTS | {"nn"},
    "backbones": CONTRACTS | {"nn"},
    "conditioning": CONTRACTS | {"nn"},
    "diffusion": CONTRACTS,
    "data": CONTRACTS,
    "checkpoints": CONTRACTS | {"config"},
    "evaluation": CONTRACTS | NETWORKS | {"diffusion", "data", "pictures", "config"},
    "training": CONTRACTS
    | NETWORKS
    | {
        "diffusion",
        "data",
        "pictures",
        "config",
        "checkpoints",
        "evaluation",
    },  # validation takes its metrics
    "sampling": CONTRACTS | {"diffusion", "pictures", "config"},
    "pipeline": CONTRACTS
    | NETWORKS
    | {"diffusion", "data", "pictures", "config", "checkpoints", "evaluation", "sampling"},
}
BELOW["cluster"] = set(BELOW)
BELOW["cli"] = set(BELOW)

# Third-party packages that only some files may know; a path that ends in / is a folder. The rest are free.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "lightning": ("ldm/training/", "ldm/data/datamodule.py", "train.py"),
    "pytorch_lightning": (),
    "webdataset": ("ldm/data/",),
    "open_clip": ("ldm/conditioning/text.py", "ldm/conditioning/frozen.py"),
    "hydra": ("ldm/config.py", "ldm/cli.py", "train.py", "sample.py"),
    "omegaconf": ("ldm/config.py", "ldm/cli.py", "train.py", "sample.py"),
    "wandb": ("ldm/training/",),
    "diffusers": (),
    "transformers": (),
    "peft": (),
    "triton": ("ldm/nn/kernels/",),
    "safetensors": ("ldm/checkpoints/", "ldm/conditioning/frozen.py", "ldm/evaluation/perceptual.py"),
    "pickle": (),
}
PURE = ("types", "random", "nn", "autoencoder", "backbones", "diffusion")  # torch, einops, standard library


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of all that is imported anywhere in a file; `from a import b` counts as a and a.b."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def wrong_direction(file: str, tree: ast.AST) -> list[str]:
    part = file.removeprefix("ldm/").partition("/")[0].removesuffix(".py")
    allowed = BELOW[part] | {part, "__version__"}
    found = [name.split(".")[1] for name in imported(tree) if name.startswith("ldm.")]
    return sorted({f"{file} imports ldm.{other}" for other in found if other not in allowed})


def wrong_packages(file: str, tree: ast.AST) -> list[str]:
    packages = {name.split(".")[0] for name in imported(tree)}
    part = file.removeprefix("ldm/").partition("/")[0].removesuffix(".py")
    wrong = [p for p in packages if p in ONLY_IN and not file.startswith(ONLY_IN[p] or ("nowhere",))]
    if file.startswith("ldm/") and part in PURE:
        known = {*sys.stdlib_module_names, "torch", "einops", "ldm"}
        known |= {"triton"} | ({"numpy"} if file == "ldm/random.py" else set())
        wrong += [p for p in packages if p not in known and p not in wrong]
    return sorted(f"{file} imports {package or 'relatively'}" for package in wrong)


# Calls that a module may make while it is imported: they make a value and do nothing else.
QUIET = {
    "getLogger", "TypeVar", "NewType", "namedtuple", "compile", "field", "dataclass", "frozenset", "set",
    "dict", "tuple", "list", "sorted", "range", "len", "enumerate", "zip", "int", "float", "str", "max",
    "min", "sum", "Path", "resolve", "parent", "split", "join", "format", "sqrt", "log", "exp", "pi",
    "finfo", "iinfo", "device", "partial", "keys", "values", "items", "lower", "upper", "repeat", "count",
    "getattr", "cast", "abs", "round", "fromkeys", "replace", "register_autograd", "factorial",
}  # fmt: skip


def side_effects(file: str, tree: ast.Module) -> list[str]:
    """Statements at the top of a file that do more than define names; its own dataclasses make values."""
    found: list[str] = []
    values = {node.name for node in tree.body if isinstance(node, ast.ClassDef) and _is_dataclass(node)}

    def check(statements: list[ast.stmt]) -> None:
        for node in statements:
            place = f"{file}:{node.lineno}"
            match node:
                case (
                    ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Pass()
                ):
                    pass
                case ast.Expr(value=ast.Constant()):
                    pass
                case ast.ClassDef():
                    check(node.body)
                case ast.If():
                    if ast.unparse(node.test) != "__name__ == '__main__'":
                        check(node.body + node.orelse)
                case ast.Try():
                    check(node.body + node.orelse + node.finalbody)
                    for handler in node.handlers:
                        check(handler.body)
                case ast.Assign() | ast.AnnAssign():
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    if not all(isinstance(target, (ast.Name, ast.Tuple)) for target in targets):
                        found.append(f"{place} changes {ast.unparse(targets[0])}")
                    for call in ast.walk(node.value) if node.value else ():
                        if isinstance(call, ast.Call) and _last_name(call.func) not in QUIET | values:
                            found.append(f"{place} calls {ast.unparse(call.func)}")
                case _:
                    found.append(f"{place} runs {ast.unparse(node)[:60]}")

    check(tree.body)
    return found


def _is_dataclass(node: ast.ClassDef) -> bool:
    names = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return "dataclass" in map(_last_name, names) and not any(
        isinstance(item, ast.FunctionDef) and item.name == "__post_init__" for item in node.body
    )


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def prints(file: str, tree: ast.AST) -> list[str]:
    if file in ("train.py", "sample.py", "ldm/cli.py", "ldm/cluster/commands.py", "ldm/errors.py"):
        return []
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        f"{file}:{c.lineno} prints" for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"
    ]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [path for path in SOURCES if path != PACKAGE], ids=relative)
def test_imports_point_downwards(path):
    assert wrong_direction(relative(path), parsed(path)) == []


@pytest.mark.parametrize("path", [*SOURCES, *ENTRY_POINTS], ids=relative)
def test_packages_stay_where_they_belong(path):
    assert wrong_packages(relative(path), parsed(path)) == []


@pytest.mark.parametrize("path", [*SOURCES, *ENTRY_POINTS], ids=relative)
def test_nothing_happens_at_import(path):
    assert side_effects(relative(path), parsed(path)) == []


@pytest.mark.parametrize("path", [*SOURCES, *ENTRY_POINTS], ids=relative)
def test_only_commands_print(path):
    assert prints(relative(path), parsed(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_top_level_files_keep_their_size():
    sizes = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in ENTRY_POINTS}
    limits = {"train.py": 100, "sample.py": 150}
    assert {name: size for name, size in sizes.items() if size > limits[name]} == {}


def test_every_part_has_its_place():
    parts = {path.relative_to(ROOT / "ldm").parts[0].removesuffix(".py") for path in SOURCES} - {"__init__"}
    assert parts - BELOW.keys() == set()


@pytest.mark.parametrize(
    ("rule", "file", "code"),
    [
        (wrong_direction, "ldm/backbones/unet.py", "from ldm.autoencoder.kl import AutoencoderKL"),
        (wrong_direction, "ldm/nn/attention.py", "def f():\n    from ldm import backbones"),
        (wrong_direction, "ldm/diffusion/denoiser.py", "import ldm.nn.attention"),
        (wrong_direction, "ldm/evaluation/x.py", "from ldm.checkpoints import native"),
        (wrong_direction, "ldm/types.py", "import ldm.errors"),
        (wrong_packages, "ldm/data/reader.py", "import lightning.pytorch as pl"),
        (wrong_packages, "ldm/conditioning/label.py", "def f():\n    import open_clip.model"),
        (wrong_packages, "ldm/training/x.py", "from omegaconf import DictConfig"),
        (wrong_packages, "ldm/pipeline.py", "try:\n    import diffusers\nexcept ImportError:\n    pass"),
        (wrong_packages, "ldm/nn/attention.py", "import numpy as np"),
        (wrong_packages, "ldm/nn/attention.py", "import triton"),
        (wrong_packages, "ldm/nn/attention.py", "from .resnet import x"),
        (wrong_packages, "ldm/checkpoints/x.py", "import pickle"),
        (side_effects, "ldm/x.py", "import torch\ntorch.set_num_threads(1)"),
        (side_effects, "ldm/x.py", "import os\nos.environ['A'] = '1'"),
        (side_effects, "ldm/x.py", "import os\nif True:\n    os.mkdir('x')"),
        (side_effects, "ldm/x.py", "DATA = open('x').read()"),
        (side_effects, "ldm/x.py", "class A:\n    print('x')"),
        (side_effects, "ldm/x.py", "for i in range(3):\n    pass"),
        (side_effects, "ldm/x.py", "class A:\n    pass\nX = A()"),
        (side_effects, "ldm/x.py", "@dataclass\nclass A:\n    def __post_init__(self): pass\nX = A()"),
        (prints, "ldm/x.py", "def f():\n    print(1)"),
    ],
)  # fmt: skip
def test_the_rules_can_be_broken(rule, file, code):
    assert rule(file, ast.parse(code)) != []
