"""Benchmark of lossless decoding: the same text by `generate`, by this package, and by peers."""
