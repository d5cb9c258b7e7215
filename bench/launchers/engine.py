"""Import of optional libraries, with an error that names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from bench.errors import UserError


def engine(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Raises:
        UserError: it is not installed; the message gives the pip command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed: pip install 'slimbench[{extra}]'"
        ) from None
