"""Names of the measured stages of a call; a cost's scope starts with one: `prefill 1x512`."""

from __future__ import annotations

PREFILL, FIRST, DECODE, WHOLE = "prefill", "first token", "decode", "end to end"
FORWARD = "forward"
STAGES = (FORWARD, PREFILL, FIRST, DECODE, WHOLE)
