"""Low-bit weights: quantization grids, rounding, GPTQ, and the allocation of bits."""
