"""Reports of benchmarks: speed, ratios, memory, and the targets met or missed."""
