"""TensorBoard and W&B get what metrics.csv gets, each step once whatever was killed; W&B never asks."""

import csv
import json
import os
import shutil
import signal
import struct
import sys
import time
from collections import Counter

import pytest

import train
from ldm.config import compose
from ldm.training.callbacks.loggers import Loggers, public

OFTEN = ["callbacks.metrics.every=1", "callbacks.checkpoint.every=3", "callbacks.pictures.every=2"]


def rows(folder):
    """{(step, name): value} of metrics.csv, none twice."""
    with (folder / "metrics.csv").open(newline="") as file:
        found = [((int(row["step"]), row["name"]), float(row["value"])) for row in csv.DictReader(file)]
    assert len(found) == len(dict(found))
    return dict(found)


# ---- which there are


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("csv", []),
        ("null", []),
        ("tensorboard", ["tensorboard"]),
        ("wandb", ["wandb"]),
        ("[tensorboard,wandb]", ["tensorboard", "wandb"]),
    ],
)
def test_loggers_are_chosen_alone_or_together(choice, expected, recipe):
    chosen = compose("train", recipe(1, "x", f"logger={choice}")).get("logger") or {}
    assert [name for name, section in chosen.items() if section is not None] == expected


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line(package, recipe, refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    line = refused(recipe(1, "x", f"logger={package}"))
    assert line == f'logger={package}: needs the package {package}; pip install -e ".[{package}]"'
    assert list(tmp_path.iterdir()) == []


def test_a_key_in_the_config_is_refused(recipe, refused):
    line = refused(recipe(1, "x", "logger=wandb", "+logger.wandb.api_key=abc"))
    assert line == "logger.wandb.api_key: do not put secrets in the config; set WANDB_API_KEY"


def test_what_others_may_see_of_a_config():
    config = {
        "data": {"shards": ["https://me:key@host/a.tar?token=abc", "pipe:curl -H key https://host/b.tar"]},
        "seed": 0,
        "run_root": "/data/runs",
    }
    assert public(config) == {
        "data": {"shards": ["https://host/a.tar", "pipe:..."]},
        "seed": 0,
        "run_root": "/data/runs",
    }


class Failing:
    """A logger that fails at its second row; keeps what it was told."""

    def __init__(self):
        self.told = []

    def start(self, run, stage, config, step, history):
        self.told.append(("start", step, sorted(history)))

    def write(self, step, values, pictures):
        self.told.append((step, sorted(values), len(pictures)))
        if len(self.told) == 3:
            raise OSError("no space left")

    def close(self, failed):
        self.told.append(("close", failed))


@pytest.fixture
def failing(monkeypatch):
    """Two loggers under every run in this process: one that fails, one that does not."""
    loggers = [Failing(), Failing()]
    loggers[1].write = lambda step, values, pictures: loggers[1].told.append((step, len(pictures)))
    original = Loggers.__init__

    def init(self, given, *arguments):
        original(self, loggers, *arguments)

    monkeypatch.setattr(Loggers, "__init__", init)
    return loggers


def test_a_logger_that_fails_stops_alone(failing, recipe, tmp_path, caplog):
    assert train.command(recipe(1, "run")) == 0
    assert [told[0] for told in failing[0].told] == ["start", 2, 4]
    assert "Failing gets no more rows: OSError: no space left" in caplog.text
    assert failing[1].told == [("start", 0, []), (2, 0), (4, 0), (5, 4), (6, 0), ("close", False)]
    assert {step for step, _ in rows(tmp_path / "run")} == {2, 4, 6}


def test_loggers_get_the_rows_of_a_killed_run_up_to_its_checkpoint(failing, recipe, tmp_path):
    assert train.command(recipe(1, "run", "trainer.max_steps=3")) == 0
    file = tmp_path / "run/metrics.csv"
    file.write_text(file.read_text() + "8,train/loss,1\n")
    assert train.command(recipe(1, "run")) == 0
    assert [told[1:] for told in failing[1].told if told[0] == "start"] == [(0, []), (3, [2])]


# ---- TensorBoard


@pytest.mark.filterwarnings("default")
def test_tensorboard_has_every_row_and_picture_once(recipe, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    assert train.command(recipe(2, "run", "logger=tensorboard", *OFTEN, "trainer.max_steps=6")) == 0
    (run / "checkpoints/step-000000006").rename(tmp_path / "lost")  # as if killed just before it
    assert train.command(recipe(2, "run", "logger=tensorboard", *OFTEN)) == 0
    assert len(list((run / "tensorboard").iterdir())) == 2

    events = EventAccumulator(
        str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}
    )
    events.Reload()
    found = [(e.step, tag, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    expected = rows(run)
    assert Counter((step, name) for step, name, _ in found) == Counter(expected.keys())
    assert {(step, name): value for step, name, value in found} == pytest.approx(expected, rel=1e-5)
    assert events.Tags()["images"] == ["samples/0", "samples/1"]
    assert [image.step for image in events.Images("samples/0")] == [2, 4, 6]
    table = events.Tensors("samples/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "| 0 | one | 6 | 0 |\n| 1 | two | 6 | 0 |" in table


# ---- W&B


def records(path):
    """Records of an offline run: LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        if place + 7 + size > len(data):
            return  # W&B is just writing it
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


@pytest.fixture
def keyless(monkeypatch, tmp_path):
    """A home without a key, for the processes started from here."""
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB") or name == "NETRC"]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def sent(folder):
    """(ids, [(step, {key: value})]) over all offline files of a stage, in their order."""
    ids, history = set(), []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for record in records(path):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = {
                    ".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item
                }
                history.append((items["_step"], items))
    return ids, history


def text_of(path):
    return path.read_text() if path.exists() else ""


def wait_for(condition, one, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert one.poll() is None, one.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_the_same_wandb_run_and_no_step_is_there_twice(
    keyless, recipe, process, tmp_path
):
    argv = recipe(2, "run", "logger=wandb", *OFTEN, "trainer.max_steps=6")
    run = tmp_path / "run"
    log = run / "metrics.csv"
    for step in (5, 4):  # ahead of the checkpoint of step 3; W&B stays at 5 when the file is back at 4
        one = process(argv, hold=step + 1)
        wait_for(lambda step=step: log.exists() and max(rows(run), default=(0,))[0] == step, one)
        wait_for(lambda: any(handed >= 4 for handed, _ in sent(run)[1]), one)  # a second after it was logged
        os.kill(one.pid, signal.SIGKILL)
        one.wait()
        assert max(path.name for path in (run / "checkpoints").iterdir()) == "step-000000003"
    one = process(argv)
    output, _ = one.communicate(timeout=120)
    assert one.returncode == 0, output

    noted = json.loads((run / "run.json").read_text())["wandb"]["run"]
    ids, history = sent(run)
    assert ids == {noted["id"]}
    steps = [step for step, _ in history]
    assert steps == sorted(set(steps)), "no step twice, none out of order"
    assert set(range(1, 7)) - set(steps) <= {5}, "only the row of the moment of the kill may be lost"
    for step, items in history:
        assert items["train/loss"] == pytest.approx(rows(run)[step, "train/loss"], rel=1e-5)
    tables = {step: items["samples.path"] for step, items in history if "samples.path" in items}
    assert set(tables) == {2, 4, 6}
    for step, path in tables.items():
        (file,) = run.glob(f"wandb/offline-run-*/files/{path}")
        table = json.loads(file.read_text())
        assert table["columns"] == ["prompt", "step", "seed", "picture"]
        assert [row[:3] for row in table["data"]] == [["one", step, 0], ["two", step, 0]]
    staged = [path.read_bytes() for path in run.glob("wandb/artifacts/staging/*")]
    assert sum(data.startswith(b"\x89PNG") for data in staged) >= 2 * 3
    assert not list((tmp_path / "home").rglob("*.png"))


@pytest.mark.slow
def test_rows_that_a_killed_run_had_not_handed_over_follow(keyless, recipe, process, tmp_path):
    run = tmp_path / "run"
    for steps in (3, 5):
        one = process(recipe(1, "run", "logger=wandb", *OFTEN, f"trainer.max_steps={steps}"))
        output, _ = one.communicate(timeout=120)
        assert one.returncode == 0, output
        record = json.loads((run / "run.json").read_text())
        assert record["wandb"]["run"]["logged"] == steps
        if steps == 3:  # as if killed while W&B started, after the row of step 1
            record["wandb"]["run"]["logged"] = 1
            (run / "run.json").write_text(json.dumps(record))
            shutil.rmtree(run / "wandb")
    _, history = sent(run)
    assert [step for step, _ in history] == [2, 3, 4, 5]
    for step, items in history:
        assert items["train/loss"] == pytest.approx(rows(run)[step, "train/loss"], rel=1e-5)


@pytest.mark.soak
def test_wandb_without_key_terminal_and_network_starts_about_as_fast_as_the_file(
    keyless, recipe, process, tmp_path
):
    seconds = {"csv": [], "wandb": []}
    for attempt in range(2):
        for logger, times in seconds.items():
            name = f"{logger}{attempt}"
            began = time.perf_counter()
            one = process([*recipe(2, name, f"logger={logger}", *OFTEN), "trainer.max_steps=1"])
            log = tmp_path / name / "metrics.csv"
            wait_for(lambda log=log: "\n1,train/loss," in text_of(log), one)
            times.append(time.perf_counter() - began)
            output, _ = one.communicate(timeout=60)
            assert one.returncode == 0, output
            assert "api key" not in output.lower()
    print(f"seconds to the first row: {seconds}")
    assert min(seconds["wandb"]) - min(seconds["csv"]) < 2


@pytest.mark.soak
@pytest.mark.fault(21)
def test_a_server_that_does_not_answer_costs_a_wait_at_the_start_alone(keyless, recipe, process, tmp_path):
    nowhere = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    one = process(recipe(1, "run", "logger=wandb"), env=nowhere)
    output, _ = one.communicate(timeout=120)
    assert one.returncode == 0, output
    assert "the run goes on offline" in (tmp_path / "run/log.txt").read_text()
    ids, history = sent(tmp_path / "run")
    assert len(ids) == 1
    assert [step for step, _ in history] == [2, 4, 5, 6]
