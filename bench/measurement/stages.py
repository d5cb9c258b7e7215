"""The names of what is measured of a call, as they begin the scope of a cost: `prefill 1x512`."""

from __future__ import annotations

PREFILL, FIRST, DECODE, WHOLE = "prefill", "first token", "decode", "end to end"
FORWARD = "forward"
STAGES = (FORWARD, PREFILL, FIRST, DECODE, WHOLE)
