import io
import pickle
import subprocess
import sys
from itertools import islice
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ldm.data.datamodule import ShardDataModule
from ldm.data.filters import MaxValue, MinValue
from ldm.data.reader import ReadPolicy
from ldm.data.stages import Recent
from ldm.errors import InputError

MANY = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


def lengths(captions):
    """A tokenizer that workers can import."""
    return torch.tensor([[len(caption), int(caption.split()[-1]) if caption else -1] for caption in captions])


class Counting:
    """A tokenizer that says how many captions it was asked for."""

    def __init__(self):
        self.asked = 0

    def __call__(self, captions):
        self.asked += len(captions)
        return lengths(captions)


@pytest.fixture
def module(shards):
    """A data module over 64 samples of the given settings."""

    def make(**options):
        settings = {"image_size": 8, "global_batch_size": 12, "seed": 1, "crop": "random", "flip": 0.5}
        return ShardDataModule(str(shards), **settings | options)

    return make


@pytest.fixture
def long(write, sample):
    """Folder of 2,100 samples, so that with few lanes blocks are larger than 1."""
    folder = write("long/0.tar", [sample(i, width=6, height=4) for i in range(900)]).parent
    write("long/1.tar", [sample(i, width=6, height=4) for i in range(900, 2100)])
    return folder


def take(stream, count):
    return list(islice(stream, count))


def numbers(batches):
    return [int(caption.split()[1]) for batch in batches for caption in batch.caption if caption]


def facts(batches):
    """Everything that a run sees of each n."""
    seen = {}
    for batch in batches:
        for i, n in enumerate(batch.n.tolist()):
            assert n not in seen
            image = batch.image[i].numpy().tobytes()
            crop = tuple(batch.crop[i].tolist())
            seen[n] = (batch.key[i], batch.caption[i], image, crop, float(batch.weight[i]))
    return seen


def test_a_batch(module, number_of):
    data = module(tokenize=lengths)
    (batch,) = take(data.stream(), 1)
    assert batch.image.shape == (12, 3, 8, 8)
    assert batch.image.dtype == torch.uint8
    assert batch.n.tolist() == list(range(12))
    assert batch.weight.tolist() == [1.0] * 12
    assert batch.original_size.tolist() == [[48, 64]] * 12
    for i, number in enumerate(numbers([batch])):
        assert number_of(batch.image[i]) == number
        assert batch.key[i].endswith(f"/{number:09d}")
        assert batch.tokens[i].tolist() == [len(batch.caption[i]), number]
    assert (batch.crop[:, 0] == 0).all()
    assert batch.crop[:, 1].max() <= 3
    assert batch.crop[:, 1].unique().numel() > 1
    assert [t.dtype for t in (batch.n, batch.tokens, batch.crop, batch.original_size)] == [torch.int64] * 4


def test_the_order_is_the_plans_and_each_sample_comes_once_an_epoch(module):
    data = module(global_batch_size=16)
    order = numbers(take(data.stream(), 8))
    plan = data.plan()
    assert order == plan.places(np.arange(128)).place.tolist()
    assert sorted(order[:64]) == sorted(order[64:]) == list(range(64))
    assert order[:64] != order[64:]


@MANY
@pytest.mark.parametrize(
    ("world_size", "accumulate", "workers"),
    [(1, 1, 2), (1, 3, 1), (2, 1, 0), (2, 3, 3), (3, 2, 2), (5, 1, 0), (5, 1, 3), (12, 1, 2)],
)
@pytest.mark.parametrize("set_name", ["small", "long"])
def test_ranks_workers_and_micro_batches_do_not_change_what_is_trained(
    module, long, set_name, world_size, accumulate, workers
):
    data = module(multiprocessing_context="fork")
    if set_name == "long":
        data = module(multiprocessing_context="fork")
        data.sets.shards, data.constants = str(long), (24, 4)
        assert data.plan().block == 4
    whole = facts(take(data.stream(start=30), 4))
    parts = {}
    for rank in range(world_size):
        batches = take(data.stream(rank, world_size, 30, accumulate, workers), 4 * accumulate)
        local = len(range(rank * 12 // world_size, (rank + 1) * 12 // world_size))
        assert sum(map(len, batches)) == 4 * local
        parts |= facts(batches)
    assert parts == whole


def test_micro_batches_are_the_step_cut_in_order(module):
    (whole,) = take(module().stream(1, 2), 1)
    thirds = take(module().stream(1, 2, accumulate=3), 3)
    assert [batch.n.tolist() for batch in thirds] == [[6, 7], [8, 9], [10, 11]]
    assert torch.cat([batch.image for batch in thirds]).equal(whole.image)


@pytest.mark.parametrize("context", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_resume_with_real_workers_is_the_tail_of_the_uninterrupted_run(module, context):
    whole = facts(take(module().stream(), 11))
    state = module().state(5 * 12)
    tail = module(num_workers=2, multiprocessing_context=context)
    tail.check_state(state)
    tail.resume_at(state["samples"])
    resumed = facts(take(tail.train_dataloader(), 6))
    assert resumed == {n: seen for n, seen in whole.items() if n >= 60}
    first = [seen[0] for n, seen in whole.items() if n < 64]
    assert len(set(first)) == 64  # an epoch: each sample once, across the place of resumption


@pytest.mark.slow
@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_two_ranks_with_real_workers_see_each_sample_once(module, context, monkeypatch):
    monkeypatch.setenv("RANK", "0")  # what the environment says of ranks must not matter
    monkeypatch.setenv("WORLD_SIZE", "1")
    data = module(global_batch_size=16, multiprocessing_context=context)
    seen = [numbers(take(data.stream(rank, 2, num_workers=2), 8)) for rank in range(2)]
    assert len(seen[0]) == len(seen[1]) == 64
    for epoch in (slice(0, 32), slice(32, 64)):
        assert sorted(seen[0][epoch] + seen[1][epoch]) == list(range(64))


def test_workers_need_no_lightning(module):
    """Workers unpickle the pipeline: it must not drag lightning in, which takes seconds."""
    data = pickle.dumps(module().stream().pipeline)
    code = f"import pickle, sys; pickle.loads({data!r}); sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_the_default_generator_is_left_alone(module):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(module().stream(num_workers=1), 2)
    assert torch.get_rng_state().equal(before)


# ---- samples that cannot be read


@pytest.fixture
def corrupt(write, sample, picture):
    """Folder of ten samples; number 4's picture ends early, which its header does not tell."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(buffer, "PNG")
    samples = [sample(i) for i in range(10)]
    samples[4]["png"] = buffer.getvalue()[:-2000]
    return write("c/0.tar", samples).parent


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_picture_is_masked(corrupt, workers):
    data = ShardDataModule(str(corrupt), 8, 10, tokenize=lengths)
    (batch,) = take(data.stream(num_workers=workers), 1)
    bad = [i for i, key in enumerate(batch.key) if key == "0/000000004"]
    assert len(bad) == 1
    assert [i for i, weight in enumerate(batch.weight.tolist()) if weight == 0] == bad
    assert not batch.image[bad].any()
    assert batch.caption[bad[0]] == ""
    assert batch.tokens[bad[0]].tolist() == [0, -1]
    assert [reason for reason in batch.reason if reason] == ["corrupt_image"]


def test_a_lost_shard_is_masked_and_the_order_stays(module, shards):
    data = module(reading=ReadPolicy(backoff=0.01))
    whole = take(data.stream(), 6)
    (shards / "00001.tar").rename(shards / "gone")
    masked = take(data.stream(), 6)
    for a, b in zip(whole, masked, strict=True):
        assert a.key == b.key
        lost = torch.tensor([key.startswith("00001/") for key in a.key])
        assert (b.weight == (~lost).float()).all()
        assert b.image[~lost].equal(a.image[~lost])
        assert list(b.reason) == ["missing" if gone else "" for gone in lost]
        assert b.hash.equal(a.hash)
    assert [event[:2] for batch in masked for event in batch.events] == [(1, "missing")]


# ---- caches


def test_memory_cache_changes_nothing_and_saves_reads(module, shards):
    plain, cached = module(), module(memory_cache_mb=1)
    assert facts(take(plain.stream(), 12)) == facts(take(cached.stream(), 12))
    stream = iter(cached.stream())
    for batch in islice(stream, 8):  # more than an epoch
        assert batch.weight.all()
    for path in shards.glob("*.tar"):
        path.write_bytes(b"")
    assert next(stream).weight.all()


def test_memory_cache_serves_blocks_too(module, long):
    data = module(global_batch_size=24, memory_cache_mb=4)
    data.sets.shards, data.constants = str(long), (24, 4)
    assert data.plan().block == 4
    seen, stream = set(), iter(data.stream())
    for batch in islice(stream, 88):  # a whole pass
        seen |= set(batch.key)
    for path in long.glob("*.tar"):  # other bytes, the same size: they would be found out
        path.write_bytes(path.read_bytes().replace(b"PNG", b"GNP"))
    later = [batch for batch in islice(stream, 20)]
    assert len(seen) == 2100
    assert all(batch.weight.all() for batch in later)


def test_memory_cache_keeps_its_budget():
    recent = Recent(10)
    for i in range(5):
        recent.put(i, str(i), 4)
    assert recent.used == 8
    assert [recent.get(i) for i in range(5)] == [None, None, None, "3", "4"]
    recent.get(3)
    recent.put(5, "5", 4)
    assert recent.get(3) == "3"
    assert recent.get(4) is None
    recent.put(6, "6", 11)  # larger than the budget: kept by nobody
    assert recent.used == 0


def test_captions_are_tokenized_once(module):
    tokenize = Counting()
    take(module(tokenize=tokenize, global_batch_size=16).stream(), 12)
    assert tokenize.asked == 64


# ---- validation


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (3, 2)])
def test_validation_is_every_sample_once_in_order_and_padded(module, shards, world_size, workers):
    data = module(validation_shards=str(shards / "00001.tar"), validation_batch_size=4, tokenize=lengths)
    streams = [data.validation_stream(rank, world_size, workers) for rank in range(world_size)]
    batches = [list(stream) for stream in streams]
    assert {len(mine) for mine in batches} == {len(streams[0])} == {-(-30 // (4 * world_size))}
    assert all(len(batch) == 4 for mine in batches for batch in mine)
    real = {n: key for mine in batches for n, (key, *_, weight) in facts(mine).items() if weight}
    assert [real[n] for n in range(30)] == [f"00001/{i:09d}" for i in range(23, 53)]
    assert len(real) == 30
    crops = torch.cat([batch.crop[batch.weight > 0] for mine in batches for batch in mine])
    assert (crops == torch.tensor([0, 2])).all()  # the centre, whatever training does


def test_held_out_samples_of_the_same_shards(module):
    train, held_out = [MaxValue("aesthetic", 3.0, "keep")], [MinValue("aesthetic", 3.01)]
    data = module(filters=train, validation_filters=held_out)
    data.setup()
    seen = set(numbers(take(data.stream(), 6)))
    kept = [
        n
        for batch in data.validation_stream()
        for n, w in zip(numbers([batch]), batch.weight, strict=False)
        if w
    ]
    assert len(data.validation[0]) == len(kept) == 10 + 17
    assert not seen & set(kept)


def test_no_validation(module):
    assert module().val_dataloader() == []
    with pytest.raises(InputError, match="no validation data"):
        module().validation_stream()


# ---- state


def test_state(module):
    data = module()
    state = data.state(240)
    assert state == {
        "form": 2,
        "plan_version": 1,
        "seed": 1,
        "lanes": 1032,
        "block": 1,
        "global_batch_size": 12,
        "index": data.sources[0].selection.digest,
        "mix": None,
        "buckets": None,
        "samples": 240,
        "skip": [],
        "digest": "0" * 16,
        "digest_from": 0,
        "masked": {},
        "masked_since_row": {},
        "quarantine": [],
    }


def test_stored_constants_win(module, long):
    data = module()
    data.sets.shards = str(long)
    data.check_state(data.state(0) | {"lanes": 24, "block": 4})
    assert (data.plan().lanes, data.plan().block) == (24, 4)
    assert data.state(12)["lanes"] == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 2}, r"data: checkpoint has seed 1; now 2; restore them, or pass data.rebase=true"),
        ({"global_batch_size": 24}, "checkpoint has global_batch_size 12; now 24"),
        ({"filters": [MaxValue("aesthetic", 3.0)]}, "checkpoint has index [0-9a-f]{12}; now [0-9a-f]{12};"),
    ],
)
def test_another_plan_is_refused_unless_rebased(module, caplog, options, message):
    state = module().state(120)
    with pytest.raises(InputError, match=message):
        module(**options).check_state(state)
    data = module(**options, rebase=True)
    data.check_state(state)
    assert "samples of the current epoch may repeat" in caplog.text
    data.resume_at(120)
    assert take(data.train_dataloader(), 1)[0].n[0] == 120


def test_steps_of_a_rebased_plan_begin_at_multiples_of_its_batch(module):
    state = module().state(120)
    data = module(global_batch_size=16, rebase=True)
    data.check_state(state)
    data.resume_at(120)
    assert data.skip == [(120, 128)]
    assert [int(batch.n[0]) for batch in take(data.train_dataloader(), 2)] == [128, 144]


def test_a_rebase_tries_lost_shards_again(module):
    state = module().state(120) | {"quarantine": [[1, "missing", 60]]}
    for rebase, lost in ((False, {1: ("missing", 60)}), (True, {})):
        data = module(rebase=rebase)
        data.check_state(state)
        assert data.health.quarantine == lost


def test_a_newer_plan_is_refused(module):
    data = module(rebase=True)
    with pytest.raises(InputError, match=r"data plan_version 2 is newer than this program \(1\)"):
        data.check_state(data.state(0) | {"plan_version": 2})


# ---- sizes of batches


@pytest.mark.parametrize(
    ("options", "world", "message"),
    [
        (
            {"global_batch_size": 2048, "batch_size": 4},
            (24, 1),
            "data.global_batch_size=2048: not divisible by world_size*batch_size*accumulate = 24*4*1 = 96; "
            "nearest: 2016, 2112",
        ),
        (
            {"global_batch_size": 100},
            (3, 2),
            "data.global_batch_size=100: not divisible by world_size*accumulate = 3*2 = 6; nearest: 96, 102",
        ),
        (
            {"global_batch_size": 2},
            (3, 1),
            "data.global_batch_size=2: not divisible by world_size*accumulate = 3*1 = 3; nearest: 3",
        ),
        (
            {"global_batch_size": 64, "batch_size": 4},
            (8, 1),
            "data.global_batch_size=64: not world_size*batch_size*accumulate = 8*4*1 = 32; "
            "set data.batch_size=8, or trainer.accumulate_grad_batches=2",
        ),
    ],
)
def test_batches_that_do_not_fit(module, options, world, message):
    with pytest.raises(InputError) as caught:
        module(**options).check_batch(*world)
    assert str(caught.value) == message


def test_batches_that_fit(module):
    module(global_batch_size=64, batch_size=4).check_batch(8, 2)
    module(global_batch_size=64).check_batch(8, 2)


@pytest.mark.parametrize("options", [{"global_batch_size": 0}, {"batch_size": 0}])
def test_sizes_below_one(module, options):
    with pytest.raises(InputError, match="expected at least 1, got 0"):
        module(**options)


def test_summary(module):
    lines = module(filters=[MinValue("aesthetic", 2.0)]).summary()
    assert lines[0] == "3 shards, 64 samples"
    assert "27  dropped by MinValue" in lines[2]
    assert lines[-2:] == ["1,032 lanes, blocks of 1, 3.1 steps an epoch", "no validation"]


def test_user_names_of_columns(module):
    data = module(filters=[MinValue("quality", 2.0)], columns={"quality": "AESTHETIC_SCORE"})
    data.setup()
    assert len(data.sources[0]) == 37


def test_own_index_folder(module, tmp_path, shards):
    module(index_dir=tmp_path / "cache").setup()
    assert list((tmp_path / "cache").glob("index-*.npy"))
    assert not (shards / ".ldm_index").exists()


# ---- with Lightning


FUTURE = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of lightning 2.6.6 on torch 2.15


class Recorder(lightning.LightningModule):
    """Trains nothing much, and writes down which n it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        assert batch.image.device == self.device
        self.seen += batch.n.tolist()
        return self.weight * batch.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated += batch.n[batch.weight > 0].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(root, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return lightning.Trainer(
        accelerator="cpu", enable_model_summary=False, default_root_dir=root, **quiet | options
    )


@FUTURE
def test_a_trainer_reads_it(module, shards, tmp_path):
    recorder = Recorder()
    data = module(validation_shards=str(shards / "00003.tar"))
    data.resume_at(24)
    fit = trainer(tmp_path, max_steps=3, accumulate_grad_batches=2, val_check_interval=6)
    fit.fit(recorder, datamodule=data)
    assert recorder.seen == list(range(24, 60))
    assert recorder.validated[-11:] == list(range(11))


@FUTURE
def test_a_trainer_without_validation(module, tmp_path):
    recorder = Recorder()
    trainer(tmp_path, max_steps=2).fit(recorder, datamodule=module(num_workers=2))
    assert recorder.seen == list(range(24))
