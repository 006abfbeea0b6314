"""Export of drafters as checkpoints that other programs load."""
