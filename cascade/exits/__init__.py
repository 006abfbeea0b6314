"""Exit rules, exit heads and propagation. Imports core, stats, models and corpora."""
