"""Selection of a model's scorer: the requested one, or the padded one and the reason."""

from __future__ import annotations

from bench.evaluation import budget
from bench.evaluation.attention import window
from bench.evaluation.batches import Batches
from bench.evaluation.engine import Asked
from bench.evaluation.ranks import joined
from bench.evaluation.text.plain import PlainScorer
from bench.evaluation.text.question import Scorer
from bench.evaluation.text.spread import SpreadScorer
from bench.models.model import Model
from bench.progress import Progress


def scorer(model: Model, batches: Batches, progress: Progress, asked: Asked) -> Scorer:
    """Return a scorer for a model, and enter it in the backend report `asked`."""
    ranks = joined()
    own = _own(model, batches, progress, asked)
    return own if ranks.count == 1 else SpreadScorer(own, ranks)


def _own(model: Model, batches: Batches, progress: Progress, asked: Asked) -> Scorer:
    if asked.wanted == "plain":
        return PlainScorer(model, batches)
    from bench.evaluation.text.shared import fitness
    from bench.evaluation.text.shared.forward import Forward
    from bench.evaluation.text.shared.scoring import SharedScorer

    reason = fitness.unfit(model)
    if reason is not None:
        asked.because(reason)
        progress.console.print(f"[yellow]{model.name} uses the padded backend: {reason}[/]")
        return PlainScorer(model, batches)
    found = budget.find(model.network, model.device, progress)
    asked.used, asked.tokens_per_batch = "shared", found.tokens
    forward = Forward(model.network, model.device)
    return SharedScorer(forward, found, asked, window(model.network))
