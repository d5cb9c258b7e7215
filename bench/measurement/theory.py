"""FLOPs of a call, the theory that a measured speed-up is compared with.

They are counted in the same call that is timed, so that both skip the same work, whatever a method
does. Only this module connects timing to FLOP counting.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.measurement.counting import watch


def flops(call: Callable[[], object]) -> int | None:
    """Return the FLOPs of a call, two per multiply-add; None if an operator has no formula."""
    with watch() as counted:
        call()
    return None if counted.missed else counted.total
