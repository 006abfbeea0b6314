"""Stages for hard tokens: datasets, training, cascades and their evaluation."""
