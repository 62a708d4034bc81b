"""A run that goes on with another number of processes each time: 4, 2, 8, 1, against one that never stops.

Once by a program that notes which noise each picture got, once by train.py and its own checkpoints.
"""

import pytest

from tests.training.conftest import STAGE2, reading
from tests.training.test_strategies import facts, rows, start, under

EACH = 25  # optimizer steps of a part
WORLDS = {4: "ddp", 2: "fsdp", 8: "ddp", 1: None}


@pytest.fixture(scope="module")
def made(laion, tmp_path_factory):
    base = [
        *(*STAGE2, *reading(laion), "autoencoder_from=x", "data.global_batch_size=8", "optimizer.lr=0.001"),
        *("trainer.precision=32-true", "lr_schedule.warmup=5", "callbacks.metrics.every=1"),
        *("callbacks.validation.every=1000", "callbacks.pictures.every=1000"),
    ]
    steps = EACH * len(WORLDS)
    whole = [*base, f"trainer.max_steps={steps}"]
    jobs = [{"world": 1, "name": "whole", "overrides": whole, "count": "noise"}]
    source = None
    for k, (world, strategy) in enumerate(WORLDS.items()):
        overrides = [*base, f"trainer.max_steps={EACH * (k + 1)}"]
        overrides += under(strategy, world) if strategy else []
        more = {"source": source, "count": "noise"}
        jobs.append({"world": world, "name": f"part-{world}", "overrides": overrides, **more})
        source = f"part-{world}"
    return start(tmp_path_factory.mktemp("elastic"), jobs, 1500)


def together(folder, what):
    ranks = [(f"part-{world}", rank) for world in WORLDS for rank in range(world)]
    return [row for name, rank in ranks for row in facts(folder, name, rank)[what]]


@pytest.mark.soak
@pytest.mark.fault(15)
def test_pictures_and_noise_are_those_of_the_run_that_never_stopped(made):
    for what, count in (("pictures", 8 * EACH * len(WORLDS)), ("noise", 8 * EACH * len(WORLDS))):
        found, expected = sorted(together(made, what)), sorted(facts(made, "whole")[what])
        assert len(expected) == count
        assert found == expected


@pytest.mark.soak
@pytest.mark.fault(15)
def test_the_loss_stays_within_a_thousandth(made):
    found = {}
    for world in WORLDS:
        found |= rows(made, f"part-{world}")
    found, expected = (
        {step: value for (step, key), value in all_rows.items() if key == "train/loss"}
        for all_rows in (found, rows(made, "whole"))
    )
    assert sorted(found) == sorted(expected) == list(range(1, EACH * len(WORLDS) + 1))
    worst = max(abs(found[step] / expected[step] - 1) for step in expected)
    assert worst < 1e-3, worst
    print(f"largest relative difference of the loss over {len(expected)} steps: {worst:.2g}")


@pytest.mark.soak
@pytest.mark.fault(15)
def test_one_run_by_train_py(recipe, process, rows, counted, tmp_path):
    steps = EACH * len(WORLDS)
    base = ["data.global_batch_size=8", "callbacks.metrics.every=1", "callbacks.validation.every=1000"]
    base += ["callbacks.pictures.every=1000", "callbacks.checkpoint.every=1000"]

    def trained(name, last, world, strategy):
        more = [f"trainer.max_steps={last}", f"trainer.devices={world}", f"trainer.strategy={strategy}"]
        one = process(recipe(2, name, *base, *more))
        said = one.communicate(timeout=400)[0]
        assert one.returncode == 0, said
        return tmp_path / name

    whole = trained("whole", steps, 1, "auto")
    for k, (world, strategy) in enumerate(WORLDS.items()):
        parts = trained("parts", EACH * (k + 1), world, strategy or "auto")
    kept = [folder / f"checkpoints/step-{steps:09d}/data.json" for folder in (whole, parts)]
    assert kept[0].read_bytes() == kept[1].read_bytes()  # the digest of all samples, in their order
    found, expected = (
        {int(step): float(value) for step, key, value in rows(folder) if key == "train/loss"}
        for folder in (parts, whole)
    )
    assert sorted(found) == sorted(expected) == list(range(1, steps + 1))
    worst = max(abs(found[step] / expected[step] - 1) for step in expected)
    counted(**{"ppm largest difference of the loss": round(1e6 * worst, 1)})
    assert worst < 1e-3, worst
