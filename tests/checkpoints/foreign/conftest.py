"""Names and shapes of published networks, and small random ones of the same layout."""

from __future__ import annotations

import copy
import functools
import importlib.util
from pathlib import Path

import pytest
import torch

from ldm.checkpoints.foreign import folder_in
from ldm.checkpoints.model import Asked, Model

PATH = Path(__file__).parents[2] / "data" / "sd_names.py"


@pytest.fixture(scope="session")
def sd_names():
    """The module tests/data/sd_names.py."""
    spec = importlib.util.spec_from_file_location("sd_names", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def family_shapes(sd_names):
    """(name, small=False) -> names and shapes of a network, or of a family's whole single file."""

    def shapes(name, small=False, **options):
        if name in sd_names.FAMILIES:
            return sd_names.single_file(name, small, **options)
        return sd_names.network(name, small)

    return shapes


@pytest.fixture(scope="session")
def random_tensors():
    """(shapes, seed=0, dtype=float32) -> tensors N(0, 0.05^2); position_ids are int64 numbers."""

    def tensors(shapes, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.arange(shape[-1]).expand(shape).contiguous()
            if name.endswith("position_ids")
            else (0.05 * torch.randn(shape, generator=generator)).to(dtype)
            for name, shape in shapes.items()
        }

    return tensors


@pytest.fixture(scope="session")
def peers():
    """The module peers.py: small random pipelines of diffusers."""
    spec = importlib.util.spec_from_file_location("peers", Path(__file__).with_name("peers.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def saved(peers, tmp_path_factory):
    """(family, draw) -> (pipeline, its folder as diffusers saves it), made once."""
    root = tmp_path_factory.mktemp("folders")
    return lambda family, draw=peers.redrawn: peers.saved(family, root, draw)


@pytest.fixture(scope="session")
def opened(saved):
    """family -> a Model of that folder, whose config and tensors may be changed; headers are read once."""
    read = functools.cache(lambda family: folder_in.read(saved(family)[1], Asked()))

    def model(family):
        found = read(family)
        return Model(copy.deepcopy(found.config), dict(found.tensors), facts=found.facts)

    return model


@pytest.fixture(scope="session")
def asked():
    """slug -> what the tensors of a small single file of the family do not tell."""
    from ldm.checkpoints.foreign.families import FAMILIES
    from ldm.checkpoints.model import Asked

    def options(slug):
        family = next(family for family in FAMILIES if family.slug == slug)
        prediction = family.prediction_type or "v_prediction"
        return Asked(prediction_type=prediction, head_dim=16, text_heads=4, latent_scale=family.latent_scale)

    return options


@pytest.fixture(scope="session")
def small(family_shapes, random_tensors, asked, tmp_path_factory):
    """slug -> (a small random model of the family, the tensors of the single file that it was read from)."""
    from ldm.checkpoints.foreign import single_file
    from ldm.checkpoints.lazy import LazyTensor, write_safetensors
    from ldm.checkpoints.model import Model

    made = {}

    def model(slug):
        if slug not in made:
            tensors = random_tensors(family_shapes(slug, True, with_buffers=False))
            path = tmp_path_factory.mktemp("small") / f"{slug}.safetensors"
            write_safetensors(path, {name: LazyTensor.of(value) for name, value in tensors.items()})
            made[slug] = single_file.read(path, asked(slug)), tensors
        found, tensors = made[slug]
        config = copy.deepcopy(found.config)
        return Model(config, dict(found.tensors), {}, copy.deepcopy(found.facts)), tensors

    return model
