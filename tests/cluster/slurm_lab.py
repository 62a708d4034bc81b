"""A real Slurm on this machine, for tests: munged, slurmctld and several slurmd, on loopback, no systemd.

It needs the packages slurmctld, slurmd, slurm-client and munge, and neither root nor a file in /etc. Nodes
are processes that share this machine (of a Slurm built with --enable-multiple-slurmd, as Debian's is).
Everything is in one short folder under /tmp: munged wants each parent of its socket open to all, and a
socket's path is at most 108 bytes long, so pytest's own folders will not do.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "OUT_OF_MEMORY",
}

CONFIG = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={port}
SrunPortRange={srun_first}-{srun_last}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for its old credential to expire before it starts again: 120 s by default, 5 at least.
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters={controller}
SlurmdTimeout={slurmd_timeout}
SlurmctldTimeout=10
KillWait={kill_wait}
WaitTime=1
MinJobAge=300
FirstJobId={first_job}
CompleteWait=0
ReturnToService=2
SlurmdParameters=config_overrides
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobs.txt
GresTypes=gpu
NodeName=node[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_first}-{node_last}] CPUs={cpus} \
Boards=1 Sockets=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=8000 Gres=gpu:2 State=UNKNOWN
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
"""


def missing() -> list[str]:
    """Programs of Slurm and munge that this machine does not have."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]


class SlurmLab:
    """A cluster `node1` ... `nodeN`; `with SlurmLab() as lab` starts it and takes everything away afterwards.

    warn: preemption sends a job the signal of its --signal first, as clusters do that set
    preempt_send_user_signal; else SIGTERM. grace, kill_wait and slurmd_timeout are seconds.
    """

    def __init__(
        self,
        nodes: int = 2,
        cpus: int = 2,
        grace: int = 30,
        kill_wait: int = 5,
        slurmd_timeout: int = 10,
        warn: bool = True,
    ) -> None:
        self.nodes = [f"node{i}" for i in range(1, nodes + 1)]
        self.folder = Path(tempfile.mkdtemp(prefix="lab_", dir="/tmp"))
        self.folder.chmod(0o755)
        place = _free_place(nodes)
        port = 11000 + 200 * place
        self._config = CONFIG.format(
            host=socket.gethostname().partition(".")[0],
            user=_user(),
            folder=self.folder,
            port=port,
            node_first=port + 1,
            node_last=port + nodes,
            srun_first=port + 100,
            srun_last=port + 199,
            first_job=1
            + 250 * place,  # numbers of jobs become ports of jobs: none in common with another lab
            controller="preempt_send_user_signal" if warn else "idle_on_node_suspend",
            nodes=nodes,
            cpus=cpus,
            grace=grace,
            kill_wait=kill_wait,
            slurmd_timeout=slurmd_timeout,
        )
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.env = {**clean, "PATH": SEARCH, "SLURM_CONF": str(self.folder / "slurm.conf")}

    # ---- up and down -----------------------------------------------------------------------------------

    def __enter__(self) -> SlurmLab:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        for name in ("run", "log", "state", "jobs", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "run/munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        (self.folder / "slurm.conf").write_text(self._config)
        # Without a mounted cgroup file system slurmd 22.05 looks for none only if it is told a version.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        # Plain files stand for GPUs: jobs that ask for some are accepted, and see none.
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/run/gpu[0-1]\n")
        for gpu in ("gpu0", "gpu1"):
            (self.folder / "run" / gpu).touch()
        files = {"key": "munge.key", "socket": "munge.socket", "pid": "munged.pid", "seed": "munge.seed"}
        munge = [
            f"--{name}-file={self.folder}/run/{file}" for name, file in files.items() if name != "socket"
        ]
        munge += [f"--socket={self.folder}/run/munge.socket", f"--log-file={self.folder}/log/munged.log"]
        self._daemon("munged", "--num-threads=2", *munge)
        self._daemon("slurmctld")
        for node in self.nodes:
            self._daemon("slurmd", "-N", node)
        self.until(lambda: all(self.state(node) == "IDLE" for node in self.nodes), 30, "nodes that are idle")

    def stop(self) -> None:
        """End all jobs and daemons, by their pid files, and delete the folder."""
        if self._pid("slurmctld"):
            self.run("scancel", "--signal=KILL", "--user", _user(), check=False)
            self.run("scancel", "--user", _user(), check=False)
            with contextlib.suppress(TimeoutError):
                self.until(lambda: not self.run("squeue", "-h", check=False), 10, "an empty queue")
        for node in self.nodes:
            for pid in self._steps(node):
                _kill(pid)
        for name in (*self.nodes, "slurmctld", "munged"):
            if pid := self._pid(name):
                _kill(pid, signal.SIGTERM)
                with contextlib.suppress(TimeoutError):  # slurmctld writes its state for seconds: not needed
                    self.until(lambda name=name: not self._pid(name), 1, "")
                if pid := self._pid(name):
                    _kill(pid)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _daemon(self, *command: str) -> None:
        """Start one that goes into the background; never with a pipe, which it would hold open for ever."""
        with open(self.folder / "log/start.log", "ab") as log:
            done = subprocess.run(
                command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=30,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"{command[0]} ended with {done.returncode}\n{self.logs()}")

    def _pid(self, name: str) -> int | None:
        """The number in a pid file, if that process is one of our daemons: numbers are used again."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.folder / f"run/{name}.pid").read_text())
            comm = Path(f"/proc/{pid}/comm").read_text().strip()
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            return pid if comm in ("munged", "slurmctld", "slurmd") and state != "Z" else None
        return None

    # ---- nodes -----------------------------------------------------------------------------------------

    def state(self, node: str) -> str:
        """IDLE, MIXED, ALLOCATED, DOWN and so on, with `*` while it does not answer."""
        shown = self.run("scontrol", "show", "node", "-o", node, check=False)
        return dict(re.findall(r"(\w+)=(\S*)", shown)).get("State", "")

    def crash(self, node: str, notice: bool = True) -> None:
        """Power loss: slurmd, its steps and their tasks are killed at once.

        notice: the controller is told; else it finds out by itself, after two or three slurmd_timeout.
        """
        daemon = self._pid(node)
        if daemon is None:
            raise ValueError(f"{node} is not up")
        os.kill(daemon, signal.SIGSTOP)  # it shall not report the deaths of its steps
        for pid in (*self._steps(node), daemon):
            _kill(pid)
        (self.folder / f"run/{node}.pid").unlink(missing_ok=True)
        if notice:
            self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=crash")

    def boot(self, node: str) -> None:
        """Bring a crashed node back into service."""
        self._daemon("slurmd", "-N", node)

        def back() -> bool:
            if self.state(node).rstrip("*") in ("IDLE", "MIXED", "ALLOCATED"):
                return True
            self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
            return False

        self.until(back, 30, f"{node} back")

    def _steps(self, node: str) -> list[int]:
        """Processes of the node's slurmstepd, found by the sockets in its spool folder, and below them."""
        rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
        spool = f"{self.folder}/spool/{node}/"
        links = {f"socket:[{row[6]}]" for row in rows if len(row) > 7 and row[7].startswith(spool)}
        heads = [pid for pid in _processes() if _comm(pid).startswith("slurmstepd") and _opens(pid) & links]
        return [pid for head in heads for pid in (*_below(head), head)]

    # ---- clients ---------------------------------------------------------------------------------------

    def run(
        self,
        *command: str | Path,
        check: bool = True,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> str:
        """What a program of Slurm prints."""
        words, environment = [str(word) for word in command], {**self.env, **(env or {})}
        done = subprocess.run(
            words,
            env=environment,
            cwd=cwd or self.folder / "jobs",
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def sbatch(
        self, *words: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> str:
        """Submit from `cwd`; returns the number of the job. `log` is its output."""
        output = f"--output={self.folder}/jobs/%j.log"
        return self.run("sbatch", "--parsable", output, *words, cwd=cwd, env=env)

    def log(self, job: str) -> str:
        file = self.folder / f"jobs/{job}.log"
        return file.read_text() if file.exists() else ""

    def job(self, job: str) -> dict[str, str]:
        """JobState, Restarts, ExitCode and so on."""
        return dict(re.findall(r"([\w/:]+)=(\S*)", self.run("scontrol", "show", "job", "-o", job)))

    def wait(
        self, job: str, *states: str, timeout: float = 120, restarts: int | None = None
    ) -> dict[str, str]:
        """The job once it is in one of the states, by default any in which it is over."""
        wanted = set(states) or ENDED

        def there() -> bool:
            found = self.job(job)
            return found["JobState"] in wanted and restarts in (None, int(found["Restarts"]))

        self.until(there, timeout, lambda: f"{job}: {wanted}; {self.job(job)}\n{self.log(job)}")
        return self.job(job)

    def until(self, true: Callable[[], bool], timeout: float, what: str | Callable[[], str]) -> None:
        end = time.monotonic() + timeout
        while not true():
            if time.monotonic() > end:
                wanted = what if isinstance(what, str) else what()
                raise TimeoutError(f"waited {timeout} s for {wanted}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        """The last lines of every daemon."""
        files = sorted((self.folder / "log").glob("*.log"))
        return "\n".join(line for f in files for line in [f.name, *f.read_text().splitlines()[-15:]])


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _free_place(nodes: int) -> int:
    """Which of 40 blocks of 200 ports has its first ones free."""
    places = list(range(40))
    random.shuffle(places)
    for place in places:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(11000 + 200 * place, 11000 + 200 * place + nodes + 1):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return place
    raise RuntimeError("no block of free ports for another lab")


def _processes() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())


def _comm(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _opens(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(os.readlink(entry))
    return found


def _below(pid: int) -> list[int]:
    """All descendants of a process."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [*_below(int(child)), int(child)]
    return found


def _kill(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
