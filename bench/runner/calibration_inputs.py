"""Calibration inputs of a run's methods: text, and prompts with images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.config.run_config import RunConfig
    from bench.data.calibration import CalibrationSource
    from bench.data.prompts import PromptSource
    from bench.method import Context
    from bench.models.model import Model
    from bench.ui import Progress


@dataclass(frozen=True)
class CalibrationInputs:
    """Calibration inputs that a run's methods use, fingerprinted; None if no method does."""

    calibration: CalibrationSource | None = None
    prompts: PromptSource | None = None

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """Hashes of the inputs, as records store them."""
        return {
            "calibration": self.calibration.fingerprint if self.calibration else None,
            "prompts": self.prompts.fingerprint if self.prompts else None,
        }

    def may_change(self, config: RunConfig) -> bool:
        """Return whether the hub could return different data next time."""
        text = self.calibration and config.calibration.source in ("wikitext2", "c4")
        return bool(text or (self.prompts and config.prompts.source == "hub"))

    def prepare(
        self, config: RunConfig, model: Model, progress: Progress, folder: Path | None = None
    ) -> Context:
        """Return the inputs encoded by a loaded model's tokenizer and processor."""
        from bench.method import Context

        text, prompts = self.calibration, self.prompts
        system = config.model.system_prompt
        return Context(
            seed=config.seed,
            calibration=text.tokenize(model.tokenizer) if text else None,
            prompts=prompts.process(model.processor, system) if prompts else None,
            progress=progress,
            folder=folder,
        )


def resolve_calibration_inputs(config: RunConfig) -> CalibrationInputs:
    """Find the calibration inputs that a run's methods use.

    Raises:
        MissingData: they are neither on this machine nor reachable.
        UserError: their content is not as required.
    """
    from bench.data import calibration, prompts

    text = pictures = None
    # Only what a method reads: a dense run must not fail, or get a different id, for want of text.
    if config.uses_calibration:
        text = calibration.resolve_calibration(config.calibration, offline=config.offline)
    if config.uses_prompts:
        pictures = prompts.resolve_prompts(config.prompts, offline=config.offline)
    return CalibrationInputs(text, pictures)
