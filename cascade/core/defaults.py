"""Defaults that the command line, the Python functions and the pytest plugin share."""

from __future__ import annotations

#: Tokens per sequence.
SEQ_LEN = 128

#: Records of the corpus on which a profile is measured.
NUM_SAMPLES = 500

#: Tokens of the corpus on which early exit is evaluated.
EVALUATED_TOKENS = 8192

#: Hard ratios to which thresholds are fitted.
HARD_RATIOS = (0.3, 0.5, 0.7)

#: Tokens at the beginning of a corpus from which the quick gate takes its sequences.
GATED_TOKENS = 1 << 20

#: Tokens of a long sequence, if the model has so many positions.
LONG_CONTEXT = 2048
