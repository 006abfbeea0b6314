"""Engines: shards run by a cluster, with the bits of one process."""
