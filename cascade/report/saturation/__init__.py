"""Reports of saturation profiles."""
