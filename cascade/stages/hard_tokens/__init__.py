"""Datasets of hard tokens: the exit states of a model over a corpus, stored for stages to learn."""
