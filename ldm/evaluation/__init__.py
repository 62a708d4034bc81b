"""Metrics on pictures and checkpoints; everything here takes pictures, arrays or a callable, never a path."""
