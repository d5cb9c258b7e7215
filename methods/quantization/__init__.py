"""Weights of a few bits: grids, rounding, GPTQ, and how bits are shared out."""
