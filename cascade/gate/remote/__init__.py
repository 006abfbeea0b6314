"""Baselines that live elsewhere: read through fsspec, checked, and kept as copies in the cache."""
