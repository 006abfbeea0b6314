"""Texts that a model generates itself, with its states, to train a drafter on."""
