"""Files of tensors: every number format, what safetensors itself writes, and every kind of damage."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoints.lazy import (
    FORMATS,
    LazyTensor,
    open_safetensors,
    open_tensors,
    write_safetensors,
)
from ldm.errors import InputError


def equal(a, b):
    """Bit for bit."""
    raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*raw)


@pytest.fixture
def every_format():
    """Two tensors of each number format, of odd sizes, and a scalar, an empty one, a name beyond ASCII."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, (word, width) in FORMATS.items():
        dtype = getattr(torch, word)
        assert dtype.itemsize == width
        for i, shape in enumerate([(3, 5), (7,)]):
            raw = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
            found[f"{'za'[i]}.{name}"] = raw.view(dtype)[..., 0]
    return found | {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 3), 'é "x"': torch.ones(1).bool()}


def lazily(tensors):
    return {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}


def line(path, call=open_tensors):
    with pytest.raises(InputError) as caught:
        call(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


# ---- writing and reading -------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_files_are_those_of_safetensors_itself(tmp_path, every_format, metadata):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    write_safetensors(ours, lazily(every_format), metadata)
    save_file({name: value.contiguous() for name, value in every_format.items()}, theirs, metadata)
    assert ours.read_bytes() == theirs.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "theirs"]
    found, facts = open_safetensors(theirs)
    assert facts == (metadata or {})
    assert found.keys() == every_format.keys()
    for name, value in every_format.items():
        assert (found[name].shape, found[name].dtype) == (tuple(value.shape), value.dtype)
        assert found[name].nbytes == value.nbytes
        assert equal(found[name].read(), value), name
        if not value.is_complex():
            assert repr(found[name].numbers()) == repr(value.double().flatten().tolist()), name
        assert found[name].read().is_contiguous()


def test_strided_and_shared_tensors_are_written_whole(tmp_path, tensors):
    write_safetensors(tmp_path / "x", lazily(tensors["model"]))
    found = load_file(tmp_path / "x")
    assert all(equal(found[name], value) for name, value in tensors["model"].items())


def test_a_file_is_there_whole_or_not_there(tmp_path):
    def broken():
        raise OSError("no space")

    good = LazyTensor.of(torch.ones(3))
    write_safetensors(tmp_path / "x", {"a": good})
    before = (tmp_path / "x").read_bytes()
    with pytest.raises(OSError, match="no space"):
        write_safetensors(tmp_path / "x", {"a": good, "b": LazyTensor((2,), torch.float32, broken)})
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == before


def test_another_number_format_leaves_whole_numbers_alone(tmp_path):
    half = LazyTensor.of(torch.tensor([1.0, 1e-9])).to(torch.float16)
    assert (half.dtype, half.nbytes) == (torch.float16, 4)
    assert equal(half.read(), torch.tensor([1.0, 0.0]).half())
    whole = LazyTensor.of(torch.arange(3))
    assert whole.to(torch.float16) is whole
    write_safetensors(tmp_path / "x", {"half": half})
    assert equal(open_tensors(tmp_path / "x")[0]["half"].read(), half.read())


# ---- damage --------------------------------------------------------------------------------------------


def test_every_shorter_or_longer_file_is_refused(tmp_path):
    file = tmp_path / "x.safetensors"
    write_safetensors(file, {"a": LazyTensor.of(torch.ones(3)), "b": LazyTensor.of(torch.ones(2, 2).half())})
    good = file.read_bytes()
    for damaged in [good[:i] for i in range(len(good))] + [good + b"\0"]:
        file.write_bytes(damaged)
        line(file)
    file.write_bytes(good)
    tensors, _ = open_tensors(file)
    file.write_bytes(good[:-1])
    with pytest.raises(InputError, match=r"x\.safetensors: has become shorter since it was opened"):
        [tensor.read() for tensor in tensors.values()]


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "has a damaged safetensors header"),
        ("[1]", "has a damaged safetensors header"),
        ('{"a": 1}', "has a damaged safetensors header"),
        ('{"a": ' + "[" * 100_000, "has a damaged safetensors header"),
        ({"a": entry("F4")}, "has a damaged safetensors header (a has the unknown number format F4)"),
        ({"a": entry(shape=[-2])}, "has a damaged safetensors header (a has the shape (-2,)"),
        ({"a": entry(shape=[2.0])}, "has a damaged safetensors header (a has the shape (2.0,)"),
        ({"a": entry(offsets=[0, 4])}, "has a damaged safetensors header (bytes 0 to 4 cannot be a)"),
        ({"a": entry(offsets=[4, 12])}, "has a damaged safetensors header (bytes 4 to 12 cannot be a)"),
        ({"a": entry(), "b": entry()}, "has a damaged safetensors header (bytes 0 to 8 cannot be b)"),
        ({"a": entry(shape=[3], offsets=[0, 12])}, "is cut off: "),
        ({"a": entry(shape=[1], offsets=[0, 4])}, "has more bytes than it should: "),
    ],
)  # fmt: skip
def test_damaged_headers_are_one_line(tmp_path, header, message):
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file = tmp_path / "x"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    assert line(file, open_safetensors).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes); get it again, or make it anew"),
        (b"abc", "is neither a safetensors file nor one saved by torch (it begins with b'abc'); give a"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer, not the file"),
        (b"<!DOCTYPE html><html>", "is a web page; "),
        (b"<HTML>", "is a web page; "),
        (b"GGUF\3\0\0\0", "is a GGUF file; "),
        (b"\x89HDF\r\n", "is an HDF5 file; "),
        (b"\x80\4K\1.", "was not saved by torch; "),
        (b"PK\3\4" + bytes(100), "is cut off or damaged, at 104 bytes"),
    ],
)  # fmt: skip
def test_other_files_are_called_by_their_names(tmp_path, content, message):
    file = tmp_path / "model.ckpt"
    file.write_bytes(content)
    assert line(file).startswith(message)


def test_a_missing_file_and_a_folder(tmp_path):
    assert line(tmp_path / "no.safetensors") == "not found; check the path"
    assert line(tmp_path) == "is a folder; give a file in it"
