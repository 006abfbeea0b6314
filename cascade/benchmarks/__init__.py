"""Benchmarks: several variants of the same work, timed in one process with interleaved rounds."""
