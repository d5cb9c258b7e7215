"""Hydra sweepers, which define the jobs of a sweep, and launchers, which run them."""
