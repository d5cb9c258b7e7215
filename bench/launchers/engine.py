"""The engines are extras: said in one sentence when one is not installed."""

from __future__ import annotations

import importlib
from types import ModuleType

from bench.errors import UserError


def engine(module: str, extra: str) -> ModuleType:
    """Import an engine, or say how it is had."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed: pip install 'slimbench[{extra}]'"
        ) from None
