"""Reports of comparisons and gate sessions."""
