"""Lossless decoding next to early exit: which of them saves more time on this machine."""
