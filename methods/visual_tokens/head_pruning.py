"""Pruning of query heads that hardly attend to the image (arXiv 2410.06169)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from bench.errors import UserError
from bench.method import Context, InputSize, MethodWork
from bench.models.model import Model
from bench.models.structure.model_structure import ModelStructure
from bench.models.vlm.decoder_view import decoder_layers
from methods.visual_engine.decoder import VisualEngine
from methods.visual_engine.settings import DroppedHeads
from methods.visual_engine.strategy import VisualStrategy
from methods.visual_tokens.allocation import (
    KeptHeads,
    Ranking,
    control_scores,
    heads_above,
    top_heads_by_count,
    top_heads_by_share,
)
from methods.visual_tokens.calibration import calibration_stats_for, with_calibration
from methods.visual_tokens.calibration_stats import Queries


class HeadPruning(VisualStrategy):
    """Keep the query heads that attend to the image; drop the others from visual computation.

    Set exactly one of:

    - `mask`: a file that says which heads are kept, such as one of the paper's release;
    - `counts`: the number of heads of every layer, or the name of a released mask with its counts;
    - `threshold`: the paper's tau. A head is kept if the ratio of its visual to its text attention
      exceeds tau in more than the fraction `votes` of the samples;
    - `keep`: a share of all heads, from which the threshold is derived.

    `queries` says whose attention is measured: that of the prompt's `last` token or of all its
    `text`. The first `whole_layers` layers keep all heads. `keep` is a share of the heads of all
    layers, as in the release (`over=all`), or of the layers that visual tokens reach
    (`over=visual`; layer_drop must then come first).

    `choose` ranks heads by score or, as controls, takes the first or random ones. `dropped_heads`
    is what visual rows get from a dropped head: nothing (`zero`, as in the release) or its
    attention to text (`text_only`). `reorder` permutes the weights, without changing the function
    of the network, so that kept heads need no copies. `calibration_folder` is a saved calibration.
    """

    keep: float = Field(default=0.5, ge=0, le=1)
    mask: str | None = None
    counts: str | list[int] | None = None
    threshold: float | None = Field(default=None, ge=0)
    votes: float = Field(default=0.4, ge=0, lt=1)
    queries: Queries = "last"
    whole_layers: int = Field(default=2, ge=0)
    over: Literal["all", "visual"] = "all"
    choose: Ranking = "scored"
    dropped_heads: DroppedHeads = "zero"
    reorder: bool = True
    calibration_folder: str | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [
            name for name in ("mask", "counts", "threshold") if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are set: set all but one of them to null")
        if self.mask is not None and self.choose != "scored":
            raise ValueError(
                f"choose={self.choose} cannot be combined with mask: set choose=scored"
            )
        if self.threshold is not None and self.choose != "scored":
            raise ValueError(f"choose={self.choose}: threshold needs scores; set choose=scored")
        if isinstance(self.counts, str) and self.counts not in RELEASED_HEAD_COUNTS:
            known = ", ".join(RELEASED_HEAD_COUNTS)
            raise ValueError(f"counts={self.counts}: give a list of numbers or one of {known}")
        return self

    @property
    def uses_prompts(self) -> bool:
        """Whether heads are scored on the run's prompts."""
        return self.choose == "scored" and self.calibration_folder is None and self.mask is None

    def work(self, structure: ModelStructure, inputs: InputSize) -> MethodWork:
        """Add the calibration, if heads are scored on prompts of this run."""
        work = super().work(structure, inputs)
        return with_calibration(work, structure, inputs) if self.uses_prompts else work

    def check(self, structure: ModelStructure) -> None:
        """Also refuse a mask that does not fit, and counts that are not one per layer."""
        super().check(structure)
        if self.mask is not None:
            sizes = [layer.attention_view().heads for layer in decoder_layers(structure)]
            read_head_mask(Path(self.mask), sizes)
        if self.mask is None and self.counts is None and self.threshold is None:
            # Checks that `keep` allows for the whole layers. The layers that visual tokens reach
            # are known only once the other methods have been applied.
            heads = [layer.attention_view().heads for layer in decoder_layers(structure)]
            if self.over == "all" and len(set(heads)) == 1:
                self._choose(torch.zeros(len(heads), heads[0]), len(heads))
        counts = self._counts()
        if counts is not None and len(counts) != len(structure.layers):
            raise UserError(
                f"counts has {len(counts)} entries, but {structure.architecture} has "
                f"{len(structure.layers)} layers"
            )

    def _counts(self) -> list[int] | None:
        return RELEASED_HEAD_COUNTS[self.counts] if isinstance(self.counts, str) else self.counts

    def configure(self, engine: VisualEngine, model: Model, context: Context) -> dict[str, object]:
        """Choose each layer's heads, set them in the plan and report their numbers."""
        sizes = [layer.attention_view().heads for layer in engine.decoder.layers]
        if self.mask is not None:
            kept, origin = read_head_mask(Path(self.mask), sizes), "mask"
        else:
            score_LH, origin = self._scores(engine, context)
            kept = self._choose(score_LH, engine.plan.cut)
        engine.plan.keep_heads(kept)
        engine.plan.dropped_heads = self.dropped_heads
        if self.reorder and self.execution == "skip":
            engine.weight_cache.reorder()
        heads = [list(layer) for layer in kept]
        total = sum(len(layer) for layer in heads)
        return {"heads": heads, "kept": total, "of": sum(sizes), "scores": origin}

    def _scores(self, engine: VisualEngine, context: Context) -> tuple[Tensor, str]:
        """Return a score for every head, [L, H], and its origin."""
        if self.choose != "scored":
            sizes = [layer.attention_view().heads for layer in engine.decoder.layers]
            return torch.stack(control_scores(self.choose, sizes, context.seed)), self.choose
        stats = calibration_stats_for(self.calibration_folder, engine, context)
        return stats.head_statistic(self.votes, self.queries), stats.origin

    def _choose(self, score_LH: Tensor, cut: int) -> KeptHeads:
        counts = self._counts()
        if counts is not None:
            return top_heads_by_count(score_LH, counts)
        if self.threshold is not None:
            return heads_above(score_LH, self.threshold, self.whole_layers)
        reached = cut if self.over == "visual" else len(score_LH)
        return top_heads_by_share(score_LH, self.keep, self.whole_layers, reached)


def read_head_mask(file: Path, heads: Sequence[int]) -> KeptHeads:
    """Read which heads of every layer are kept from a NumPy array of bool, [L, H].

    `heads` are the numbers of heads of the network's layers. The masks of the paper's release have
    this form (`LLaVA/headmask/headmask_7b_16.npy` and others).

    Raises:
        UserError: the file is not such an array, or does not fit this network.
    """
    setting = f"method.head_pruning.mask={file}"
    try:
        # Without pickle, because an array of objects could run code.
        keep_LH = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{setting}: there is no such file") from None
    except (OSError, ValueError, EOFError):
        raise UserError(f"{setting} is not an array written by numpy.save") from None
    if not isinstance(keep_LH, np.ndarray) or keep_LH.dtype != np.bool_:
        kind = getattr(keep_LH, "dtype", "several arrays")
        raise UserError(f"{setting} holds {kind}: give an array of bool, one row per layer")
    if keep_LH.shape != (len(heads), heads[0]) or len(set(heads)) > 1:
        shape = "x".join(map(str, keep_LH.shape))
        raise UserError(
            f"{setting} is for {shape} (layers x heads), but the model has {len(heads)} layers of "
            f"{' or '.join(map(str, sorted(set(heads))))} heads: use the mask of this model"
        )
    return [tuple(row_H.nonzero()[0].tolist()) for row_H in keep_LH]


# Heads kept per layer by the released LLaVA-1.5 masks, counted from the boolean masks in the
# paper's repository (ZhangAIPI/YOPO_MLLM_Pruning, LLaVA/headmask); which heads they keep is in
# those files only (`mask`).
# fmt: off
RELEASED_HEAD_COUNTS: dict[str, list[int]] = {
    "llava_7b_8": [
        32, 32, 0, 0, 1, 0, 1, 0, 4, 3, 5, 5, 10, 8, 18, 11,
        9, 10, 9, 11, 15, 11, 11, 6, 11, 7, 10, 1, 4, 6, 2, 7,
    ],
    "llava_7b_16": [
        32, 32, 9, 5, 10, 4, 5, 15, 18, 13, 15, 20, 23, 24, 27, 23,
        27, 17, 14, 18, 18, 16, 15, 8, 14, 10, 15, 5, 7, 11, 5, 24,
    ],
    "llava_7b_24": [
        32, 32, 32, 19, 24, 17, 21, 27, 26, 23, 27, 24, 28, 31, 31, 27,
        29, 27, 23, 28, 25, 21, 20, 19, 18, 21, 20, 13, 18, 22, 16, 32,
    ],
    "llava_13b_5": [
        40, 40, 0, 0, 0, 0, 0, 0, 2, 0, 3, 2, 1, 3, 3, 7, 6, 7, 4, 6,
        5, 2, 4, 5, 5, 6, 5, 3, 4, 1, 4, 2, 4, 0, 3, 1, 5, 4, 4, 9,
    ],
    "llava_13b_10": [
        40, 40, 4, 3, 0, 5, 2, 7, 13, 8, 10, 8, 12, 20, 9, 14, 14, 16, 17, 12,
        14, 16, 9, 9, 9, 9, 8, 5, 5, 2, 4, 2, 6, 2, 4, 6, 7, 6, 9, 21,
    ],
    "llava_13b_20": [
        40, 40, 29, 24, 7, 21, 16, 11, 21, 21, 19, 20, 23, 28, 24, 25, 32, 26, 26, 25,
        21, 26, 20, 12, 17, 12, 14, 11, 11, 9, 15, 10, 15, 10, 16, 16, 18, 18, 17, 32,
    ],
    "llava_13b_30": [
        40, 40, 40, 38, 31, 32, 29, 27, 33, 29, 33, 28, 33, 32, 32, 34, 39, 33, 32, 35,
        30, 31, 31, 23, 23, 23, 22, 23, 16, 24, 28, 29, 28, 25, 30, 27, 24, 29, 26, 35,
    ],
}
