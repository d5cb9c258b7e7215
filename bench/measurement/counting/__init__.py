"""FLOPs counted by PyTorch's dispatcher while a call runs, with all that it misses added."""

from bench.measurement.counting.watch import Counted, watch

__all__ = ["Counted", "watch"]
