"""Calibration statistics of a network, and how they are stored.

Shapes: I samples, L layers, H query heads, F a feed-forward's width. Heads and neurons are numbered
as in the loaded network.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from bench.errors import MissingData, UserError
from bench.models.multimodal import Samples
from methods.visual_tokens.cost import Prompt

if TYPE_CHECKING:
    from bench.method import Context
    from methods.visual_tokens.engine import Engine

TENSORS, FACTS = "findings.safetensors", "findings.json"
Queries = Literal["last", "text"]


@dataclass(frozen=True)
class Findings:
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
    prompt: Prompt
    samples: str

    def head_statistic(self, votes: float, queries: Queries = "last") -> Tensor:
        """Return the number [L, H] that exceeds a threshold exactly if enough samples' ratios do.

        More than `votes` of I samples lie above tau exactly if the k-th largest does, with k =
        ⌊votes · I⌋ + 1 (the paper: more than 40 of 100).
        """
        # One number per head replaces the vote, so that any threshold, and a ranking for a share of
        # heads, can be applied later without the samples.
        ratio_ILH = self.last if queries == "last" else self.text
        # The 1e-9 makes 0.4 of 100 samples exactly 40, however the product is rounded.
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
        save_file(tensors, folder / TENSORS)
        facts = {**self._facts(), "origin": self.origin}
        (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    def _tensors(self) -> dict[str, Tensor]:
        neurons = {
            f"neurons.{layer}.{unit}": score_F
            for layer, units in enumerate(self.neurons)
            for unit, score_F in enumerate(units)
        }
        return {"last": self.last, "text": self.text} | neurons

    def _facts(self) -> dict[str, Any]:
        return {
            "cut_kl": self.cut_kl,
            "prompt": asdict(self.prompt),
            "samples": self.samples,
            "units": [len(units) for units in self.neurons],
        }


def load(folder: Path) -> Findings:
    """Read what `CalibrationStats.save` wrote.

    Raises:
        MissingData: the folder has no calibration.
        UserError: its content has changed since it was written.
    """
    from safetensors.torch import load_file

    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except FileNotFoundError:
        raise MissingData(f"settings={folder} holds no {FACTS} and {TENSORS}") from None
    except Exception as error:
        raise UserError(f"settings={folder} cannot be read: {error}") from None
    found = Findings(
        last=tensors["last"],
        text=tensors["text"],
        neurons=[
            [tensors[f"neurons.{layer}.{unit}"] for unit in range(count)]
            for layer, count in enumerate(facts["units"])
        ],
        cut_kl=facts["cut_kl"],
        prompt=Prompt(**facts["prompt"]),
        samples=facts["samples"],
    )
    if found.origin != facts["origin"]:
        raise UserError(f"settings={folder} was changed after it was written: recalibrate")
    return found


def findings_for(settings: str | None, engine: Engine, context: Context) -> Findings:
    """Return statistics read from a folder, or measured on the run's calibration prompts.

    Measured once for all strategies of a run.

    Raises:
        UserError: the folder belongs to a different model, or the run has no calibration prompts.
    """
    from methods.visual_tokens.calibration import measure

    if settings is not None:
        found = load(Path(settings).expanduser())
        _refuse_misfit(found, engine, settings)
        return found
    samples = samples_of(context)
    # Kept on the engine, so that several strategies of one run share one calibration of the dense
    # network.
    if samples.fingerprint not in engine.findings:
        engine.findings[samples.fingerprint] = measure(engine, samples, context.progress)
    return engine.findings[samples.fingerprint]


def samples_of(context: Context) -> Samples:
    """Return the run's calibration prompts.

    Raises:
        UserError: the run has none.
    """
    given = context.prompts
    if given is None or not given.inputs:
        raise UserError(
            "visual token strategies are calibrated on prompts with images, and this run has none: "
            "set prompts=, settings=FOLDER of a saved calibration, or choose=first or random"
        )
    return given


def _refuse_misfit(found: Findings, engine: Engine, settings: str) -> None:
    """Raise if the statistics belong to a network of different sizes."""
    heads = engine.decoder.layers[0].attention_view().heads
    mine = (len(engine.decoder.layers), heads)
    theirs = tuple(found.last.shape[1:])
    widths = [[unit.width for unit in layer.units()] for layer in engine.decoder.layers]
    same = widths == [[len(score_F) for score_F in units] for units in found.neurons]
    if mine != theirs or not same:
        raise UserError(
            f"settings={settings} was measured on {theirs[0]} layers of {theirs[1]} heads; the "
            f"model has {mine[0]} of {mine[1]}, or feed-forwards of another width"
        )
