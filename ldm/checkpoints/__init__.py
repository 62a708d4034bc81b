"""Run directories and checkpoint directories: safetensors and JSON, written whole or not at all."""
