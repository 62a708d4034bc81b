"""Tar shards to batches: index (what is there), plan (which sample is the n-th), reader, datamodule."""
