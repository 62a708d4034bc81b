"""What a row says beside the losses: norms, waiting for data, stage 1's scores, each found another way."""

import csv
import tarfile
import time

import pytest
import torch

import train
from ldm.checkpoints import native
from ldm.data.loader import FiniteLoader, Loader

EVERY_STEP = ["callbacks.metrics.every=1", "callbacks.checkpoint.every=1", "callbacks.checkpoint.keep_last=9"]


def values(run, name):
    with (run / "metrics.csv").open(newline="") as file:
        return {int(row[0]): float(row[2]) for row in csv.reader(file) if row[1] == name}


def norm(tensors):
    return float(torch.cat([tensor.double().flatten() for tensor in tensors]).norm())


def trained(run, step, kind="model"):
    """Tensors that the optimizer steps: by the names of the EMA, which averages those."""
    folder = run / f"checkpoints/step-{step:09d}"
    names = native.load_tensors(folder, "ema")
    tensors = native.load_tensors(folder, kind)
    return tensors if kind == "optimizer" else {name: tensors[name] for name in names}


@pytest.mark.parametrize("stage", [1, 2])
def test_norms_are_those_of_the_checkpoints(stage, recipe, tmp_path):
    argv = [*EVERY_STEP, "trainer.max_steps=3", "trainer.precision=64-true"]
    assert train.command(recipe(stage, "run", *argv)) == 0
    run = tmp_path / "run"
    parameter, update = values(run, "train/param_norm"), values(run, "train/update_norm")
    assert list(parameter) == list(update) == [1, 2, 3]
    for step in (2, 3):
        old, new = trained(run, step - 1), trained(run, step)
        assert parameter[step] == pytest.approx(norm(new.values()), rel=1e-6)
        assert update[step] == pytest.approx(norm(new[k] - old[k] for k in new), rel=1e-6)


@pytest.mark.parametrize("clip", [1e-3, 1e6, "null"])
def test_the_norm_of_the_gradient_is_the_one_before_clipping(clip, recipe, tmp_path):
    """After one step AdamW's first moment is (1 - beta1) times the clipped gradient."""
    argv = [
        *EVERY_STEP,
        "trainer.max_steps=1",
        f"trainer.gradient_clip_val={clip}",
        "trainer.precision=64-true",
    ]
    assert train.command(recipe(1, "run", *argv)) == 0
    run = tmp_path / "run"
    moments = trained(run, 1, "optimizer")
    clipped = norm(v for k, v in moments.items() if k.endswith("exp_avg")) / (1 - 0.9)
    found = values(run, "train/grad_norm")[1]
    if clip != 1e-3:
        assert found == pytest.approx(clipped, rel=1e-6)
    else:
        assert clipped == pytest.approx(clip, rel=1e-3)
        assert found > 100 * clip


def test_norms_can_be_left_out_and_change_nothing(recipe, tmp_path):
    assert train.command(recipe(1, "run", "callbacks.metrics.norms=false")) == 0
    assert train.command(recipe(1, "other")) == 0
    run, other = tmp_path / "run", tmp_path / "other"
    for name in ("param", "update"):
        assert not values(run, f"train/{name}_norm")
        assert values(other, f"train/{name}_norm")
    assert values(run, "train/grad_norm") == values(other, "train/grad_norm") != {}
    file = "checkpoints/step-000000007/model.safetensors"
    assert (run / file).read_bytes() == (other / file).read_bytes()


@pytest.mark.parametrize("slow", ["data", "validation"])
def test_the_share_of_time_that_went_into_waiting_for_data(slow, recipe, monkeypatch, tmp_path):
    kind, batches = (Loader, Loader.__iter__) if slow == "data" else (FiniteLoader, Loader.__iter__)

    def slowly(self):
        for batch in batches(self):
            if type(self) is kind:
                time.sleep(0.5)
            yield batch

    monkeypatch.setattr(Loader, "__iter__", slowly)
    argv = ["callbacks.metrics.every=1", "callbacks.validation.every=1", "trainer.max_steps=3"]
    assert train.command(recipe(1, "run", *argv)) == 0
    shares = values(tmp_path / "run", "perf/data_wait_percent")
    assert all(0 <= share <= 100 for share in shares.values())
    assert (min(shares[2], shares[3]) > 50) == (slow == "data"), "what other callbacks take is no waiting"


class Corner(torch.nn.Module):
    """uint8 [b 3 H W] -> the first pixels, as levels [b 12]."""

    def forward(self, images):
        return images[:, :, :2, :2].flatten(1).float()


@pytest.fixture
def corner(tmp_path):
    """Override that takes the distribution in features of a program in a file."""
    pytest.importorskip("torchmetrics")
    path = tmp_path / "corner.pt2"
    example = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    batch = {"images": {0: torch.export.Dim("b")}}
    torch.export.save(torch.export.export(Corner(), (example,), dynamic_shapes=batch), path)
    return f"callbacks.validation.distribution={path}"


def test_distribution_of_the_reconstructions(corner, recipe, tmp_path):
    assert train.command(recipe(1, "run", corner, "trainer.max_steps=4")) == 0
    assert train.command(recipe(1, "plain", "trainer.max_steps=4")) == 0
    run, plain = tmp_path / "run", tmp_path / "plain"
    for name in ("psnr", "ssim"):
        assert values(run, f"validation/{name}") == values(plain, f"validation/{name}") != {}
    (fid,), (kid,) = (values(run, f"validation/r{name}-corner").values() for name in ("FID", "KID"))
    assert fid > 0
    assert kid > 0


def test_one_picture_is_no_distribution(corner, recipe, refused, laion, tmp_path):
    with tarfile.open(laion / "held_out.tar") as whole, tarfile.open(tmp_path / "one.tar", "w") as one:
        for member in whole.getmembers()[:3]:
            one.addfile(member, whole.extractfile(member))
    line = refused(recipe(1, "run", corner, f"data.validation_shards={tmp_path}/one.tar"))
    assert line == "data.validation_shards: FID and KID need two readable pictures"


@pytest.mark.slow
def test_two_processes_score_all_reconstructions_together(corner, recipe, process, tmp_path):
    argv = [corner, "trainer.max_steps=4", "trainer.precision=64-true", "data.global_batch_size=6"]
    assert train.command(recipe(1, "one", *argv)) == 0
    two = process(recipe(1, "two", *argv, "trainer.devices=2", "trainer.strategy=ddp"))
    output, _ = two.communicate(timeout=300)
    assert two.returncode == 0, output
    for name in ("psnr", "ssim", "rFID-corner", "rKID-corner"):
        one, two = (values(tmp_path / run, f"validation/{name}") for run in ("one", "two"))
        assert list(one) == [4]
        assert two == pytest.approx(one, rel=1e-4), name


def test_a_distribution_without_its_network_is_refused(recipe, refused, tmp_path):
    line = refused(recipe(1, "x", "callbacks.validation.distribution=inception"))
    assert line.startswith("callbacks.validation.distribution=inception: is no file NAME.pt2; ")
    assert list(tmp_path.iterdir()) == []
