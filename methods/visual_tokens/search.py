"""Search for settings that meet a budget of FLOPs or seconds at the least expected KL divergence.

The KL divergence in nats from the dense answer is measured separately for a layer cut, for fewer
heads and for fewer neurons, with nothing else changed. The three are assumed to be additive, as in
operation pruning (arXiv 2507.02909). The cost is `visual_share`, which is linear in heads.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from bench.data.prompts import ProcessedPrompts
from bench.device.devices import Clock
from bench.errors import UserError
from bench.method import InputSize, MethodWork
from bench.ui import Progress
from methods.visual_engine.cost.closed_form import (
    DecoderShape,
    PromptLengths,
    mean_neighbours,
    visual_share,
)
from methods.visual_engine.cost.flops import decoder_shape, layer_costs
from methods.visual_engine.decoder import VisualEngine
from methods.visual_engine.plan import VisualPlan
from methods.visual_tokens.allocation import top_heads_in_total, top_neurons_of_layers
from methods.visual_tokens.calibration_stats import CalibrationStats

HEAD_SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125, 0.0)
NEURON_SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)
# Maximum number of settings that are timed.
MAX_READINGS = 24
# Number of timed rounds, whose median is used; a warm-up round precedes them.
TIMING_ROUNDS = 5

# Settings whose estimate exceeds a time budget by at most this factor are measured nevertheless:
# estimates are accurate to a few per cent, and skipping a setting that meets the budget costs
# accuracy.
ESTIMATE_MARGIN = 1.1


@dataclass(frozen=True)
class StrategyShares:
    """A candidate: layers that visual tokens reach, total heads kept, share of neurons kept."""

    cut: int
    heads: int
    neurons: float


@dataclass(frozen=True)
class SearchResult:
    """Result of a search: settings, share of visual FLOPs, expected KL divergence in nats.

    `seconds` is the measured fraction of the dense prefill's time if the budget is a time.
    """

    settings: StrategyShares
    share: float
    expected_kl: float
    seconds: float | None = None


class BudgetSearch:
    """One search on one network. Candidates are tried by setting the engine's plan."""

    def __init__(
        self,
        engine: VisualEngine,
        stats: CalibrationStats,
        samples: ProcessedPrompts,
        whole_layers: int,
    ) -> None:
        self.engine, self.stats, self.samples = engine, stats, samples
        self.shape: DecoderShape = decoder_shape(engine)
        self.whole_layers = min(whole_layers, self.shape.depth)
        # 0.4 of the samples is the paper's vote (more than 40 of 100), the default of head_pruning.
        self.score_LH = stats.head_statistic(votes=0.4)
        self.prompt = _with_window(stats.prompt, engine.plan)

    @torch.no_grad()
    def fit(self, budget: float, progress: Progress) -> SearchResult:
        """Set the plan to the settings of least expected KL within `budget`, and return them.

        Raises:
            UserError: even the cheapest settings cost more.
        """
        candidates = self._candidates(progress)
        meeting = [found for found in candidates if found.share <= budget]
        if not meeting:
            least = min(found.share for found in candidates)
            raise UserError(
                f"budget={budget} cannot be met: the cheapest settings leave {least:.4f} of the "
                "visual computation; raise budget or lower whole_layers"
            )
        # The grid of head shares is coarse, so the best settings usually leave part of the budget
        # unused. It is spent on more heads.
        settings = self._filled(meeting[0].settings, budget)
        return SearchResult(settings, self._share(settings), meeting[0].expected_kl)

    @torch.no_grad()
    def fit_seconds(self, budget: float, progress: Progress) -> SearchResult:
        """Like `fit`, but `budget` is a fraction of the dense prefill's measured time.

        Candidates are timed in order of expected KL. Those whose estimated time is well above the
        budget are skipped. The estimate assumes that time is linear in visual FLOPs and is
        corrected by the last measurement.

        Raises:
            UserError: none of the measured settings is fast enough.
        """
        timer = PrefillTimer(self.engine, self.samples)
        text = self.prompt.text / (self.prompt.text + self.prompt.visual)
        correction, fastest = 1.0, float("inf")
        for found in self._candidates(progress):
            # Only the visual part of the prompt gets cheaper; text rows are computed in full.
            estimate = text + (1 - text) * found.share
            if correction * estimate > ESTIMATE_MARGIN * budget:
                continue
            self._share(found.settings)
            measured = timer.share()
            fastest = min(fastest, measured)
            if measured <= budget:
                return replace(found, seconds=measured)
            if timer.readings == MAX_READINGS:
                break
            correction = measured / estimate
        tried = f"{timer.readings} settings were timed, the fastest takes {fastest:.3f}"
        if not timer.readings:
            tried = "no setting was timed, since even the cheapest is estimated to take longer"
        raise UserError(
            f"budget={budget} of the dense prefill's time cannot be met: {tried}; "
            "raise budget or lower whole_layers"
        )

    def _candidates(self, progress: Progress) -> list[SearchResult]:
        """Return all settings, the least expected KL first."""
        kl = self._measure_kl(progress)
        found = []
        cuts = range(1, self.shape.depth + 1)
        for cut, heads, neurons in product(cuts, HEAD_SHARES, NEURON_SHARES):
            settings = StrategyShares(cut, self._total_heads(cut, heads), neurons)
            expected = self.stats.cut_kl[cut - 1] + kl["heads", heads] + kl["neurons", neurons]
            found.append(SearchResult(settings, self._share(settings), expected))
        return sorted(found, key=lambda fitted: fitted.expected_kl)

    def _total_heads(self, cut: int, share: float) -> int:
        """Return the number of heads kept if all layers but the whole ones keep this share."""
        whole, heads = min(self.whole_layers, cut), self.shape.heads
        return whole * heads + round(share * (cut - whole) * heads)

    def _filled(self, settings: StrategyShares, budget: float) -> StrategyShares:
        """Raise the number of heads as far as the budget allows."""
        # Bisection is exact here: cost is linear, hence monotonic, in the number of heads.
        low, high = settings.heads, settings.cut * self.shape.heads
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._share(replace(settings, heads=middle)) <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return replace(settings, heads=low)

    def _share(self, settings: StrategyShares) -> float:
        """Set the plan to these settings and return their share of visual FLOPs."""
        plan = self.engine.plan
        plan.cut_at(settings.cut)
        whole = min(self.whole_layers, settings.cut)
        plan.keep_heads(top_heads_in_total(self.score_LH, settings.heads, whole, settings.cut))
        plan.keep_neurons(top_neurons_of_layers(self.stats.neurons, settings.neurons))
        return visual_share(self.shape, layer_costs(self.engine), self.prompt)

    def _measure_kl(self, progress: Progress) -> dict[tuple[str, float], float]:
        """Measure the KL of fewer heads and of fewer neurons, each with everything else kept."""
        dense = list(self._answers(dense=True))
        # Ten measurements, one per share and kind, instead of thousands of combinations of layers,
        # heads and neurons, assuming that their KL is additive.
        depth, kl = self.shape.depth, {("heads", 1.0): 0.0, ("neurons", 1.0): 0.0}
        tried = [("heads", share) for share in HEAD_SHARES[1:]]
        tried += [("neurons", share) for share in NEURON_SHARES[1:]]
        for what, share in progress.track(tried, "measuring fewer heads and neurons"):
            heads = self._total_heads(depth, share if what == "heads" else 1.0)
            self._share(StrategyShares(depth, heads, share if what == "neurons" else 1.0))
            answers = self._answers(dense=False)
            parts = [_kl_divergence(p, q) for p, q in zip(dense, answers, strict=True)]
            kl[what, share] = float(torch.stack(parts).mean())
        return kl

    def _answers(self, *, dense: bool) -> Iterator[Tensor]:
        """Yield log probabilities of each sample's next token, [B, vocabulary]."""
        for call in self.samples.inputs:
            with self.engine.dense() if dense else nullcontext():
                logits_BV = self.engine.last_logits(call)
            yield logits_BV.double().log_softmax(dim=-1)


def with_search(work: MethodWork, inputs: InputSize, *, timed: bool) -> MethodWork:
    """Add a search to a method's work: answers of the dense network, and of each share tried.

    As an upper bound, visual rows are counted in full, like text rows. With `timed`, the prefill of
    one prompt is also timed, dense and planned, for at least one setting.
    """
    tried = len(HEAD_SHARES[1:]) + len(NEURON_SHARES[1:])
    visual = inputs.visual / max(1.0, inputs.length)
    forwards, possible = 1 + tried * (1 - visual), tried * visual
    if timed:
        # Only the first batch of prompts is timed.
        once = (TIMING_ROUNDS + 1) * min(inputs.batch, inputs.rows) / max(1, inputs.rows)
        forwards, possible = forwards + once, possible + once * (2 * MAX_READINGS - 1)
    return replace(work, forwards=work.forwards + forwards, possible=work.possible + possible)


def _with_window(prompt: PromptLengths, plan: VisualPlan) -> PromptLengths:
    """Set the mean number of visual keys in a window, assuming a square grid."""
    if plan.window is None:
        return prompt
    side = max(1, round(prompt.visual**0.5))
    neighbours = mean_neighbours(side, side, plan.window.radius)
    return replace(prompt, neighbours=neighbours)


def _kl_divergence(p_BV: Tensor, q_BV: Tensor) -> Tensor:
    """Return KL(p ‖ q) of log probabilities, averaged over samples."""
    return (p_BV.exp() * (p_BV - q_BV)).sum(dim=-1).mean()


class PrefillTimer:
    """Times the prefill of one prompt, alternating between the dense and the planned network."""

    def __init__(self, engine: VisualEngine, samples: ProcessedPrompts) -> None:
        self._engine = engine
        self._call = samples.inputs[0]
        self.readings = 0

    @torch.no_grad()
    def share(self) -> float:
        """Return the median time of the plan divided by that of the dense network."""
        self.readings += 1
        planned, dense = [], []
        for number in range(TIMING_ROUNDS + 1):
            # Alternating runs see the same clock rates and load of the machine; medians discard
            # outliers.
            took = self._seconds()
            with self._engine.dense():
                whole = self._seconds()
            # The first round includes weight slicing, kernel selection and allocation.
            if number:
                planned.append(took)
                dense.append(whole)
        return statistics.median(planned) / statistics.median(dense)

    def _seconds(self) -> float:
        clock = Clock(next(self._engine.network.parameters()).device)
        clock.mark()
        self._engine.network(**self._call, use_cache=True, logits_to_keep=1)
        clock.mark()
        return clock.laps()[0]
