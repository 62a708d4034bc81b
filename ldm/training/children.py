"""What Lightning's own launcher leaves open: its processes end when theirs does, however that ends.

Only there: torchrun and `srun --kill-on-bad-exit` see to it themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import Any

LAUNCHER = "LDM_LAUNCHER"  # environment: pid of the process that started this one to be another rank of it
PR_SET_PDEATHSIG = 1  # linux/prctl.h

_children: list[subprocess.Popen[bytes]] = []  # a second stage's launcher does not know of them


def tie() -> None:
    """Before each fit: a child of the launcher is killed when that process is gone (Linux alone)."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        os.environ[LAUNCHER] = str(os.getpid())
    elif parent():
        _on_death_of_parent(signal.SIGKILL)
        if os.getppid() != parent():  # it went before that
            os.kill(os.getpid(), signal.SIGKILL)


def untie() -> None:
    """After a fit that ended well the launcher may be done first."""
    if int(os.environ.get("LOCAL_RANK", "0")) and parent():
        _on_death_of_parent(0)


def parent() -> int | None:
    """Process that launched this rank; None for rank 0 of a node, and under torchrun or srun."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return int(os.environ[LAUNCHER]) if local and LAUNCHER in os.environ else None


def kill_parent() -> None:
    if parent() == os.getppid():
        os.kill(os.getppid(), signal.SIGKILL)


def remember(launcher: Any) -> None:
    """Know the children of Lightning's launcher from now on."""
    _children.extend(child for child in getattr(launcher, "procs", []) if child not in _children)


def signal_children(number: int) -> bool:
    """Send a signal to the ranks that this process started; whether any of them is there."""
    alive = [child for child in _children if child.poll() is None]
    for child in alive:
        with contextlib.suppress(OSError):
            child.send_signal(number)
    return bool(alive)


def wait(seconds: float) -> None:
    """Until the ranks that this process started are gone, but not longer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(child.poll() is None for child in _children):
        time.sleep(0.01)


def _on_death_of_parent(number: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
