"""Comparisons of one model on several corpora, and of several models on one corpus."""
