"""Changing what a model computes for one call, without changing the model."""
