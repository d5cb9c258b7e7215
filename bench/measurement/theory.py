"""The FLOPs of a call: what a measured gain is compared with.

They are counted in the very call that is timed, so that both skip the same work, whatever a
method does. The one place where measuring asks how FLOPs are counted.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.measurement.counting import watch


def flops(call: Callable[[], object]) -> int | None:
    """Return the FLOPs of a call of a network, two per multiply-add; None if some are not seen."""
    with watch() as counted:
        call()
    return None if counted.missed else counted.total
