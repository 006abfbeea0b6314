"""Saturation profiles. Imports core, stats, models and corpora."""
