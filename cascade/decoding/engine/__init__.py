"""The decoding engine: passes over a few tokens with fused weights and few operations."""
