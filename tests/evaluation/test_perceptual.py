"""Perceptual distances by their config: files, a download that cannot be, and the packaged network."""

from __future__ import annotations

import pytest
import torch

from ldm.autoencoder.perceptual import LPIPS
from ldm.errors import InputError
from ldm.evaluation import perceptual
from ldm.evaluation.perceptual import lpips, packaged_feature_distance


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(3)
    return LPIPS().half().float()  # so that a file may have half the size


def test_files_of_either_kind(trained, tmp_path) -> None:
    from safetensors.torch import save_file

    state = {name: value.half() for name, value in trained.state_dict().items()}
    vgg = {name.replace("network.", "features."): v for name, v in state.items() if name[:4] != "lins"}
    lins = {f"lin{name[5:]}.model.1.weight": v for name, v in state.items() if name[:4] == "lins"}
    torch.save(vgg, tmp_path / "vgg.pth")
    torch.save(lins, tmp_path / "lins.pth")
    save_file(vgg | lins, tmp_path / "both.safetensors")
    for weights in (f"{tmp_path}/vgg.pth,{tmp_path}/lins.pth", f"{tmp_path}/both.safetensors"):
        found = lpips(weights).state_dict()
        assert all(torch.equal(value, found[name]) for name, value in trained.state_dict().items())
    with pytest.raises(InputError, match=r"perceptual\.weights=.*no tensor lins\.0.*FILE,FILE"):
        lpips(f"{tmp_path}/vgg.pth")


def test_files_that_are_none(tmp_path) -> None:
    with pytest.raises(InputError, match=r"perceptual\.weights=nowhere\.pth: no such file"):
        lpips("nowhere.pth")
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"PK no tensors")
        with pytest.raises(InputError, match="is no file of tensors"):
            lpips(f"{tmp_path}/{name}")


def test_download_is_checked_and_says_what_to_do_offline(trained, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(perceptual, "DOWNLOADS", (("http://127.0.0.1:1/vgg16.pth", "0" * 64),))
    with pytest.raises(
        InputError, match=r"perceptual\.weights=download: cannot fetch http.*put the file at "
    ):
        lpips("download")
    torch.save(trained.state_dict(), tmp_path / "vgg16.pth")
    monkeypatch.setattr(perceptual, "DOWNLOADS", ((f"file://{tmp_path}/vgg16.pth", "0" * 64),))
    with pytest.raises(InputError, match="invalid hash value"):
        lpips("download")
    import hashlib

    sha256 = hashlib.sha256((tmp_path / "vgg16.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(perceptual, "DOWNLOADS", ((f"file://{tmp_path}/vgg16.pth", sha256),))
    assert torch.equal(lpips("download").lins[0], trained.lins[0])
    monkeypatch.setattr(perceptual, "DOWNLOADS", (("http://127.0.0.1:1/vgg16.pth", sha256),))
    assert torch.equal(lpips("download").lins[0], trained.lins[0]), "kept, and not fetched again"


def test_the_packaged_network_sees_blur_as_further_than_brightness() -> None:
    """Of equal squared error; both are further than nothing, and gradients reach the picture alone."""
    pytest.importorskip("efficientnet_lite_pytorch")
    from ldm.data.emoji import EmojiSet

    emoji = EmojiSet(image_size=64, num_objects=4)
    pictures = torch.stack([torch.from_numpy(emoji.picture(i, 0).copy()).permute(2, 0, 1) for i in range(4)])
    x = pictures.float() / 127.5 - 1
    distance = packaged_feature_distance().eval().requires_grad_(False)
    blurred = torch.nn.functional.avg_pool2d(x, 5, stride=1, padding=2, count_include_pad=False)
    shift = (blurred - x).square().mean((1, 2, 3), keepdim=True).sqrt()
    brighter = (x * (1 - shift) + shift * shift).requires_grad_()
    same, near, far = distance(x, x), distance(brighter, x), distance(blurred, x)
    assert same.tolist() == [0.0] * 4
    assert (near > 0).all()
    assert (far > 1.5 * near).all()
    near.sum().backward()
    assert brighter.grad.abs().max() > 0
