"""Builders, references and planted faults that several test modules share."""
