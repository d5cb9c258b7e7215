"""CAMERA's energy: the contribution of a micro-expert to the output of its layer.

Shapes: S tokens of one expert, F its width, N micro-experts of a layer (shared ones first).

With φ_ti the coefficient of micro-expert i on token t, router weight included, and w_i its down
column, the layer's routed output is y_t = Σ_i φ_ti w_i. Then (arXiv 2508.02322, section 3)

    E_i = [ (1 - α) · ‖φ_i‖₂² + α · ‖φ_i‖∞² ] · ‖w_i‖₂²

in squared activation times squared weight. At α = 0 it is exactly the squared error that removing i
alone causes in the layer's output, summed over tokens.

The paper's values of α, the weight of the peak term, are known only second-hand. Its code
multiplies the peak by 0.90 or 0.95 for DeepSeek-MoE and by 1.0 by default, which is what Qwen3 was
run with (`paper`). A note gives 0.05, and 0 for Qwen3, which could be meant as the peak's weight as
well (`low_peak`). The question is open: run both before claiming a replication.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from methods.moe.calibration_statistics import Moments


def energy(
    moments: Moments, norm_square_N: Tensor, alpha: float, tokens: int | None = None
) -> Tensor:
    """Return E, float64 [N], from the moments and the squared norms of the down columns.

    The paper's sum grows with the number of tokens while its peak does not, so the effect of one α
    depends on the amount of calibration text. With `tokens` the sum is replaced by the mean over
    that many tokens (not in the paper), which removes the dependence.
    """
    square_N = moments.square_sum_N if tokens is None else moments.square_sum_N / tokens
    return ((1 - alpha) * square_N + alpha * moments.peak_square_N.double()) * norm_square_N


Alpha = Annotated[float, Field(ge=0, le=1)] | Literal["paper", "low_peak"]
_PEAK_WEIGHTS = {"qwen3_moe": 1.0}
_DEFAULT_PEAK_WEIGHT = 0.95


def resolve_alpha(alpha: Alpha, model_type: str) -> float:
    """Return α for a model: the given number, or the value of a named reading for its type."""
    if not isinstance(alpha, str):
        return alpha
    peak = _PEAK_WEIGHTS.get(model_type, _DEFAULT_PEAK_WEIGHT)
    # Rounded, so that 1 - 0.95 is 0.05 in the record and not 0.050000000000000044.
    return peak if alpha == "paper" else round(1 - peak, 12)
