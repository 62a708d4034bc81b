"""The one error that users see: `ldm: error: WHERE: WHAT; FIX`, one line, exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something the user gave is wrong: the place, the value, and what to do about it."""

    def __init__(self, where: str, what: str, fix: str = "") -> None:
        super().__init__(f"{where}: {what}" + (f"; {fix}" if fix else ""))


@contextmanager
def reported() -> Iterator[None]:
    """Turn an `InputError` into its line on stderr (of rank 0) and exit code 2."""
    try:
        yield
    except InputError as error:
        ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
        if next((rank for rank in ranks if rank is not None), "0") == "0":
            print("ldm: error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        raise SystemExit(2) from None
