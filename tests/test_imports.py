"""Every module imports on its own, `import ldm` is light, and the pure parts need torch and einops alone."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import ldm

ROOT = Path(__file__).parents[1]


def module_names() -> list[str]:
    paths = sorted((ROOT / "ldm").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in names]


def run(code: str, *arguments: str) -> str:
    """Standard output of a fresh interpreter in the repository's root."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_module_imports_first():
    """Each in its own child of one interpreter with the libraries but nothing of ldm: no circular imports."""
    code = """
        import importlib, os, sys, traceback
        import torch, lightning.pytorch, hydra, open_clip, webdataset, PIL.Image  # once, not in every child
        failed = []
        for name in sys.argv[1:]:
            assert not any(m == "ldm" or m.startswith("ldm.") for m in sys.modules)
            child = os.fork()
            if child == 0:
                try:
                    importlib.import_module(name)
                except BaseException:
                    traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(1)
                os._exit(0)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
                failed.append(name)
        sys.exit(f"these do not import: {failed}" if failed else 0)
    """
    run(code, *module_names())


def test_import_ldm_is_light():
    loaded = run("import ldm, sys; print(*sys.modules)").split()
    assert "ldm" in loaded
    heavy = {"torch", "lightning", "hydra", "omegaconf", "numpy", "PIL", "einops", "open_clip", "webdataset"}
    assert heavy & {name.split(".")[0] for name in loaded} == set()
    assert [name for name in loaded if name.startswith("ldm.")] == []


def test_lazy_names():
    try:
        installed = importlib.metadata.version("ldm")
    except importlib.metadata.PackageNotFoundError:
        installed = "0.0.0+source"
    assert ldm.__version__ == installed
    assert ldm.load.__module__ == "ldm.pipeline"
    with pytest.raises(AttributeError, match="module 'ldm' has no attribute 'lod'"):
        _ = ldm.lod


def test_version_of_a_tree_that_is_not_installed(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert ldm.__version__ == "0.0.0+source"


# What torch itself may load late; everything else that is neither standard library nor ldm is hidden.
TORCHS_OWN = "numpy,sympy,mpmath,networkx,jinja2,markupsafe,typing_extensions,filelock,fsspec,triton,torchgen"

ALONE = """
    import importlib, sys
    import torch, einops
    before = {name.split(".")[0] for name in sys.modules}

    class Hidden:
        def find_spec(self, name, path=None, target=None):
            root = name.split(".")[0]
            if root not in before | {"ldm"} | set(sys.stdlib_module_names) | set(sys.argv[1].split(",")):
                raise ModuleNotFoundError(f"hidden: {name}", name=name)

    sys.meta_path.insert(0, Hidden())
    for name in sys.argv[2:]:
        importlib.import_module(name)
    try:
        import safetensors
    except ModuleNotFoundError:
        print("hidden")
"""


def test_pure_parts_need_torch_and_einops_alone():
    parts = ("ldm.nn", "ldm.backbones", "ldm.autoencoder", "ldm.diffusion", "ldm.types", "ldm.random")
    names = [name for name in module_names() if name.startswith(parts)]
    assert len(names) >= len(parts)
    assert run(ALONE, TORCHS_OWN, *names) == "hidden\n"
