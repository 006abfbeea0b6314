"""Drafting: what may come next, guessed without the full model, which then checks it."""
