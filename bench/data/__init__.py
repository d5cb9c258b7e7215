"""Texts and data sets: calibration, the embedded world, real English, images."""
