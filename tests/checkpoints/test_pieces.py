"""Tensors that several ranks wrote: shares of whole tensors, rows of sharded ones, one rule for both."""

import pytest
import torch

from ldm.checkpoints.files import load_tensors, write_tensors
from ldm.checkpoints.pieces import file_name, files_of, open_pieces, shares
from ldm.errors import InputError


def values(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"conv": (7, 3, 2, 2), "bias": (5,), "step": (), "empty": (0, 4), "big": (40, 8), "row": (1, 9)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shares_of_whole_tensors_are_the_tensors(ranks, tmp_path):
    tensors = values()
    owner = shares({name: value.nbytes for name, value in tensors.items()}, ranks)
    for rank in range(ranks):
        mine = {name: value for name, value in tensors.items() if owner[name] == rank}
        write_tensors(tmp_path / file_name("model", rank, ranks), mine)
    assert len(files_of(tmp_path, "model")) == ranks
    assert_same(load_tensors(tmp_path, "model"), tensors)
    lazy = open_pieces(tmp_path, "model")
    assert_same({name: tensor.read() for name, tensor in lazy.items()}, tensors)
    assert {name: tensor.nbytes for name, tensor in lazy.items()} == {n: t.nbytes for n, t in tensors.items()}


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_rows_of_sharded_tensors_are_the_tensors(ranks, tmp_path):
    """As torch.chunk deals them: uneven, and none for the last ranks; what has no rows is rank 0's alone."""
    tensors = values()
    for rank in range(ranks):
        mine = {}
        for name, value in tensors.items():
            if value.ndim:
                chunks = value.chunk(ranks)
                mine[name] = chunks[rank] if rank < len(chunks) else value[:0]
            elif rank == 0:
                mine[name] = value
        write_tensors(tmp_path / file_name("ema-0.05", rank, ranks), mine)
    assert_same(load_tensors(tmp_path, "ema-0.05"), tensors)
    for name, tensor in open_pieces(tmp_path, "ema-0.05").items():
        assert tensor.raw() == tensors[name].numpy().tobytes()
    assert open_pieces(tmp_path, "ema") == {}, "another name, though it begins alike"


def test_a_rank_whose_file_is_gone_is_named(tmp_path):
    for rank in range(3):
        write_tensors(tmp_path / file_name("model", rank, 3), {"a": torch.ones(1)})
    (tmp_path / file_name("model", 1, 3)).unlink()
    with pytest.raises(InputError, match=r"model\.rank-00001-of-00003\.safetensors: not found"):
        load_tensors(tmp_path, "model")


@pytest.mark.parametrize("ranks", [1, 2, 5, 64])
def test_shares_are_about_equal(ranks):
    generator = torch.Generator().manual_seed(1)
    sizes = {str(i): int(n) for i, n in enumerate(torch.randint(1, 1000, (400,), generator=generator))}
    owner = shares(sizes, ranks)
    loads = [sum(size for name, size in sizes.items() if owner[name] == rank) for rank in range(ranks)]
    assert sum(loads) == sum(sizes.values())
    assert max(loads) <= sum(loads) / ranks + max(sizes.values())
    assert list(owner.values()) == sorted(owner.values()), "neighbours together"
