"""Experiment trackers: W&B, or none."""
