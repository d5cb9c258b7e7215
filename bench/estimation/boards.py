"""Boards by name: the files of `conf/hardware`, and this machine."""

from __future__ import annotations

import functools

from bench.errors import unknown_name
from bench.estimation import this_machine
from bench.estimation.hardware import FOLDER, HERE, HardwareConfig, load_assumptions, load_file


def hardware_names() -> list[str]:
    """Return the boards that there are, and `here`."""
    return [HERE, *sorted(f.stem for f in FOLDER.glob("*.yaml") if f.stem[0] != "_")]


@functools.cache
def load_hardware(name: str) -> HardwareConfig:
    """Return a board by name; `here` measures this machine once and remembers it.

    Raises:
        UserError: there is no such board; the nearest name is given.
    """
    if name == HERE:
        return this_machine.measured_here()
    if name not in hardware_names():
        raise unknown_name("hardware", name, hardware_names())
    return HardwareConfig.model_validate({**load_assumptions(), **load_file(name)})
