"""What a calibration found out about a network, and how it is kept.

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
    """The scores of one calibration.

    `last` and `text` [I, L, H] are visual over text attention mass of the last prompt token, and
    of all text tokens together. `neurons` holds a score [F] for each feed-forward of each layer.
    `cut_kl[l - 1]` is the mean KL divergence in nats from the dense answer when visual tokens
    leave after l layers; its last entry, nothing left out, is 0. `samples` is the fingerprint of
    the prompts, `prompt` their mean lengths.
    """

    last: Tensor
    text: Tensor
    neurons: list[list[Tensor]]
    cut_kl: list[float]
    prompt: Prompt
    samples: str

    def head_statistic(self, votes: float, queries: Queries = "last") -> Tensor:
        """Return the number [L, H] that beats a threshold when enough samples' ratios do.

        More than `votes` of I samples lie above tau exactly if the k-th largest does, with k the
        whole part of votes · I, plus one (spec 1.2: more than 40 of 100).
        """
        ratio_ILH = self.last if queries == "last" else self.text
        # Whole samples: 0.4 of 100 is 40, whatever floating point makes of it.
        needed = math.floor(votes * len(ratio_ILH) + 1e-9) + 1
        return ratio_ILH.sort(dim=0, descending=True).values[needed - 1]

    @property
    def origin(self) -> str:
        """A SHA-256 over everything that was found."""
        digest = hashlib.sha256(json.dumps(self._facts(), sort_keys=True).encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write tensors as safetensors and the rest as JSON beside them."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        save_file(tensors, folder / TENSORS)
        facts = {**self._facts(), "origin": self.origin}
        (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    def _tensors(self) -> dict[str, Tensor]:
        """Return everything that is a tensor, by name."""
        neurons = {
            f"neurons.{layer}.{unit}": score_F
            for layer, units in enumerate(self.neurons)
            for unit, score_F in enumerate(units)
        }
        return {"last": self.last, "text": self.text} | neurons

    def _facts(self) -> dict[str, Any]:
        """Return everything else as JSON values."""
        return {
            "cut_kl": self.cut_kl,
            "prompt": asdict(self.prompt),
            "samples": self.samples,
            "units": [len(units) for units in self.neurons],
        }


def load(folder: Path) -> Findings:
    """Read what `Findings.save` wrote.

    Raises:
        MissingData: the folder has no calibration.
        UserError: its content is not what it was when it was written.
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
        raise UserError(f"settings={folder} was changed after it was written: calibrate again")
    return found


def findings_for(settings: str | None, engine: Engine, context: Context) -> Findings:
    """Return findings read from a folder, or made from the images that the run lends.

    Made once for all strategies of a run.

    Raises:
        UserError: the folder belongs to another model, or there are no images to calibrate on.
    """
    from methods.visual_tokens.calibration import measure

    if settings is not None:
        found = load(Path(settings).expanduser())
        _refuse_misfit(found, engine, settings)
        return found
    samples = samples_of(context)
    if samples.fingerprint not in engine.findings:
        engine.findings[samples.fingerprint] = measure(engine, samples, context.progress)
    return engine.findings[samples.fingerprint]


def samples_of(context: Context) -> Samples:
    """Return the prompts with images that a run lends to its methods."""
    given = context.prompts
    if given is None or not given.inputs:
        raise UserError(
            "visual token strategies are calibrated on prompts with images, and this run has none: "
            "give settings=FOLDER of a saved calibration, or choose=first or random"
        )
    return given


def _refuse_misfit(found: Findings, engine: Engine, settings: str) -> None:
    """Raise when findings are about a network of other sizes."""
    heads = engine.decoder.layers[0].attention_view().heads
    mine = (len(engine.decoder.layers), heads)
    theirs = tuple(found.last.shape[1:])
    widths = [[unit.width for unit in layer.units()] for layer in engine.decoder.layers]
    same = widths == [[len(score_F) for score_F in units] for units in found.neurons]
    if mine != theirs or not same:
        raise UserError(
            f"settings={settings} is about {theirs[0]} layers of {theirs[1]} heads, but the model "
            f"has {mine[0]} of {mine[1]}, or feed-forwards of another width"
        )
