"""FLOPs counted by PyTorch's dispatcher during a call, completed by operators that it misses."""

from bench.measurement.counting.watch import Counted, watch

__all__ = ["Counted", "watch"]
