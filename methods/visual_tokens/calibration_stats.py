"""Calibration statistics of a network, and their storage.

Shapes: I samples, L layers, H query heads, F a feed-forward's width. Heads and neurons are numbered
as in the loaded network.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from methods.visual_engine.cost.closed_form import PromptLengths

TENSORS_FILE, FACTS_FILE = "calibration.safetensors", "calibration.json"
Queries = Literal["last", "text"]


@dataclass(frozen=True)
class CalibrationStats:
    """Scores from one calibration.

    `last` and `text` [I, L, H] are visual over text attention mass of the last prompt token, and of
    all text tokens together. `neurons` holds a score [F] for each feed-forward of each layer.
    `cut_kl[l - 1]` is the mean KL divergence in nats from the dense answer when visual tokens are
    removed after l layers; its last entry, where nothing is removed, is 0. `samples` is the
    fingerprint of the prompts, `prompt` their mean lengths.
    """

    last: Tensor
    text: Tensor
    neurons: list[list[Tensor]]
    cut_kl: list[float]
    prompt: PromptLengths
    samples: str

    def head_statistic(self, votes: float, queries: Queries = "last") -> Tensor:
        """Return a statistic [L, H] that exceeds a threshold exactly if enough ratios do.

        More than the fraction `votes` of I samples exceed tau exactly if the k-th largest ratio
        does, with k = ⌊votes · I⌋ + 1 (the paper: more than 40 of 100).
        """
        # With one number per head instead of a vote, thresholds and rankings need no samples.
        ratio_ILH = self.last if queries == "last" else self.text
        # 1e-9 corrects products that are slightly below a whole number, such as 40.
        needed = math.floor(votes * len(ratio_ILH) + 1e-9) + 1
        return ratio_ILH.sort(dim=0, descending=True).values[needed - 1]

    @property
    def origin(self) -> str:
        """SHA-256 over all statistics."""
        digest = hashlib.sha256(json.dumps(self._facts(), sort_keys=True).encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write tensors as safetensors and the rest as JSON to a folder."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        save_file(tensors, folder / TENSORS_FILE)
        facts = {**self._facts(), "origin": self.origin}
        (folder / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    def _tensors(self) -> dict[str, Tensor]:
        neurons = {
            f"neurons.{layer}.{unit}": score_F
            for layer, units in enumerate(self.neurons)
            for unit, score_F in enumerate(units)
        }
        return {"last": self.last, "text": self.text} | neurons

    def _facts(self) -> dict[str, object]:
        return {
            "cut_kl": self.cut_kl,
            "prompt": asdict(self.prompt),
            "samples": self.samples,
            "units": [len(units) for units in self.neurons],
        }
