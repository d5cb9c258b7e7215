"""Folders that inference engines load: one width for all experts, compressed-tensors weights."""
