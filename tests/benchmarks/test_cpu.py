"""The suite for a CPU runs, part by part, in few turns; its figures mean nothing then."""

import json

import pytest

from benchmarks import cpu, harness, loops

PEERS = harness.missing("accelerate") is None


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("C5", ["C5"]),
        ("C6", ["C6 DDIM", "C6 Euler", "C6 DPM++ 2M"]),
        ("C12", ["C12 eager"]),
        pytest.param("C4", ["C4", "C4, cost of a step"], marks=pytest.mark.slow),
        pytest.param("C7", ["C7 import", "C7 help", "C7 config", "C7 first step"], marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of peers
def test_each_part(part, names, tmp_path, capsys):
    path = tmp_path / "results.json"
    assert cpu.main(["--small", "--only", part, "--json", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    assert [result["name"] for result in results] == names
    for result in results:
        assert result["name"] in path.with_suffix(".md").read_text()
        for runs in result.get("runs", {}).values():
            assert all(run["seconds"] > 0 and run["count"] > 0 for run in runs)
            assert len(result["runs"]) > 1
    assert f"## {names[-1]}" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_all_trainers_train_alike():
    """What is compared is the same work: the loss after 12 steps is the same, whoever ran them."""
    trainers = {name: work for name, work in loops.TRAINERS.items() if name != "accelerate" or PEERS}
    losses = {name: loops.trained(work, 10, 2)[1] for name, work in trainers.items()}
    expected = losses["loop by hand"]
    assert losses == {name: pytest.approx(expected, rel=1e-6) for name in losses}


@pytest.mark.slow
def test_memory_is_weighed_in_processes_of_their_own():
    (table,) = cpu.memory(40)
    assert list(table.values) == ["ours, all callbacks", "loop by hand", "Lightning, its callbacks"]
    assert all(50 < value < 10_000 for found in table.values.values() for value in found.values()), "MB"
