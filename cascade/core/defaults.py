"""Defaults that the command line, the Python functions and the pytest plugin share."""

from __future__ import annotations

#: Tokens per sequence.
SEQ_LEN = 128

#: Records of a corpus that a profile is measured on.
NUM_SAMPLES = 500

#: Tokens of a corpus that early exit is evaluated on.
EVALUATED_TOKENS = 8192

#: Hard ratios that thresholds are fitted to.
HARD_RATIOS = (0.3, 0.5, 0.7)
