"""Batch to conditioning: what the backbone is told beside the noisy latents."""
