"""Exit rules, exit heads and propagation maps. Imports core, stats, models and corpora."""
