"""Hardware by name: the files of `conf/hardware`, and `here`, the measured rates of this machine.

Rates are measured once and stored in the cache folder.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch
from pydantic import BaseModel
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from bench.data.digests import cache_folder
from bench.device.devices import describe_device, select_device, total_bytes
from bench.device.energy_counters import NvmlDevice, Unavailable
from bench.device.machine import measured_quietly
from bench.errors import unknown_name
from bench.estimation.hardware import (
    HERE,
    HardwareConfig,
    Utilisation,
    board_names,
    load_assumptions,
    load_board,
)
from bench.measurement.roofline import device_limits, fastest_seconds
from bench.ui import warn

_VERSION = 2
"""Increased with every change of the measurement, so that older figures are not used."""
_OPERATORS = 500
_LINK_BYTES = 2**28
_ATTEMPTS = 3
"""Maximum number of measurements while other processes disturb them."""
_PATIENCE_SECONDS = 5.0
"""Time after which a disturbed measurement is not repeated, since it may take a minute then."""
_known: dict[Path, BaseModel | None] = {}
"""Figures by their cache file, because runs of a process may have different numbers of threads."""
_Figures = TypeVar("_Figures", bound=BaseModel)


def hardware_names() -> list[str]:
    """Return the names of all boards, and `here`."""
    return [HERE, *board_names()]


def load_hardware(name: str) -> HardwareConfig:
    """Return a board by name; `here` measures this machine once and caches the result.

    Raises:
        UserError: the board does not exist (the nearest name is suggested), or its file is wrong.
    """
    if name == HERE:
        return measured_here()
    if name not in hardware_names():
        raise unknown_name("hardware", name, hardware_names())
    return load_board(name)


def measured_here() -> HardwareConfig:
    """Return this machine's figures, measured within two seconds or read from the cache folder.

    They are keyed by processor, GPU, threads and version of torch, each of which affects them.
    """
    found = measured_once("rates", lambda: _measure(select_device("auto")), HardwareConfig)
    assert found is not None  # they can be measured on any machine
    return found


def known_here() -> HardwareConfig | None:
    """Return this machine's figures if they have been measured before.

    `bench estimate` measures them. A run does not, because that takes seconds and would give better
    figures on an idle machine than on a busy one.
    """
    return known_figures("rates", HardwareConfig)


def measured_once(
    facts: str, measure: Callable[[], _Figures | None], kind: type[_Figures]
) -> _Figures | None:
    """Return the figures of this machine for `facts`; measure and cache them if necessary.

    Figures that cannot be measured are None and not cached.
    """
    known = known_figures(facts, kind)
    if known is not None:
        return known
    file = _file(facts)
    found, machine = measured_quietly(measure, select_device("auto"), _ATTEMPTS, _PATIENCE_SECONDS)
    _known[file] = found
    # Other processes slow everything, so figures measured beside them are not cached.
    if found is not None:
        if machine.fault is None:
            _remember(file, found)
        else:
            _warn_of_load(machine.fault)
    return found


def known_figures(facts: str, kind: type[_Figures]) -> _Figures | None:
    """Return the figures of this machine for `facts`, None if they have not been measured."""
    file = _file(facts)
    if file not in _known:
        _known[file] = _remembered(file, kind)
    return cast("_Figures | None", _known[file])


@functools.cache
def _warn_of_load(fault: str) -> None:
    warn(f"hardware=here: {fault} while it was measured, so estimates are too high")


def _remembered(file: Path, kind: type[_Figures]) -> _Figures | None:
    try:
        return kind.model_validate_json(file.read_text())
    except (OSError, ValueError):  # Invalid UTF-8 and pydantic's errors are ValueErrors.
        return None


def _remember(file: Path, found: BaseModel) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Written to another file and renamed, because two processes may measure at once.
        aside = file.with_suffix(f".{os.getpid()}")
        aside.write_text(found.model_dump_json(indent=1))
        aside.replace(file)
    except OSError:
        pass  # Without a writable cache, the next process measures again for two seconds.


def _file(facts: str) -> Path:
    """Return the cache file for figures of this machine in its current state."""
    # The number of threads is part of the facts, because it affects every rate of a CPU.
    machine = f"{_VERSION} {sorted(describe_device().items(), key=str)} {torch.__version__}"
    name = hashlib.sha256(f"{facts} {machine} {platform.node()}".encode()).hexdigest()[:16]
    return cache_folder("hardware") / f"{name}.json"


def _measure(device: torch.device) -> HardwareConfig:
    kind: Literal["cuda", "cpu"] = "cuda" if device.type == "cuda" else "cpu"
    # On a CPU without bfloat16 units, bfloat16 takes minutes where float32 takes a second.
    kinds = (torch.float32, torch.bfloat16) if kind == "cuda" else (torch.float32,)
    limits = {t: device_limits(device, t, torch.get_num_threads()) for t in kinds}
    main = limits[kinds[-1]]
    peak: dict[Literal["float32", "bfloat16", "float16"], float] = {
        "float32": limits[torch.float32].matrix_rate
    }
    if kind == "cuda":
        peak["bfloat16"] = peak["float16"] = main.matrix_rate
    assumed = load_assumptions()
    dtype = kinds[-1]
    return HardwareConfig(
        name=HERE,
        device=kind,
        peak=peak,
        bandwidth=main.bandwidth,
        memory=float(total_bytes(device)),
        link=_link(device),
        power=_power(device),
        utilisation=Utilisation(
            matrix=_range(share / main.matrix_rate for share in _product_rates(device, dtype)),
            attention=_range(s / main.matrix_rate for s in _attention_rates(device, dtype)),
            memory=_range(s / main.bandwidth for s in _stream_rates(device, dtype)),
            link=assumed["utilisation"]["link"],
        ),
        operator=_operator_seconds(device, dtype),
        request=assumed["request"],
        start=assumed["start"],
        disk=assumed["disk"],
    )


def _range(found: Iterable[float]) -> tuple[float, float]:
    values = list(found)
    return min(values), max(values)


_PRODUCTS = {
    "cpu": ((48, 512, 512), (256, 512, 1408), (1024, 512, 512), (512, 64, 512)),
    "cuda": ((64, 2048, 2048), (512, 2048, 1408), (4096, 2048, 2048), (8192, 4096, 4096)),
}
"""Rows, inputs and outputs of products, from those of an expert to those of a projection."""


def _product_rates(device: torch.device, dtype: torch.dtype) -> Iterator[float]:
    """Yield the FLOP/s of products of several shapes."""

    for rows, inputs, outputs in _PRODUCTS[device.type]:
        x_RC = torch.ones(rows, inputs, dtype=dtype, device=device)
        weight_OC = torch.ones(outputs, inputs, dtype=dtype, device=device)
        # Several products in a row, so that reading the clock does not matter.
        many = max(1, int(5e7 / (2 * rows * inputs * outputs)))
        seconds = fastest_seconds(device, partial(_repeat, partial(linear, x_RC, weight_OC), many))
        yield many * 2 * rows * inputs * outputs / seconds


def _attention_rates(device: torch.device, dtype: torch.dtype) -> Iterator[float]:
    """Yield the FLOP/s of causal attention, counting masked pairs, as in slimbench's FLOPs."""

    for batch, length, width in ((8, 128, 64), (1, 1024, 64), (16, 64, 32)):
        q_BHLd = torch.ones(batch, 8, length, width, dtype=dtype, device=device)
        call = partial(scaled_dot_product_attention, q_BHLd, q_BHLd, q_BHLd, is_causal=True)
        yield 4 * batch * 8 * length**2 * width / fastest_seconds(device, call)


def _stream_rates(device: torch.device, dtype: torch.dtype) -> Iterator[float]:
    """Yield the bytes/s, read and written, of elementwise operators in and out of caches."""

    for size in (2**18, 2**21, 2**23):
        x_N = torch.ones(size, dtype=dtype, device=device)
        for call, tensors in ((partial(torch.mul, x_N, x_N), 3), (partial(silu, x_N), 2)):
            yield tensors * size * dtype.itemsize / fastest_seconds(device, call)


def _operator_seconds(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return the seconds of an operator on one number: alone, and inside a module."""

    x_1C = torch.ones(1, 8, dtype=dtype, device=device)
    layer = torch.nn.Linear(8, 8, dtype=dtype, device=device).requires_grad_(False)
    alone = fastest_seconds(device, partial(_repeat, partial(torch.mul, x_1C, x_1C), _OPERATORS))
    inside = fastest_seconds(device, partial(_repeat, partial(layer, x_1C), _OPERATORS))
    return _range((alone / _OPERATORS, inside / _OPERATORS))


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def _link(device: torch.device) -> float | None:
    """Return the bytes/s of a copy from pinned host memory; None on a CPU."""
    if device.type != "cuda":
        return None
    host = torch.ones(_LINK_BYTES, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(host, device=device)
    return _LINK_BYTES / fastest_seconds(device, lambda: target.copy_(host))


def _power(device: torch.device) -> float | None:
    """Return the power limit of a GPU in W, None if unknown."""
    if device.type != "cuda":
        return None
    try:
        return NvmlDevice(device).power_limit()
    except Unavailable:
        return None


@functools.cache
def collecting_seconds() -> float:
    """Return the time of a garbage collection, which precedes each reading of memory.

    After the harnesses are imported, it searches a million objects.
    """
    began = time.perf_counter()
    gc.collect()
    return time.perf_counter() - began
