"""Solvers: the steps of a training, besides minimising its loss, that leave few groups."""
