"""Corpora: reading, tokenizing and cutting text into sequences. Imports core and models."""
