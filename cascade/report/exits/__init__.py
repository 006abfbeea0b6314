"""Reports of early exit and stages."""
