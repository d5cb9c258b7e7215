"""Estimates of a run before it starts: time, memory, downloads and energy, from shapes alone."""
