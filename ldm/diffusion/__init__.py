"""The diffusion core: pure functions of tensors and floats; it knows no network, no data and no trainer."""
