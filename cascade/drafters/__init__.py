"""Trained drafters: a small network that proposes tokens, which the full model then verifies."""
