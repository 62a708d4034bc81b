"""Latent diffusion: train both stages, sample, evaluate. Importing this package imports nothing heavy."""

from __future__ import annotations

from typing import Any

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """`ldm.load` and `ldm.__version__`, found on first use, so that `import ldm` needs no torch."""
    if name == "load":
        from ldm.pipeline import load

        return load
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("ldm")
        except PackageNotFoundError:
            return "0.0.0+source"
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
