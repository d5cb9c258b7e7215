"""Weight of the peak term in CAMERA's energy, per model, according to the sources.

The paper's values are known only second-hand. Its code multiplies the peak by 0.90 or 0.95 for
DeepSeek-MoE and by 1.0 by default, which is what Qwen3 was run with (`paper`). A note gives 0.05,
and 0 for Qwen3, which could be meant as the peak's weight as well (`low_peak`). The question is
open: run both before claiming a replication.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

Alpha = Annotated[float, Field(ge=0, le=1)] | Literal["paper", "low_peak"]

_PEAK = {"qwen3_moe": 1.0}
_ELSEWHERE = 0.95


def weight_of_peak(alpha: Alpha, model_type: str) -> float:
    """Return α for a model: the given number, or the value of a named reading for its type."""
    if not isinstance(alpha, str):
        return alpha
    peak = _PEAK.get(model_type, _ELSEWHERE)
    # Rounded, so that 1 - 0.95 is 0.05 in the record and not 0.050000000000000044.
    return peak if alpha == "paper" else round(1 - peak, 12)
