"""Checkpoints: which files are read, and whether all of their weights were loaded."""
