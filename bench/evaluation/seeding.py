"""The seed of every evaluation, apart from a run's own."""

SEED = 1234
"""The harnesses' own seed for few-shot examples, and ours for sampled generation."""
