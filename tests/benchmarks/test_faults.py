"""The table of faults: rows are found by their mark, and what the tests count comes out."""

import json

import pytest

from benchmarks import faults

CONFTEST = """
import importlib.util

spec = importlib.util.spec_from_file_location("ours", {ours!r})
ours = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ours)
counted, trials = ours.counted, ours.trials
"""
SOURCE = """
import pytest


@pytest.mark.fault(3)
@pytest.mark.parametrize("moment", ["a", "b"])
def test_one(moment, trials, counted):
    for _ in range(trials(2, 5)):
        counted(kills=2, lost=0.5)


@pytest.mark.fault(3)
def test_two():
    assert False
"""


def test_rows_are_those_of_the_marked_tests():
    rows = faults.collect()
    assert set(rows) == set(faults.ROWS)
    assert any("test_sigkill_at_random_moments" in test for test in rows[1])


@pytest.mark.parametrize(("full", "kills"), [(False, 8), (True, 20)])
def test_what_tests_count_is_added_up(full, kills, tmp_path):
    (tmp_path / "conftest.py").write_text(
        CONFTEST.format(ours=str(faults.harness.ROOT / "tests/conftest.py"))
    )
    (tmp_path / "test_made.py").write_text(SOURCE)
    found = faults.run([str(tmp_path / "test_made.py")], full)
    assert found["tests"] == 3
    assert found["failed"] == 1
    assert found["problems"] == ["test_two: assert False"]
    assert found["counts"] == {"kills": kills, "lost": kills / 4}
    (cells,) = faults.table({"3": found}).cells
    assert cells[:6] == ["3", faults.ROWS[3], "full" if full else "few", "3 of 3", "1", cells[5]]
    assert cells[5] == f"{kills} kills, {kills / 4:g} lost"
    assert json.dumps(found)
