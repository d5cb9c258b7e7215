"""The FLOPs of a call: what a measured gain is compared with.

They are counted in the very call that is timed, so that both skip the same work, whatever a
method does. The one place where measuring asks how FLOPs are counted.
"""

from __future__ import annotations

from collections.abc import Callable

from bench.measurement.operators import counter


def flops(call: Callable[[], object]) -> int:
    """Return the FLOPs of a call of a network; one multiply-add is two."""
    with counter() as counted:
        call()
    return int(counted.get_total_flops())
