"""What the runs of a process share: base model, ranks, versions; released by `Session.close`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.models.base_model_cache import BaseModelCache


@functools.cache
def _base_model_cache() -> BaseModelCache:
    """Return the loaded base model that all runs of this process share."""
    from bench.models.base_model_cache import BaseModelCache

    return BaseModelCache()
