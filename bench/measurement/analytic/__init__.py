"""FLOPs by arithmetic on shapes: what a network must multiply, part by part, without running it."""

from bench.measurement.analytic.images import images
from bench.measurement.analytic.language import forward, token
from bench.measurement.analytic.multimodal import prefill, token_after

__all__ = ["forward", "images", "prefill", "token", "token_after"]
