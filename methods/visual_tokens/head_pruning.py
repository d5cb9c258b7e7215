"""Pruning of inactive visual heads (arXiv 2410.06169): most heads never attend to the image."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from bench.errors import UserError
from bench.method import Context
from bench.models.anatomy import Anatomy
from bench.models.model import Model
from methods.visual_tokens.engine import Engine
from methods.visual_tokens.findings import Queries, findings_for
from methods.visual_tokens.official_counts import OFFICIAL_COUNTS
from methods.visual_tokens.plan import Dropped
from methods.visual_tokens.selection import above, best, best_by_count
from methods.visual_tokens.strategy import VisualStrategy

Kept = list[tuple[int, ...]]


class HeadPruning(VisualStrategy):
    """Keep the query heads that attend to the image; drop the others from visual computation.

    The number of heads is set in one of three ways: `counts`, heads for every layer or the name of
    a released mask whose counts are used; `threshold`, the paper's tau on visual over text
    attention; or `keep`, a share of all heads, for which the threshold is derived. A head stays if
    its ratio exceeds the threshold in more than `votes` of the samples, where the ratio is that of
    the prompt's `last` token or of all its `text` (`queries`); the first `whole_layers` layers stay
    whole. `keep` is taken over all layers, as in the release (`over=all`), or over those that
    visual tokens reach (`over=visual`; then layer_drop must come first).

    `choose` ranks heads by their scores, or takes the first or random ones (controls). `dropped`
    sets what visual rows get from a dropped head: nothing (`silent`, as in the release) or its
    attention to text (`text`). With `reorder` the weights are permuted, exactly, so that kept heads
    need no copies. `settings` is the folder of a saved calibration.
    """

    keep: float = Field(default=0.5, ge=0, le=1)
    counts: str | list[int] | None = None
    threshold: float | None = Field(default=None, ge=0)
    votes: float = Field(default=0.4, ge=0, lt=1)
    queries: Queries = "last"
    whole_layers: int = Field(default=2, ge=0)
    over: Literal["all", "visual"] = "all"
    choose: Literal["scored", "first", "random"] = "scored"
    dropped: Dropped = "silent"
    reorder: bool = True
    settings: str | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.counts is not None and self.threshold is not None:
            raise ValueError("give counts or threshold, not both")
        if self.threshold is not None and self.choose != "scored":
            raise ValueError("threshold applies to scores: it needs choose=scored")
        if isinstance(self.counts, str) and self.counts not in OFFICIAL_COUNTS:
            known = ", ".join(OFFICIAL_COUNTS)
            raise ValueError(f"counts={self.counts}: give a list of numbers or one of {known}")
        return self

    @property
    def uses_prompts(self) -> bool:
        """Whether heads are scored on prompts: not with `settings`, `first` or `random`."""
        return self.choose == "scored" and self.settings is None

    def check(self, anatomy: Anatomy) -> None:
        """Also refuse counts that are not one per layer."""
        super().check(anatomy)
        counts = self._counts()
        if counts is not None and len(counts) != len(anatomy.layers):
            raise UserError(
                f"counts has {len(counts)} entries, but {anatomy.architecture} has "
                f"{len(anatomy.layers)} layers"
            )

    def _counts(self) -> list[int] | None:
        return OFFICIAL_COUNTS[self.counts] if isinstance(self.counts, str) else self.counts

    def _set(self, engine: Engine, model: Model, context: Context) -> dict[str, Any]:
        score_LH, origin = self._scores(engine, context)
        kept = self._choose(score_LH, engine.plan.cut)
        engine.plan.keep_heads(kept)
        engine.plan.dropped = self.dropped
        if self.reorder and self.form == "skip":
            engine.prepared.reorder()
        heads = [list(layer) for layer in kept]
        total = sum(len(layer) for layer in heads)
        return {"heads": heads, "kept": total, "of": score_LH.numel(), "scores": origin}

    def _scores(self, engine: Engine, context: Context) -> tuple[torch.Tensor, str]:
        """Return a score for every head, [L, H], and its origin."""
        heads = engine.decoder.layers[0].attention_view().heads
        shape = (len(engine.decoder.layers), heads)
        if self.choose == "first":
            # Descending scores make every ranking below take the first heads.
            return -torch.arange(heads, dtype=torch.float32).expand(shape), "first"
        if self.choose == "random":
            generator = torch.Generator().manual_seed(context.seed)
            return torch.rand(shape, generator=generator), "random"
        findings = findings_for(self.settings, engine, context)
        return findings.head_statistic(self.votes, self.queries), findings.origin

    def _choose(self, score_LH: torch.Tensor, cut: int) -> Kept:
        counts = self._counts()
        if counts is not None:
            return best_by_count(score_LH, counts)
        if self.threshold is not None:
            return above(score_LH, self.threshold, self.whole_layers)
        reached = cut if self.over == "visual" else len(score_LH)
        return best(score_LH, self.keep, self.whole_layers, reached)
