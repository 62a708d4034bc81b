"""The benchmark of the data path runs, on a few samples; its figures mean nothing then."""

import gc
import importlib.util
import json

import pytest
import torch

from benchmarks import data, harness
from benchmarks.harness import Measured, Race

pytestmark = pytest.mark.filterwarnings("ignore")  # webdataset leaves files open when it is left early


@pytest.fixture(autouse=True)
def own_threads():
    """The benchmark sets them, as a worker of a loader would."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(part, tmp_path):
    data.main(["--small", "--only", part, "--folder", str(tmp_path), "--json", str(tmp_path / "out.json")])
    gc.collect()
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) >= {"command", "date", "commit", "machine", "load", "versions", "results"}
    assert (tmp_path / "out.md").read_text().count("\n## ") == len(found["results"])
    return {result["name"]: result for result in found["results"]}


def test_tar_read(tmp_path):
    found = run("C1", tmp_path)
    assert list(found) == ["C1 tar read, 8 KB", "C1 tar read, 60 KB"]
    runs = found["C1 tar read, 8 KB"]["runs"]
    assert [run["count"] for runs in runs.values() for run in runs] == [64, 64, 64]


@pytest.mark.slow
def test_jpeg(tmp_path):
    found = run("C2", tmp_path)
    assert list(found) == ["C2 JPEG to 32 px, 2 workers", "C2 JPEG to 32 px, in-process"]
    assert "ldm" in found["C2 JPEG to 32 px, in-process"]["runs"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ldm.data.cached") is None, reason="no cached data")
def test_cached(tmp_path):
    assert len(run("C3", tmp_path)) == 2


@pytest.mark.slow
def test_memory(tmp_path):
    values = run("C8", tmp_path)["C8 memory"]["values"]
    assert values["ldm"]["peak_mb"] > 10


def test_resume(tmp_path):
    values = run("C9", tmp_path)["C9 resume"]["values"]
    assert values["webdataset"][0] > 0
    assert len(values["ldm, in-process"]) == 1


def test_an_unknown_part_is_named(capsys):
    with pytest.raises(SystemExit):
        data.main(["--only", "C1,C7"])
    assert "no part 'C7'" in capsys.readouterr().err


def test_ratios_are_medians_within_rounds():
    ours = [Measured(10, 1, 2), Measured(10, 10, 2), Measured(10, 2, 2)]
    peer = [Measured(10, 2, 8), Measured(10, 30, 8), Measured(10, 8, 8)]
    race = Race("", "", "samples", "ours", {"ours": ours, "peer": peer}, {"peer": 3})
    assert race.ratio("peer") == 3
    assert race.ratio("peer", cpu=True) == 4
    assert list(race.rows())[1][4:] == ["3.00", "4.00", ">= 3"]


def test_contestants_take_turns_in_another_order_each_round(capsys):
    order = []

    def contestant(name):
        def run():
            order.append(name)
            return Measured(1, 1, 1)

        return run

    harness.race("race", "", {name: contestant(name) for name in "abc"}, 3)
    assert "".join(order) == "abcbcacab"


def test_a_stream_that_ends_early_is_an_error():
    with pytest.raises(RuntimeError, match="ended after 8 of 9"):
        harness.timed([4, 4, 4], 4, 9)
