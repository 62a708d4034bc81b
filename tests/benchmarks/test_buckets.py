"""The count of reads with buckets runs; of its figures only what must be so is asked for."""

import json

import pytest

from benchmarks import buckets


def test_blocks_stay_whole_where_buckets_lie_apart(tmp_path):
    buckets.main(["--small", "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())["results"][0]["values"]
    read = {name.removeprefix("small, "): values[0] for name, values in found.items()}
    assert read["none"] == read["sorted"] == pytest.approx(1, abs=0.01)
    assert 1.02 < read["buckets"] < 2
    reads = {name.removeprefix("small, "): values[1] for name, values in found.items()}
    assert reads["none"] < reads["sorted"] < reads["buckets"] < 1
