"""Power profiles and their sums against closed forms, numeric integrals, and the recurrence of training."""

import numpy as np
import pytest
import torch
from torch import nn

from ldm.checkpoints.files import write_tensors
from ldm.checkpoints.native import load_document, load_tensors, resolve
from ldm.checkpoints.posthoc import (
    WORST,
    Profile,
    combine,
    exponent,
    inner,
    snapshots,
    solve,
    store,
    write_snapshot,
)
from ldm.errors import InputError
from ldm.training.ema import EMA

STEPS = 480
TRACKED = (0.05, 0.1)


class Track(nn.Module):
    """Weights that are a given function of the step: [STEPS d], one row a step, float64."""

    def __init__(self, path):
        super().__init__()
        self.path = path
        self.weight = nn.Parameter(torch.full_like(path[0], 1e6))  # a start that must be forgotten

    def averages(self, lengths, every):
        """{step: {length: average}} every so many steps, by the recurrence of training."""
        ema, found = EMA(self, 0.9, lengths), {}
        for k, row in enumerate(self.path):
            self.weight.data.copy_(row)
            ema.update(k)
            if (k + 1) % every == 0:
                found[k + 1] = {length: ema.state_dict(length)["weight"].clone() for length in lengths}
        return found


def shares(step, length):
    """What the profile gives each of STEPS steps: its integral over the step."""
    ends = torch.arange(STEPS + 1, dtype=torch.float64).clamp(max=step) / step
    return (ends ** (exponent(length) + 1)).diff()


@pytest.mark.parametrize("length", [0.003, 0.02, 0.05, 0.1, 0.2, 0.28])
def test_length_and_exponent(length):
    g = exponent(length)
    assert g > 0
    assert (g + 1) ** 0.5 / (g + 2) / (g + 3) ** 0.5 == pytest.approx(length, rel=1e-11)
    t = (torch.arange(10**6, dtype=torch.float64) + 0.5) / 10**6
    p = (g + 1) * t**g / 10**6
    mean = (p * t).sum()
    assert p.sum() == pytest.approx(1, rel=1e-7)
    assert ((p * (t - mean) ** 2).sum() ** 0.5).item() == pytest.approx(length, rel=1e-6)


def test_published_exponents():
    """The paper names its two profiles by their exponents, 16.97 and 6.94."""
    assert [round(exponent(length), 2) for length in TRACKED] == [16.97, 6.94]


@pytest.mark.parametrize("length", [0, -0.1, 0.29, 1])
def test_lengths_that_no_profile_has(length):
    with pytest.raises(ValueError, match=r"must be above 0 and below 0\.2887"):
        exponent(length)


def test_training_gives_each_step_the_share_of_its_profile():
    """A weight that is 1 at step k alone ends as the share of step k."""
    found = Track(torch.eye(STEPS, dtype=torch.float64)).averages((*TRACKED, 0.25), STEPS // 2)
    for step, averages in found.items():
        for length, average in averages.items():
            assert average.sum().item() == pytest.approx(1, rel=1e-12)
            torch.testing.assert_close(average, shares(step, length), rtol=1e-9, atol=1e-16)


def test_inner_products_are_the_integrals():
    a = [Profile(7, 0.05), Profile(10, 0.1), Profile(10, 0.25)]
    b = [Profile(10, 0.1), Profile(3, 0.2), Profile(7, 0.02), Profile(12, 0.13)]
    nodes, weights = np.polynomial.legendre.leggauss(400)

    def density(profile, t):
        g = exponent(profile.length)
        return np.where(t <= profile.step, (g + 1) * t**g / float(profile.step) ** (g + 1), 0)

    for i, p in enumerate(a):
        for j, q in enumerate(b):
            end = min(p.step, q.step)
            t = (nodes + 1) * end / 2
            expected = (density(p, t) * density(q, t) * weights).sum() * end / 2
            assert inner(a, b)[i, j] == pytest.approx(expected, rel=1e-7)
    np.testing.assert_allclose(inner(a, b), inner(b, a).T, rtol=1e-14)


def grid(count, lengths=TRACKED):
    return [Profile(STEPS * (i + 1) // count, length) for i in range(count) for length in lengths]


@pytest.mark.parametrize("count", [1, 4, 32])
def test_a_profile_that_is_there_is_taken_as_it_is(count):
    factors, error = solve(grid(count), Profile(STEPS, 0.1))
    np.testing.assert_allclose(factors, [*[0] * (2 * count - 1), 1], atol=1e-9)
    assert error < 1e-6


@pytest.mark.parametrize("count", [2, 8, 40])
@pytest.mark.parametrize("length", [0.03, 0.08, 0.2])
def test_weights_that_stand_or_move_evenly_come_out_exactly(count, length):
    """Of an even motion the average is the weight at the profile's mean step, T (g + 1) / (g + 2)."""
    have, g = grid(count), exponent(length)
    factors, _ = solve(have, Profile(STEPS, length))
    mean = [p.step * (exponent(p.length) + 1) / (exponent(p.length) + 2) for p in have]
    assert factors.sum() == pytest.approx(1, abs=1e-12)
    assert factors @ mean == pytest.approx(STEPS * (g + 1) / (g + 2), rel=1e-12)


@pytest.mark.parametrize(
    ("count", "length", "bound"),
    [
        (4, 0.08, 0.03),
        (16, 0.03, 0.05),
        (16, 0.2, 0.03),
        (32, 0.02, 0.05),
        (32, 0.08, 1e-3),
        (32, 0.2, 0.01),
    ],
)
def test_the_error_is_that_of_the_profile(count, length, bound):
    """`solve` says how far the sum of shares is from the wanted ones, and no other factors do better."""
    have, wanted = grid(count), Profile(STEPS, length)
    factors, error = solve(have, wanted)
    assert error < bound
    target = shares(STEPS, length).numpy()
    basis = np.stack([shares(p.step, p.length).numpy() for p in have])
    actual = np.linalg.norm(factors @ basis - target) / np.linalg.norm(target)
    assert error == pytest.approx(actual, rel=0.25, abs=1e-5)
    free = np.linalg.lstsq(basis.T, target, rcond=None)[0]
    best = np.linalg.norm(free @ basis - target) / np.linalg.norm(target)
    assert best <= actual < 1.5 * best + 1e-4


# ---- files ---------------------------------------------------------------------------------------------


@pytest.fixture
def stage(make_run, tmp_path):
    """A run whose backbone, at step 480, has 16 snapshots of a wandering track; the track's own averages."""
    checkpoint = make_run(tmp_path / "run", step=STEPS)
    generator = torch.Generator().manual_seed(0)
    path = torch.randn(STEPS, 50, generator=generator, dtype=torch.float64).cumsum(0) / 20 + 1
    track = Track(path)
    for step, averages in track.averages(TRACKED, STEPS // 16).items():
        written = {length: {"w": a.float(), "v": -2 * a.float()} for length, a in averages.items()}
        if step < STEPS:
            write_snapshot(checkpoint.parent.parent / "ema", step, written)
        for length, tensors in written.items() if step == STEPS else ():
            write_tensors(checkpoint / f"ema-{length}.safetensors", tensors)
    return checkpoint, track


def test_a_wandering_track(stage):
    checkpoint, track = stage
    lengths = (0.04, 0.05, 0.08, 0.15)
    direct = track.averages(lengths, 30)
    for step in (240, STEPS):
        for length in lengths:
            average = combine(checkpoint, length, step)
            tensors = dict(average.tensors())
            assert list(tensors) == ["v", "w"]
            assert tensors["w"].dtype == torch.float32
            torch.testing.assert_close(tensors["v"], -2 * tensors["w"])
            wanted, raw = direct[step][length], track.path[step - 1]
            error = (tensors["w"] - wanted).norm()
            assert error < 5e-3 * wanted.norm()
            assert error < 0.03 * (wanted - raw).norm()
            assert average.profile == Profile(step, length)
            assert len(average.terms) == 2 * step // 30
    for length in TRACKED:  # one file with factor 1, the others with next to none
        found = dict(combine(checkpoint, length).tensors())["w"]
        torch.testing.assert_close(found, load_tensors(checkpoint, f"ema-{length}")["w"])


@pytest.mark.parametrize(
    ("length", "step", "line"),
    [
        (0.5, None, "here: length 0.5 must be above 0 and below 0.2887, the mean of all steps"),
        (0.005, None, "here: 32 snapshots miss this profile by 62%"),
        (0.285, None, "here: 32 snapshots miss this profile by"),
        (0.08, 200, "step 200: no snapshot was taken there (16 were); nearest: 180, 210"),
        (0.08, 510, "step 510: no snapshot was taken there (16 were); nearest: 450, 480"),
    ],
)
def test_what_snapshots_cannot_give_is_one_line(stage, length, step, line):
    with pytest.raises(InputError) as error:
        combine(stage[0], length, step, where="here")
    assert str(error.value).startswith(line)
    if "miss" in line:
        assert ", the limit is 5%; nearest that they give: 0." in str(error.value)
        (near,) = str(error.value).rpartition(": ")[2].split(", ")
        assert combine(stage[0], float(near)).error <= WORST


def test_a_run_without_snapshots_and_a_damaged_one(tiny_run, stage):
    with pytest.raises(
        InputError, match=r"no snapshots of averages beside step-000000012; train with module.ema_lengths="
    ):
        combine(resolve(tiny_run), 0.08)
    folder = stage[0].parent.parent / "ema"
    (folder / "step-000000030/ema-0.05.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="ema-0.05.safetensors: is no safetensors file"):
        dict(combine(stage[0], 0.08).tensors())


def test_snapshots_of_other_runs_folders_and_files_are_not_seen(tmp_path):
    assert snapshots(tmp_path / "nothing") == {}
    write_snapshot(tmp_path, 20, {0.1: {"a": torch.ones(1)}})
    write_snapshot(tmp_path, 1_000_000_000, {0.1: {"a": torch.ones(1)}})
    write_snapshot(tmp_path, 3, {0.1: {"a": torch.ones(1)}})
    (tmp_path / "step-000000004.tmp-1").mkdir()
    assert list(snapshots(tmp_path)) == [3, 20, 1_000_000_000]


def test_a_stored_average_is_a_checkpoint_of_its_own(stage, tmp_path):
    checkpoint, _ = stage
    average = combine(checkpoint, 0.08, 240)
    folder = store(checkpoint, tmp_path / "new/out", average)
    assert resolve(tmp_path / "new/out") == folder
    state = load_document(folder, "state.json")
    assert state["ema"] == {"step": 240, "length": 0.08, "error": average.error, "snapshots": 16}
    assert (state["step"], state["images"]) == (STEPS, 8 * STEPS)
    for name, value in dict(average.tensors()).items():
        assert torch.equal(load_tensors(folder, "ema")[name], value)
    with pytest.raises(InputError, match="out: is there already; choose a new folder"):
        store(checkpoint, tmp_path / "new/out", average)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write there"):
        store(checkpoint, tmp_path / "file/out", average)
    with pytest.raises(InputError, match="no snapshots of averages beside step-000000480"):
        combine(folder, 0.08)
