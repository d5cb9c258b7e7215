"""Analytic FLOPs: multiply-adds of each part of a network, from shapes alone, without a run."""
