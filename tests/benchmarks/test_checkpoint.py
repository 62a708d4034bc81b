"""The race of checkpoints runs; its figures mean nothing on a small state."""

import json

from benchmarks import checkpoint


def test_all_contestants_save_the_same_state(tmp_path, capsys):
    assert checkpoint.main(["--small", "--json", str(tmp_path / "x.json")]) == 0
    (race,) = json.loads((tmp_path / "x.json").read_text())["results"]
    assert set(race["runs"]) == {"ours, what training waits for", "one memcpy", "torch.save"}
    assert all(len(runs) == 2 for runs in race["runs"].values())
    assert "read back" in capsys.readouterr().out
