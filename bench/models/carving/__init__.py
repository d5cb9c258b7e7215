"""Conversion of a dense decoder into a mixture of experts, without training."""
