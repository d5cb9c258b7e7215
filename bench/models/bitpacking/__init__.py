"""Weights stored as codes of a few bits, in modules that compute with them."""
