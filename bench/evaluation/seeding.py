"""Seed of every evaluation; independent of the run's own seed."""

SEED = 1234
"""Seed of few-shot examples (the harnesses' default) and of sampled generation."""
