"""What a run lends to its methods besides the model: calibration text, and prompts with images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.config import RunConfig
    from bench.data.calibration import CalibrationSource
    from bench.data.prompts import PromptSource
    from bench.method import Context
    from bench.models.model import Model
    from bench.progress import Progress


@dataclass(frozen=True)
class Loan:
    """What a run's methods ask for, found and fingerprinted; None for what none of them does."""

    calibration: CalibrationSource | None = None
    prompts: PromptSource | None = None

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """The hash of either, as records keep them."""
        return {
            "calibration": self.calibration.fingerprint if self.calibration else None,
            "prompts": self.prompts.fingerprint if self.prompts else None,
        }

    def may_change(self, config: RunConfig) -> bool:
        """Whether a hub that is asked again could answer differently."""
        text = self.calibration and config.calibration.source in ("wikitext2", "c4")
        return bool(text or (self.prompts and config.prompts.source == "hub"))

    def to(
        self, config: RunConfig, model: Model, progress: Progress, folder: Path | None = None
    ) -> Context:
        """Return it as a loaded model's tokenizer and processor make it."""
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


def lend(config: RunConfig) -> Loan:
    """Find what a run's methods ask for.

    Raises:
        MissingData: it is neither on this machine nor reachable.
        UserError: it is not what it should be.
    """
    from bench.data import calibration, prompts

    text = pictures = None
    if config.uses_calibration:
        text = calibration.resolve(config.calibration, offline=config.offline)
    if config.uses_prompts:
        pictures = prompts.resolve(config.prompts, offline=config.offline)
    return Loan(text, pictures)
