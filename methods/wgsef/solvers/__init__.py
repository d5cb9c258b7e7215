"""Solvers: what a training does in each step, besides minimising its loss, to sparsify groups."""
