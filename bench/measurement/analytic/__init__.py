"""Analytic FLOPs: multiply-adds of each part of a network, from shapes alone, without a run."""

from bench.measurement.analytic.images import images
from bench.measurement.analytic.language import forward, token
from bench.measurement.analytic.multimodal import prefill, token_after

__all__ = ["forward", "images", "prefill", "token", "token_after"]
