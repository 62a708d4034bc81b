"""data.json of a checkpoint: which samples were consumed, by which plan, and whether a run can go on with it.

The state of the data is one integer, n samples consumed = completed optimizer steps * G. Beside it the
document says what the plan was made from, and what `ldm.data.health` keeps: the digest of what was consumed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ldm.data.plan import PLAN_VERSION
from ldm.errors import InputError

FORM = 2  # of the document; 1, which does not say so, knows neither digest nor skipped windows
log = logging.getLogger(__name__)


def check(stored: Mapping[str, Any], mine: Mapping[str, Any], rebase: bool) -> bool:
    """Whether the plan of a checkpoint's document goes on: all of `mine` is in it, with the same values.

    If it does not, `rebase` lets a plan of its own begin there; else raises `InputError`, as for a newer one.
    """
    for name, known in (("plan_version", PLAN_VERSION), ("form", FORM)):
        found = stored.get(name, 1)
        if found > known:
            what = f"data {name} {found} is newer than this program ({known})"
            raise InputError("resume", what, "update ldm")
    mine = {**mine, "plan_version": PLAN_VERSION}
    differ = [name for name, value in mine.items() if stored.get(name) != value]
    if not differ:
        return True
    theirs = ", ".join(f"{name} {str(stored.get(name))[:12]}" for name in differ)
    ours = ", ".join(str(mine[name])[:12] for name in differ)
    if not rebase:
        fix = "restore them, or pass data.rebase=true to start a new pass (samples may repeat)"
        raise InputError("data", f"checkpoint has {theirs}; now {ours}", fix)
    log.warning("data.rebase: %s became %s; samples of the current epoch may repeat", theirs, ours)
    return False
