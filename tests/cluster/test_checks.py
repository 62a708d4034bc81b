"""What the doctor says of made-up clusters: healthy ones, and ones with a slow, wrong or missing node."""

import copy

import pytest

from ldm.cluster import checks
from ldm.cluster.checks import FAIL, OK, WARN, Line
from ldm.cluster.links import bus_bandwidth, members, rounds
from ldm.cluster.place import Place, hostnames, place_of, tasks_per_node

H100 = "NVIDIA H100 80GB HBM3"
VERSIONS = {"python": "3.12.3", "torch": "2.13.0", "CUDA": "13.0", "driver": "580.65.06", "NCCL": "2.28.3"}
NEEDS = {"accelerator": "gpu", "devices": 2, "num_nodes": 4, "world": 8}


def cluster(nodes=4, each=2):
    """Facts of healthy ranks on node1, node2, ..."""
    return [
        {
            "rank": rank,
            "host": f"node{rank // each + 1}",
            "versions": dict(VERSIONS),
            "visible": each,
            "devices": [
                {"name": H100, "index": rank % each, "error": 3e-7, "rate": 7e14 * (1 + 0.01 * (rank % 3))}
            ],
            "open_files": 65536,
            "shared_memory": 10**12,
            "memory": 10**12,
        }
        for rank in range(nodes * each)
    ]


def text(lines):
    return [str(line) for line in lines]


def test_a_line():
    assert str(Line(OK, "disk", "3 GB free")) == "ok   disk: 3 GB free"
    assert str(Line(FAIL, "disk", "3 GB free", "buy one")) == "FAIL disk: 3 GB free (buy one)"


# ---- ranks, devices, versions


def test_who_does_not_answer_is_named_with_its_host():
    assert checks.answers(8, {}, 60).level == OK
    assert str(checks.answers(8, {5: "node3", 4: "node3"}, 60)) == (
        "FAIL ranks: no answer within 60 s from rank 4 on node3, rank 5 on node3 "
        "(exclude the host: srun --exclude=node3)"
    )


def test_devices_of_a_healthy_cluster():
    assert text(checks.devices(cluster(), NEEDS)) == [f"ok   devices: 8 x {H100} on 4 hosts"]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"devices": 4}, "trainer.devices=4 x trainer.num_nodes=4, but 8 ranks were started"),
        ({"devices": 8, "num_nodes": 1}, "trainer.num_nodes=1, but the ranks are on 4 hosts"),
    ],
)
def test_ranks_that_are_not_those_of_the_config(more, line):
    lines = text(checks.devices(cluster(), NEEDS | more))
    assert lines[0].startswith("ok ")
    assert lines[1].startswith(f"FAIL ranks and devices: {line}")


def test_a_host_that_is_silent_is_not_missed_twice():
    facts = [fact for fact in cluster() if fact["host"] != "node4"]
    assert [line.level for line in checks.devices(facts, NEEDS | {"devices": 2, "num_nodes": 4})] == [OK]


def test_too_few_devices_for_one_process():
    alone = {"accelerator": "gpu", "devices": 8, "num_nodes": 1, "world": 1}
    lines = text(checks.devices(cluster(1, 1), alone))
    assert lines[1].startswith("FAIL ranks and devices: trainer.devices=8, but node1 shows 1")
    bound = cluster(2, 4)
    for fact in bound:
        fact["visible"] = 1  # Slurm gives each task its own
    assert len(checks.devices(bound, {"accelerator": "gpu", "devices": 4, "num_nodes": 2, "world": 8})) == 1


def test_a_host_without_a_gpu_and_one_of_another_kind():
    facts = cluster()
    facts[6]["visible"] = facts[7]["visible"] = 0
    (line,) = checks.devices(facts, NEEDS)
    assert (line.level, line.figure) == (FAIL, "no GPU on node4 (rank 6), node4 (rank 7)")
    facts = cluster()
    facts[3]["devices"][0]["name"] = "NVIDIA H100 PCIe"
    (line,) = checks.devices(facts, NEEDS)
    assert line.level == WARN
    assert line.figure.endswith(": NVIDIA H100 PCIe on node2 (rank 3)")


@pytest.mark.parametrize(("name", "other"), [("torch", "2.12.1"), ("driver", "570.1"), ("NCCL", "2.27.5")])
def test_versions_that_differ_name_the_few(name, other):
    assert checks.versions(cluster()).level == OK
    facts = cluster()
    facts[2]["versions"][name] = facts[3]["versions"][name] = other
    line = checks.versions(facts)
    assert line.level == FAIL
    assert line.figure == f"{name} {VERSIONS[name]}, but {other} on node2 (rank 2), node2 (rank 3)"


# ---- devices at work


def test_all_compute_alike():
    (line,) = checks.compute(cluster())
    assert line.level == OK
    assert line.figure == f"8 x {H100}, 707 TFLOP/s each, 99% to 101% of the median"


@pytest.mark.parametrize(("share", "level"), [(0.6, WARN), (0.3, FAIL), (0.8, OK)])
def test_a_slow_device_is_named(share, level):
    facts = cluster()
    facts[5]["devices"][0]["rate"] = share * 7.07e14
    (line,) = checks.compute(facts)
    assert line.level == level
    if level != OK:
        assert line.figure.startswith(
            f"node3 (rank 5) has a slow {H100} 1: {share * 707:.3g} TFLOP/s, {share:.0%}"
        )


def test_of_two_the_slower_is_slow():
    facts = cluster(2, 1)
    facts[1]["devices"][0]["rate"] = 3e14
    (line,) = checks.compute(facts)
    assert (line.level, line.figure[:18]) == (FAIL, "node2 has a slow N")


@pytest.mark.parametrize("error", [0.3, float("nan"), float("inf")])
def test_a_wrong_device_is_named(error):
    facts = cluster()
    facts[2]["devices"][0]["error"] = error
    wrong, speed = checks.compute(facts)
    assert wrong.level == FAIL
    assert wrong.figure.startswith(f"{H100} 0 on node2 (rank 2) computes wrong: a product is off by ")
    assert speed.level == OK


def test_a_device_that_fails_is_named():
    facts = cluster()
    facts[2]["devices"] = [{"name": H100, "index": 0, "broken": "CUDA error: uncorrectable ECC error"}]
    line, _ = checks.compute(facts)
    assert line.figure == f"{H100} 0 on node2 (rank 2) fails: CUDA error: uncorrectable ECC error"


# ---- between ranks


def test_bus_bandwidth():
    """A ring of n sends 2 (n - 1) pieces of 1/n over each link: of two ranks, the message itself once."""
    assert bus_bandwidth(2, 10**9, 0.5) == 2e9
    assert bus_bandwidth(8, 10**9, 0.5) == pytest.approx(3.5e9)
    line = checks.bandwidth(8, 256 * 10**6, 0.001, gradients=3_440_000_000)
    assert line.figure == (
        "0.3 GB over 8 ranks in 1 ms: 448.00 GB/s a bus; "
        "the gradients (3.4 GB) take 0.013 s a step unless hidden behind work"
    )


@pytest.mark.parametrize("count", range(1, 9))
def test_the_rounds_of_a_ring(count):
    turns = rounds(count)
    links = [link for turn in turns for link in turn]
    assert len(links) == len({frozenset(link) for link in links}) == {1: 0, 2: 1}.get(count, count)
    assert all(len({rank for link in turn for rank in link}) == 2 * len(turn) for turn in turns)


def test_who_is_in_the_ring():
    assert members(["a", "a", "b", "b", "c"]) == [0, 2, 4]
    assert members(["a", "a", "a"]) == [0, 1, 2]


def test_a_node_whose_links_are_slow_is_named():
    hosts = [f"node{i + 1}" for i in range(5)]
    links = {(i, (i + 1) % 5): 0.01 for i in range(5)}
    (line,) = checks.ring(links, 10**8, hosts)
    assert (line.level, line.figure) == (OK, "5 in a ring, 10.00 to 10.00 GB/s")
    (line,) = checks.ring(links | {(1, 2): 0.1, (2, 3): 0.05}, 10**8, hosts)
    assert line.level == FAIL
    assert line.figure == "both links of node3 are slow: 1.00 GB/s, the median is 10.00"
    (line,) = checks.ring(links | {(4, 0): 0.1}, 10**8, hosts)
    assert line.figure == "slow: node5 to node1 1.00 GB/s; the median is 10.00"
    (line,) = checks.ring({(0, 1): 0.01, (1, 2): 0.01, (2, 3): 0.1, (3, 0): 0.1}, 10**8, ["one"] * 4)
    assert line.figure.startswith("both links of one (rank 3) are slow")
    assert checks.ring({}, 1, ["one"]) == []


@pytest.mark.parametrize(("ahead", "level"), [(0.02, OK), (-3.0, WARN), (75.0, FAIL)])
def test_clocks(ahead, level):
    line = checks.clocks({"node2": 0.001, "node3": ahead})
    assert line.level == level
    assert ("node3" in line.figure) == (level != OK)


# ---- files, memory


def test_a_host_that_does_not_see_the_folder():
    good = {"seen": 0.1, "torn": 0, "reads": 100, "lock": "held"}
    seen = {rank: dict(good) for rank in range(1, 8)}
    (line,) = checks.shared_folder("/runs", seen, cluster(), 60)
    assert (line.level, "700 reads" in line.figure) == (OK, True)
    seen[6] = seen[7] = {"seen": None}
    (line,) = checks.shared_folder("/runs", seen, cluster(), 60)
    assert line.level == FAIL
    assert line.figure.startswith("node4 (rank 6), node4 (rank 7) does not see what rank 0 writes in /runs")
    seen = {1: good | {"lock": "free"}, 2: good | {"torn": 3}}
    torn, locks = checks.shared_folder("/runs", seen, cluster(), 60)
    assert (torn.level, locks.level) == (WARN, WARN)
    assert "node2 (rank 2) saw half a file" in torn.figure
    assert locks.figure == "a lock of rank 0 does not hold on node1 (rank 1)"


def test_how_long_a_checkpoint_takes_and_whether_it_fits():
    assert checks.writing("/runs", 1e9, 14 * 10**9).figure.endswith("a checkpoint of 14.0 GB takes 14 s")
    assert checks.writing("/runs", 1e7, 14 * 10**9).level == WARN
    assert checks.disk("/runs", 43 * 10**9, 14 * 10**9, 2).level == OK
    line = checks.disk("/runs", 41 * 10**9, 14 * 10**9, 2)
    assert (line.level, line.figure) == (FAIL, "41.0 GB free at /runs, 2 + 1 checkpoints need 42.0 GB")
    line = checks.disk("/runs", 15 * 10**9, 14 * 10**9, 2, there=28 * 10**9)
    figure = "15.0 GB free at /runs, 2 + 1 checkpoints, besides 28.0 GB that are there, need 14.0 GB"
    assert (line.level, line.figure) == (OK, figure)
    assert checks.disk("/runs", 13 * 10**9, 14 * 10**9, 2, there=99 * 10**9).level == FAIL


def test_memory_is_that_of_all_ranks_of_a_host():
    needs = {"worker_bytes": 40 * 10**9, "batch_bytes": 10**9}
    facts = cluster(2, 8)
    assert [line.level for line in checks.memory(facts, needs)] == [OK, OK]
    for fact in facts[8:]:
        fact["memory"], fact["shared_memory"] = 300 * 10**9, 64 * 2**20
    ram, shm = checks.memory(facts, needs)
    assert (ram.level, ram.figure) == (WARN, "300.0 GB on node2, its loaders take up to 320.0 GB")
    assert (shm.level, shm.figure) == (FAIL, "67.1 MB on node2, its loaders take up to 8.0 GB")


def test_open_files():
    facts = cluster()
    assert checks.open_files(facts).level == OK
    facts[3]["open_files"] = 1024
    assert str(checks.open_files(facts)).startswith("warn open files: 1,024 on node2 ")
    for fact in facts:
        fact["open_files"] = -1
    assert checks.open_files(facts).figure == "unlimited"


def test_files_that_one_host_lacks():
    facts = cluster(2, 1)
    (line,) = checks.seen_files("weights everywhere", 2, {1: ["/w.safetensors"]}, facts)
    assert (line.level, line.figure) == (FAIL, "node2 does not see the same: /w.safetensors")
    (line,) = checks.seen_files("weights everywhere", 2, {1: []}, facts)
    assert (line.level, line.figure) == (OK, "2 seen by all 2 ranks")
    assert checks.seen_files("weights everywhere", 0, {1: []}, facts) == []


def test_judging_changes_no_fact():
    facts = cluster()
    before = copy.deepcopy(facts)
    checks.compute(facts)
    checks.memory(facts, {"worker_bytes": 1, "batch_bytes": 1})
    assert facts == before


# ---- which rank this is


def test_names_of_hosts_and_tasks():
    assert hostnames("node[01-03,7],x,gpu-a[1-2].local") == [
        *("node01", "node02", "node03", "node7", "x", "gpu-a1.local", "gpu-a2.local")
    ]
    assert tasks_per_node("8(x2),4") == [8, 8, 4]


def test_torchrun():
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node1"}
    place = place_of(env | {"MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert (place.rank, place.world, place.local_rank, place.port, place.agent) == (5, 8, 1, 29500, True)
    assert place.host_of(6, {4: "node2", 0: "node1"}) == "node2", "its neighbour has said so"
    assert place.host_of(6, {0: "node1"}) == "an unknown host"


def test_srun():
    env = {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "12", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "41234"}
    env |= {"SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_TASKS_PER_NODE": "8,4"}
    place = place_of(env)
    assert (place.rank, place.world, place.local_rank, place.address) == (9, 12, 1, "gpu07")
    assert place.port == 20000 + 41234 % 12000
    assert [place.host_of(rank, {}) for rank in (0, 7, 8, 11)] == ["gpu07", "gpu07", "gpu08", "gpu08"]
    assert place_of(env | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}).address == "a"


def test_alone():
    place = place_of({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "16"})
    assert (place.rank, place.world) == (0, 1), "a shell of salloc"
    assert isinstance(place, Place)
