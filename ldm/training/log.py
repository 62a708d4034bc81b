"""Where messages go: the terminal, and log.txt of the run. Other ranks than 0 say only what went wrong."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from logging.handlers import BufferingHandler
from pathlib import Path

from rich.logging import RichHandler

FILE_ONLY = "file_only"  # attribute of records that the terminal has in another form: logging's `extra`


def log_to_terminal(rank: int) -> None:
    """Messages of this program to the terminal; not Lightning's advertisements and advice."""
    level = logging.INFO if rank == 0 else logging.WARNING
    handler = RichHandler(show_path=False)
    handler.addFilter(lambda record: not getattr(record, FILE_ONLY, False))
    logging.basicConfig(level=level, format="%(message)s", handlers=[handler])
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")


class LogFile(logging.FileHandler):
    """A disk that takes no more is one line on the terminal, and one when it does again."""

    lost = 0  # records

    def emit(self, record: logging.LogRecord) -> None:
        before = self.lost
        super().emit(record)
        if 0 < before == self.lost:
            self.lost = 0
            logging.getLogger(__name__).warning(
                "%s is written again; %d lines came late or not", self.baseFilename, before
            )

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            return super().handleError(record)
        self.lost += 1
        if self.lost == 1:
            what = "%s cannot be written (%s)"
            logging.getLogger(__name__).warning(what, self.baseFilename, error.strerror or error)


@contextmanager
def recorded() -> Iterator[list[logging.LogRecord]]:
    """Gives the messages of the block, for a log file that is not there yet."""
    root, handler = logging.getLogger(), BufferingHandler(capacity=10_000)
    root.addHandler(handler)
    try:
        yield handler.buffer
    finally:
        root.removeHandler(handler)


def log_to_file(path: Path, before: Iterable[logging.LogRecord] = ()) -> None:
    """Append messages with their time to `path` too: those `before`, and all from now on.

    Once, however often it is asked for.
    """
    root = logging.getLogger()
    if not any(getattr(handler, "baseFilename", None) == str(path.absolute()) for handler in root.handlers):
        handler = LogFile(path.absolute(), encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        root.addHandler(handler)
        for record in before:
            handler.handle(record)
