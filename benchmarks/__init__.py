"""Developers' tools that measure `ldm` beside its peers; not in the wheel. See README.md."""
