"""Causes of a drift: hypotheses that are computed and compared with what was measured."""
