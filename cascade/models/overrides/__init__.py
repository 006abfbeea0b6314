"""Changing what a model computes in one call, without changing the model."""
