"""Triton kernels. Each has a plain counterpart, which runs where Triton or a GPU is missing."""
