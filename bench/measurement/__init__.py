"""Cost of a model: counted sizes and FLOPs, measured time, memory and energy."""
