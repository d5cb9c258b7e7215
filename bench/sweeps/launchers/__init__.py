"""Hydra launchers, which run the jobs of a sweep."""
