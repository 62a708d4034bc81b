"""Where messages go: the terminal, and log.txt of the run. Other ranks than 0 say only what went wrong."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from rich.logging import RichHandler


def log_to_terminal(rank: int) -> None:
    """Messages of this program to the terminal; not Lightning's advertisements and advice."""
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(show_path=False)])
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")


def log_to_file(path: Path) -> None:
    """Append messages with their time to `path` too, from now on; once, however often it is asked for."""
    root = logging.getLogger()
    if not any(getattr(handler, "baseFilename", None) == str(path.absolute()) for handler in root.handlers):
        handler = logging.FileHandler(path.absolute(), encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        root.addHandler(handler)
