"""Reports on the history of baselines."""
