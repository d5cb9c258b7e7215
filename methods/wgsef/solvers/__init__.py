"""Solvers: what a training run does, besides minimising its loss, to end with few groups."""
