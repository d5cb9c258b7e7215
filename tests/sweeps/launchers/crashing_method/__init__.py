"""A method outside the shipped packages whose process comes to harm, to see what a sweep does."""

import os
import signal
from pathlib import Path

from bench.method import Context, Method, MethodReport
from bench.models.model import Model
from bench.models.structure.model_structure import ModelStructure


class CrashingMethod(Method):
    """Sends its own process a signal: each time, or only until `marker` exists."""

    signal: str
    marker: str | None = None
    ratio: float = 0.0

    def check(self, structure: ModelStructure) -> None:
        """Take any network."""

    def apply(self, model: Model, context: Context) -> MethodReport:
        """Come to harm, or change nothing."""
        marker = Path(self.marker) if self.marker else None
        if marker is None or not marker.exists():
            if marker is not None:
                marker.touch()
            os.kill(os.getpid(), getattr(signal, self.signal))
            signal.pause()
        return MethodReport(effect="none", details={})
