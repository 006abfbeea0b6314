"""The gate: baselines, comparison, attribution, noise and budgets."""
