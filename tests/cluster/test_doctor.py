"""The doctor at work: probes against what is known, and real ranks of which one is slow, late or gone."""

import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ldm import cli
from ldm.cluster import doctor, probes, shared_files
from ldm.cluster.doctor import Talk
from ldm.cluster.place import Place
from ldm.errors import InputError

ROOT = Path(cli.__file__).parents[1]
CPU = torch.device("cpu")


# ---- probes


def test_a_right_product_has_the_error_of_float32_and_a_wrong_one_more(monkeypatch):
    assert 0 < probes.compute_error(CPU) < 1e-5
    original = torch.Tensor.__matmul__

    def matmul(a, b):
        product = original(a, b)
        if product.dtype == torch.float32:
            product[3, 5] += 7.0  # one bad unit
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", matmul)
    assert probes.compute_error(CPU) > 0.05


def test_the_rate_is_that_of_the_clock(monkeypatch):
    monkeypatch.setitem(probes.SIDES, "cpu", 64)
    monkeypatch.setattr(probes, "_timed", lambda work, device: 0.5)
    assert probes.compute_rate(CPU) == 2 * 64**3 / 0.5


def test_a_device_that_raises_is_broken(monkeypatch):
    def fail(device):
        raise RuntimeError("CUDA error:\n an illegal memory access")

    monkeypatch.setattr(probes, "compute_rate", fail)
    assert probes.device_facts(CPU)["broken"] == "CUDA error: an illegal memory access"


def test_memory_and_files(tmp_path):
    assert 1e8 < probes.available_memory() < 1e14
    assert probes.free_bytes("/nowhere") is None
    (tmp_path / "a.tar").write_bytes(b"12345")
    shards = [(str(tmp_path / "a.tar"), 5), (str(tmp_path / "a.tar"), 6), (str(tmp_path / "b.tar"), 1)]
    assert probes.wrong_shards(shards) == [
        f"{tmp_path}/a.tar: 5 bytes, 6 on rank 0",
        f"{tmp_path}/b.tar: No such file or directory",
    ]
    assert probes.missing_files([str(tmp_path), "/nowhere"]) == ["/nowhere"]


# ---- rank 0 and the others


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_rank_0_that_is_not_there_is_named(monkeypatch, port):
    monkeypatch.setattr(doctor, "MEETING", 0.5)
    place = Place(1, 2, host="node2", address="127.0.0.1", port=port)
    with pytest.raises(
        InputError, match=f"^127.0.0.1:{port}: rank 0 does not answer there; exclude"
    ) as error:
        list(doctor.examine(place, [], 1, 0.5))
    assert error.value.every_rank


def test_a_port_that_is_taken(port):
    with socket.socket() as other:
        other.bind(("0.0.0.0", port))
        other.listen()
        place = Place(0, 2, host="node1", address="127.0.0.1", port=port)
        with pytest.raises(
            InputError, match="rank 0 cannot listen there, the port is taken; set MASTER_PORT"
        ):
            list(doctor.examine(place, [], 1, 0.5))


# ---- files


def test_a_folder_that_another_sees_whole_and_locked(tmp_path):
    root, found = tmp_path / "new/runs", {}
    with shared_files.token(root, ".ldm-doctor-x") as path:
        other = threading.Thread(target=lambda: found.update(shared_files.watch(path, 5)))
        other.start()
        count = shared_files.replace_for(path, 1.5 * shared_files.WATCHED)
        other.join()
    assert found["torn"] == 0
    assert found["reads"] > 10
    assert count > 10
    assert found["lock"] == "held"
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_file_that_is_written_in_place_is_seen_torn(tmp_path):
    path, found = tmp_path / "x", {}
    path.write_bytes(shared_files.TEXTS[0])
    other = threading.Thread(target=lambda: found.update(shared_files.watch(path, 5)))
    other.start()
    while other.is_alive():
        with path.open("wb", buffering=0) as file:
            file.write(b"a" * 1500)
            time.sleep(0.001)
            file.write(b"a" * 1500)
    assert found["torn"] > 0
    assert found["lock"] == "free", "nobody holds one"


def test_a_folder_that_is_not_shared(tmp_path):
    assert shared_files.watch(tmp_path / "nothing", 0.2) == {"seen": None}


def test_the_rate_of_writing_counts_what_is_written(tmp_path):
    began = time.perf_counter()
    rate = shared_files.write_rate(tmp_path, "x", 3 << 20)
    assert (3 << 20) / rate <= time.perf_counter() - began
    assert list(tmp_path.iterdir()) == []


# ---- talk


@pytest.fixture
def pair():
    """Two ranks in one process that share a store over TCP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [Talk(Place(rank, 2, rank, 2, f"node{rank}", "127.0.0.1", port), 5.0) for rank in (0, 1)]


def test_what_is_told_is_heard_and_silence_ends(pair):
    first, second = pair
    second.tell("facts/1", {"host": "node1", "x": [1, None]})
    assert first.gather("facts", [1], 5) == ({1: {"host": "node1", "x": [1, None]}}, [])
    began = time.monotonic()
    assert first.gather("facts", [1, 2, 3], 0.5) == ({1: {"host": "node1", "x": [1, None]}}, [2, 3])
    assert time.monotonic() - began < 3, "one limit for all"
    threading.Timer(0.2, second.tell, ["late", 7]).start()
    assert first.hear("late", 5) == 7


def test_alone(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(probes.SIDES, "cpu", 64)
    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    whats = [re.fullmatch(r"(ok  |warn) ([a-zA-Z/ ]+): .+", line)[2] for line in lines]
    assert whats[:4] == ["ranks", "devices", "versions", "computing"]
    assert {"writing", "disk", "RAM", "/dev/shm", "open files"} <= set(whats)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--timeout", "0"], "--timeout: expected above 0, got 0.0"),
        (["--bandwidth-mb", "-1"], "--bandwidth-mb: expected above 0, got -1.0"),
        (["experiment=quickstrat"], "experiment=quickstrat: "),
    ],
)
def test_bad_input(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", *words])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"ldm: error: {message}")


# ---- real ranks

PROGRAM = """
import os, socket, sys, time
rank = int(os.environ["RANK"])
socket.gethostname = lambda: f"node{{rank + 1}}"
{patch}
from ldm.cli import main
sys.exit(main(["doctor", "--timeout", "{timeout}", "--bandwidth-mb", "4"]))
"""
SLOW = """
from ldm.cluster import probes
original = probes._timed
if rank == 1:
    probes._timed = lambda work, device: original(lambda: (work(), time.sleep(0.5)), device)
"""
AWAY = """
if rank == 1:
    time.sleep(600)
"""
STUCK = """
from ldm.cluster import links
if rank == 1:
    links.all_reduce_seconds = lambda size, device: time.sleep(600)
"""


def torchrun(program):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]


@pytest.fixture
def ranks(tmp_path):
    """(patch of the program, timeout) -> exit code and lines of two ranks under torchrun."""

    def start(patch, timeout=30):
        program = tmp_path / "program.py"
        program.write_text(PROGRAM.format(patch=patch, timeout=timeout))
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        one = subprocess.Popen(torchrun(program), cwd=tmp_path, env=env, start_new_session=True, **pipes)
        try:
            out, err = one.communicate(timeout=200)
        finally:
            os.killpg(one.pid, signal.SIGKILL) if one.poll() is None else None
        assert "Traceback" not in out, out + err
        return one.returncode, out.splitlines()

    return start


@pytest.mark.slow
def test_a_slow_node_among_real_ranks_is_named(ranks):
    code, lines = ranks(SLOW)
    (bad,) = [line for line in lines if line.startswith("FAIL")]
    assert bad.startswith("FAIL computing: node2 has a slow cpu 0: "), lines
    assert code == 1
    for what in ("ranks: 2 of 2 answered", "devices: 2 x cpu on 2 hosts", "clocks: 2 hosts within "):
        assert any(line.startswith(f"ok   {what}") for line in lines), (what, lines)
    (shared,) = [line for line in lines if " shared folder: " in line]
    assert re.search(r"[1-9]\d* reads of a file being replaced whole, locks hold", shared)
    (reduced,) = [line for line in lines if line.startswith("ok   all-reduce: 4.0 MB over 2 ranks in ")]
    milliseconds, rate = (float(re.search(rf"([\d.]+) {unit}", reduced)[1]) for unit in ("ms", "GB/s"))
    assert math.isclose(rate, 4e6 / (milliseconds / 1000) / 1e9, rel_tol=0.1, abs_tol=0.006)
    assert lines[-1].startswith("ok   links: 1 in a ring, ")


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named_and_not_waited_for(ranks):
    code, lines = ranks(AWAY, timeout=4)
    assert lines[0] == (
        "FAIL ranks: no answer within 4 s from rank 1 on node1 (exclude the host: srun --exclude=node1)"
    ), "by its neighbour on the node, as far as torchrun tells"
    assert code == 1
    assert any(line.startswith("ok   disk: ") for line in lines), "the others are examined"


@pytest.mark.slow
def test_a_rank_that_stops_within_the_collectives(ranks):
    code, lines = ranks(STUCK, timeout=4)
    assert code == 1
    assert any(line.startswith("FAIL all-reduce: ") for line in lines[-2:]), lines
