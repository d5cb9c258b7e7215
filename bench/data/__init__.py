"""Calibration text, image prompts, image data sets and the embedded synthetic data."""
