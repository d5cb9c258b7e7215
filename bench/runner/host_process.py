"""Settings of the process that a call changes, and restores when it returns.

`bench.run` may be called in a process that goes on, such as a notebook: an offline run must not
leave the whole notebook offline.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from bench.data import hub

# Switches of lm-eval, Hydra and Ray. Those that keep libraries off the hub are restored by `hub`.
_VARIABLES = (
    "DISABLE_MULTIPROC",
    "HYDRA_FULL_ERROR",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
    "RAY_USAGE_STATS_ENABLED",
)


@contextmanager
def host_process_restored() -> Iterator[None]:
    """Restore the environment variables that a run changes, however it ends."""
    # Named variables instead of the whole environment: libraries that are imported during a call
    # keep settings there that they need for the rest of the process.
    before = {name: os.environ.get(name) for name in _VARIABLES}
    try:
        with hub.offline_switch_restored():
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
