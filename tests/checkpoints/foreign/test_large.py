"""A file of Stable Diffusion's size goes through little memory."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys

import pytest
import torch

from ldm.checkpoints.lazy import LazyTensor, open_safetensors, write_safetensors

UNET = "model.diffusion_model."
IMPORT = """
import sys
from ldm.cli import main
main(["import", *sys.argv[1:]])
with open("/proc/self/status") as status:  # ru_maxrss begins with the size of the parent
    print(next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM")))
"""


@pytest.fixture
def sd1_file(tmp_path, family_shapes):
    """4.27 GB: the names of SD 1, without buffers and averages; random values."""
    if shutil.disk_usage(tmp_path).free < 20e9:
        pytest.skip("needs 20 GB of free disk")

    shapes = family_shapes("sd1", with_buffers=False)
    noise = torch.randn(40_000_000, generator=torch.Generator().manual_seed(0))

    def values(i, shape):  # each tensor is another part of one long noise
        count = math.prod(shape)
        return LazyTensor(shape, torch.float32, lambda: noise[i : i + count].view(shape))

    assert len(shapes) == 1_131
    assert sum(math.prod(shape) for shape in shapes.values()) == 1_066_235_384  # 77 are position_ids
    file = tmp_path / "sd1.safetensors"
    write_safetensors(file, {name: values(i, shape) for i, (name, shape) in enumerate(shapes.items())})
    yield file
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_an_import_holds_one_tensor_at_a_time(sd1_file):
    out = sd1_file.with_name("sd1")
    done = subprocess.run([sys.executable, "-c", IMPORT, sd1_file, out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, last, most = done.stdout.splitlines()
    assert last.startswith(f"stored in {out}")
    found, wanted = open_safetensors(out / "model.safetensors")[0], open_safetensors(sd1_file)[0]
    assert sum(value.nbytes for value in found.values()) > 0.999 * sd1_file.stat().st_size
    stem = "conv_in.weight", "input_blocks.0.0.weight"
    ours, theirs = (f"{home}{name}" for home, name in zip(("backbone.", UNET), stem, strict=True))
    assert torch.equal(found[ours].read(), wanted[theirs].read())
    assert int(most) < 1.2e9 < 0.3 * sd1_file.stat().st_size, f"{int(most):,} bytes at most"
