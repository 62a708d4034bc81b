"""The whole way from a web server and from an S3: index and batches are those of the local files."""

from itertools import islice

import numpy as np
import pytest
import torch

from ldm.data.datamodule import ShardDataModule
from ldm.data.index import build_index
from ldm.data.score import Scorer, score

SETTINGS = {"image_size": 8, "global_batch_size": 12, "seed": 1, "crop": "random", "flip": 0.5}


@pytest.fixture(params=["http", "s3"])
def source(request, shards):
    if request.param == "http":
        return request.getfixturevalue("web").url + "/set/{00000..00003}.tar"
    put = request.getfixturevalue("bucket")
    return [put(path, f"set/{path.name}") for path in sorted(shards.iterdir())][0].rpartition("/")[0]


def test_index_is_that_of_the_local_files(source, shards, tmp_path):
    local, remote = build_index(str(shards)), build_index(source, tmp_path / "index")
    assert remote.digest == local.digest
    assert np.array_equal(remote.counts, local.counts)
    assert remote.samples.dtype == local.samples.dtype
    for name in local.samples.dtype.names:
        np.testing.assert_array_equal(remote.samples[name], local.samples[name])


SPAWN = pytest.param(2, "spawn", marks=pytest.mark.slow)  # each worker imports torch anew


@pytest.mark.parametrize(("workers", "method"), [(0, None), (2, "fork"), SPAWN])
def test_batches_are_those_of_the_local_files(source, shards, tmp_path, workers, method):
    local = ShardDataModule(str(shards), **SETTINGS)
    remote = ShardDataModule(source, **SETTINGS, index_dir=tmp_path / "index", multiprocessing_context=method)
    there, here = local.stream(num_workers=0), remote.stream(num_workers=workers)
    for one, other in islice(zip(there, here, strict=True), 8):
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.n, other.n)
        assert torch.equal(one.hash, other.hash)
        assert one.key == other.key
        assert one.caption == other.caption
        assert not any(other.reason)


def test_scores_reach_the_index(bucket, shards, tmp_path):
    """What `ldm data score` wrote beside a shard in a bucket is a column of its index."""
    url = bucket(shards / "00000.tar", "set/00000.tar")
    red = Scorer("red", lambda images: images[:, 0].float().mean((1, 2)), "m:red")
    assert list(score(url, [red])) == [(url, 23)]
    assert build_index(url, tmp_path / "index")["red"].tolist() == list(range(23))
