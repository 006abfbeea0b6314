"""Shards: one profile from many tasks, with the bits of a single pass."""
