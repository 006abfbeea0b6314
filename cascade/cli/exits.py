"""Commands of early exit."""
