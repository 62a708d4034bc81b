"""Files saved by torch: what is in them arrives bit for bit, what they ask to run does not run."""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf

from ldm.checkpoints.lazy import open_tensors
from ldm.errors import InputError


def equal(a, b):
    """Bit for bit."""
    raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*raw)


def line(path):
    with pytest.raises(InputError) as caught:
        open_tensors(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    return message.removeprefix(f"{path}: ")


@pytest.fixture
def archive(tmp_path):
    """(data.pkl, other members) -> a file like torch's."""

    def write(pickled, members=(), compression=zipfile.ZIP_STORED):
        path = tmp_path / "model.ckpt"
        with zipfile.ZipFile(path, "w", compression) as file:
            for name, content in {"data.pkl": pickled, **dict(members)}.items():
                file.writestr(f"archive/{name}", content)
        return path

    return write


# ---- what torch saves ----------------------------------------------------------------------------------


@pytest.fixture
def state(tensors):
    """Every kind of tensor that is met, under flat names."""
    base = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    found = collections.OrderedDict(tensors["model"])
    found |= {
        "inner": base.t()[1:, 2:],
        "expanded": torch.ones(3, 1).expand(3, 4),
        "half": base.half()[::3],
        "fp8": base[0].to(torch.float8_e4m3fn),
        "uint16": torch.arange(3).to(torch.uint16),
        "complex": torch.complex(base, base),
    }
    found._metadata = {"": {"version": 1}}
    return found


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_tensors_arrive_as_they_are(tmp_path, state, protocol):
    torch.save({"state_dict": state, "global_step": 5}, tmp_path / "x.ckpt", pickle_protocol=protocol)
    found, values = open_tensors(tmp_path / "x.ckpt")
    assert list(found) == list(state)
    assert values == {"global_step": 5}
    for name, value in state.items():
        assert (found[name].shape, found[name].dtype) == (tuple(value.shape), value.dtype)
        if not value.is_complex():
            assert found[name].numbers() == value.double().flatten().tolist(), name
        assert equal(found[name].read(), value), name
        assert found[name].read().is_contiguous()


@pytest.mark.parametrize("protocol", [2, 4])
def test_the_rest_of_a_lightning_checkpoint_is_mentioned_and_left_out(tmp_path, protocol):
    step = torch.tensor(3.0)
    checkpoint = {
        "epoch": 3,
        "global_step": 470_000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": {"w": torch.arange(4)},
        "callbacks": {ModelCheckpoint: {"best_model_score": step, "dirpath": "/logs"}},
        "optimizer_states": [{"state": {0: {"step": step, "exp_avg": step}}, "param_groups": [{"lr": 0.1}]}],
        "hyper_parameters": OmegaConf.create({"a": [1, {"b": None}], "c": 1.5, "d": "text"}),
        "namespace": argparse.Namespace(a=1),
        "array": np.arange(3),
        "float": np.float32(2.5),
        "big": np.array(7, ">i8")[()],
        "flag": np.bool_(True),
        "device": torch.device("cuda", 0),
        "dtype": torch.float32,
        "size": torch.Size([1, 2]),
        "sets": [{1, 2}, frozenset([3])],
        "default": collections.defaultdict(int, a=1),
        "bytes": b"\xff",
        "nothing": None,
        "rate": 1e-4,
        (1, 2): "a key that is no text",
    }
    torch.save(checkpoint, tmp_path / "x", pickle_protocol=protocol)
    found, values = open_tensors(tmp_path / "x")
    assert {name: value.read().tolist() for name, value in found.items()} == {"w": [0, 1, 2, 3]}
    plain = ("epoch", "global_step", "pytorch-lightning_version", "float", "big", "flag", "nothing", "rate")
    assert values == {name: checkpoint[name] for name in plain}


def test_without_a_state_dict_all_tensors_have_dotted_names(tmp_path):
    one = torch.ones(2)
    torch.save({"model": {"w": one}, "opt": {"state": {0: one}}, "list": [one], "x": one}, tmp_path / "x")
    assert list(open_tensors(tmp_path / "x")[0]) == ["model.w", "opt.state.0", "x"]
    torch.save({"state_dict": {}, "x": one}, tmp_path / "x")
    assert list(open_tensors(tmp_path / "x")[0]) == ["x"]


def test_values_are_read_when_they_are_asked_for(tmp_path):
    path = tmp_path / "x"
    torch.save({"w": torch.full((64,), 3, dtype=torch.uint8)}, path)
    found, _ = open_tensors(path)
    content = path.read_bytes()
    assert content.count(b"\3" * 64) == 1
    path.write_bytes(content.replace(b"\3" * 64, b"\4" * 64))
    assert found["w"].read().tolist() == [4] * 64


# ---- attacks -------------------------------------------------------------------------------------------


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(words):
    return b"X" + len(words).to_bytes(4, "little") + words.encode()


def name4(module, name):
    return text(module) + text(name) + b"\x93"


def attacks(command):
    """Name of what is called -> instructions that run a shell's command and leave something on the stack."""
    said, system, code = text(command), b"cos\nsystem\n", f"__import__('os').system({command!r})"
    by_import = b"cimportlib\nimport_module\n" + text("os") + b"\x85R"
    return {
        "reduce": ("os.system", system + said + b"\x85R"),
        "stack global": ("posix.system", name4("posix", "system") + said + b"\x85R"),
        "dotted": ("shutil.os.system", b"\x80\4" + name4("shutil", "os.system") + said + b"\x85R"),
        "inst": ("os.system", b"(" + said + b"ios\nsystem\n"),
        "obj": ("os.system", b"(" + system + said + b"o"),
        "memo": ("os.system", system + b"q\x07" + b"0" + b"h\x07" + said + b"\x85R"),
        "memoize": ("os.system", system + b"\x940" + b"h\0" + said + b"\x85R"),
        "forgotten": ("os.system", system + said + b"\x85R0N"),
        "popped with a mark": ("os.system", b"(" + system + said + b"\x85R1N"),
        "duplicate": ("os.system", system + b"2" + said + b"\x85R\x86"),
        "eval": ("builtins.eval", b"cbuiltins\neval\n" + text(code) + b"\x85R"),
        "exec": ("__builtin__.exec", b"c__builtin__\nexec\n" + text(code) + b"\x85R"),
        "getattr": (
            "importlib.import_module",
            b"cbuiltins\ngetattr\n" + by_import + text("system") + b"\x86R" + said + b"\x85R",
        ),
        "partial": ("functools.partial", b"cfunctools\npartial\n" + system + b"\x85R" + said + b"\x85R"),
        "state of a partial": (
            "functools.partial",
            b"cfunctools\npartial\n" + b"cbuiltins\nlen\n" + b"\x85R"
            + b"(" + system + b")}Nt" + b"b" + said + b"\x85R",
        ),
        "extension": (
            "copyreg.add_extension",
            b"ccopyreg\nadd_extension\n" + text("os") + text("system") + b"K\xf7\x87R0"
            + b"\x82\xf7" + said + b"\x85R",
        ),
        "reconstructor": ("os.system", b"ccopyreg\n_reconstructor\n" + system + said + b"\x85RN\x87"),
        "in a tensor": ("os.system", REBUILD + system + said + b"\x85R\x86"),
        "in a container": ("os.system", b"ccollections\nOrderedDict\n](" + system + said + b"\x85Re\x86"),
        "as a key": ("os.system", b"}" + system + said + b"\x85RNs"),
        "numpy": (
            "numpy.testing._private.utils.runstring",
            b"cnumpy.testing._private.utils\nrunstring\n" + text(code) + b"}\x86R",
        ),
        "new": ("subprocess.Popen", b"csubprocess\nPopen\n)\x81" + system + said + b"\x85R"),
        "new with names": ("subprocess.Popen", b"csubprocess\nPopen\n)}\x92" + system + said + b"\x85R"),
    }  # fmt: skip


@pytest.mark.parametrize("attack", list(attacks("")))
def test_attacks_run_nothing(archive, tmp_path, attack):
    marker = tmp_path / "marker"
    name, instructions = attacks(f"touch {marker}")[attack]
    pickled = b"}" + text("x") + instructions + b"s."  # {"x": ...}
    try:
        pickle.loads(pickled)
    except (TypeError, AttributeError):
        pass  # after the command has run
    finally:
        if attack == "extension":
            import copyreg

            copyreg.remove_extension("os", "system", 0xF7)
    assert marker.exists(), "this is no attack"
    marker.unlink()
    path = archive(pickled)
    fix = "refused, and nothing of it was run; get a .safetensors file of it"
    assert line(path) == f"asks to run {name}; {fix}"
    assert not marker.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_an_attack_that_torch_itself_has_saved(tmp_path, protocol):
    torch.save({"state_dict": {"w": torch.ones(2)}, "x": Evil(tmp_path / "marker")}, tmp_path / "x")
    assert line(tmp_path / "x").startswith(f"asks to run {os.system.__module__}.system; refused")
    assert not (tmp_path / "marker").exists()


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


CLASS = b"cargparse\nNamespace\n"


@pytest.mark.parametrize(
    "change",
    [b"N}" + text("a") + b"K\1s\x86b", b"}" + text("a") + b"K\1sb", text("a") + b"K\1s", b"(K\1e", b"K\1a"],
)
def test_nothing_is_set_on_a_class(archive, change):
    before = dict(vars(argparse.Namespace))
    path = archive(b"}" + text("x") + CLASS + change + b"s.")
    assert line(path).startswith("asks to run argparse.Namespace; refused")
    assert dict(vars(argparse.Namespace)) == before


def laughing(levels=200):
    """A tuple that holds itself 2^levels times over: to hash, compare or show it would never end."""
    return b")" + b"2\x86" * levels


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\2tQ"
ONES = REBUILD + b"(" + STORAGE + b"K\0" + b"K\2\x85" + b"K\1\x85" + b"\x89" + b"}t" + b"R"


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (laughing(), None),
        (laughing() + b"\x85" * 100_000, None),
        (b"}" + laughing() + b"Ns", None),
        (b"}" + b")" + b"\x85" * 100_000 + b"Ns", None),
        (b"\x8f(" + laughing() + b"\x90", None),
        (b"(" + laughing() + b"\x91", None),
        (b"cnumpy\ndtype\n" + laughing() + b"\x85R", None),
        (b"}q\1" + text("a") + b"h\1s", "mappings are more than 16 levels deep"),
        (b"}q\0010" + 12 * (b"}(" + b"".join(text(key) + b"h\1" for key in "abcd") + b"uq\0010") + b"h\1",
         "more than 262144 entries"),
        (laughing() + laughing() + b"\x93", "cannot be read"),
        (REBUILD + b"(" + STORAGE + b"K\0" + laughing() + b"K\1\x85tR", "no whole numbers"),
        (REBUILD + b"(" + STORAGE + laughing() + b"K\2\x85K\1\x85tR", "no whole numbers"),
        (laughing() + b"Q", "cannot be read"),
        (b"(" + text("storage") + b"ctorch\nFloatStorage\n" + laughing() + b"NK\2tQ", "is no storage"),
        (b"\x8b\x10\0\0\1" + bytes(10), "cannot be read"),
        (b"\x8e" + b"\xff" * 8, "cannot be read"),
    ],
)  # fmt: skip
def test_what_would_never_end_ends(archive, values, message):
    path = archive(b"}(" + text("w") + ONES + text("x") + values + b"u.", {"data/0": bytes(8)})
    if message is None:
        assert open_tensors(path)[0]["w"].read().tolist() == [0, 0]
    else:
        assert message in line(path)


# ---- damage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "members", "message"),
    [
        (ONES, {}, "its data.pkl cannot be read ('data/0')"),
        (ONES, {"data/0": bytes(7)}, "its data.pkl cannot be read (data/0 has 7 bytes, its tensors need 8)"),
        (ONES.replace(b"K\0K", b"K\1K"), {"data/0": bytes(8)}, "reaches beyond its 8 bytes"),
        (ONES.replace(b"K\1\x85", b"K\2\x85"), {"data/0": bytes(8)}, "reaches beyond its 8 bytes"),
        (ONES.replace(b"K\1\x85", b"J\xff\xff\xff\xff\x85"), {"data/0": bytes(8)}, "no whole numbers"),
        (ONES.replace(b"K\1\x85", b")"), {"data/0": bytes(8)}, "cannot be read"),
        (ONES.replace(b"Float", b"QInt8"), {"data/0": bytes(8)}, "numbers in a torch.QInt8Storage"),
        (ONES, {"data/0": bytes(8), "byteorder": b"big"}, "was saved on a big-endian machine"),
        (ONES, {"data/0": bytes(8), "constants.pkl": b""}, "is a TorchScript program"),
        (b"N", {}, "holds no tensors by name, but 'w'"),
        (b"\x8c", {}, "its data.pkl cannot be read"),
        (b"h\7", {}, "its data.pkl cannot be read"),
        (b"t", {}, "its data.pkl cannot be read"),
        (b"P0\n", {}, "it uses PERSID, which torch never does"),
        (b"\x82\1", {}, "it uses EXT1, which torch never does"),
        (b"K\1)R", {}, "it calls a int"),
    ],
)  # fmt: skip
def test_damage_is_one_line(archive, tensor, members, message):
    assert message in line(archive(b"}" + text("w") + tensor + b"s.", members))


def test_other_archives(archive, tmp_path):
    good = b"}" + text("w") + ONES + b"s."
    path = archive(good, {"data/0": bytes(8)}, zipfile.ZIP_DEFLATED)
    assert "data.pkl is compressed or encrypted" in line(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("notes.txt", "nothing")
    assert line(path).startswith("is a zip archive that torch did not save; ")
    assert line(archive(b"](e.")) == "holds no tensors by name, but list; give a checkpoint"


def test_files_of_an_old_torch_say_how_to_convert_them(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert line(path) == (
        "was saved by torch before 1.6; convert it, in Python: "
        "torch.save(torch.load('old.pt', weights_only=True), 'new.pt')"
    )


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # of a name that was damaged
def test_no_damage_is_worse_than_one_line(tmp_path, state):
    """Cut anywhere, or with any byte of data.pkl changed, a file opens or is refused in one line."""
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": state}, path)
    good = path.read_bytes()
    for end in range(0, len(good), 197):
        path.write_bytes(good[:end])
        line(path)
    begin = good.index(b"\x80\2}")
    stop = good.index(b"PK", begin)
    assert 1000 < stop - begin < 6000
    numbers = random.Random(0)
    opened = 0
    for place in range(begin, stop, 3):
        damaged = bytearray(good)
        damaged[place] = numbers.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(InputError):
            open_tensors(path)
            opened += 1
    assert 0 < opened < stop - begin
