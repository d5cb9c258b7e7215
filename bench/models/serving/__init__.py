"""Export for inference engines: equal widths of all experts, compressed-tensors weights."""
