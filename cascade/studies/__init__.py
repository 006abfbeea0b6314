"""Studies: explanations of layers, and comparisons of corpora and models."""
