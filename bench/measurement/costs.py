"""All costs of a run: counted before and after the methods, measured next to the dense model.

A number that cannot be obtained becomes a missing measurement with its reason. A model whose
weights were only zeroed or masked gets its times like any other, but no speed-up.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch
from torch import nn

from bench.data.chat import ModelInputs
from bench.device.devices import release_memory
from bench.device.memory import PeakMemory, is_out_of_memory
from bench.errors import UserError
from bench.measurement import energy, image_prompt, speedup
from bench.measurement.flops.cost_rows import count_call, flops_costs, prompt_flops_costs
from bench.measurement.model_size import (
    count_nonzero,
    count_padding,
    count_size,
    held_tensors,
    kv_cache_bytes,
    parameter_dtype,
    tensor_bytes,
)
from bench.measurement.quantities import (
    DECODE,
    FORWARD,
    PREFILL,
    CostReport,
    MeasuredPair,
    Measurements,
)
from bench.measurement.roofline import DeviceLimits, device_limits
from bench.measurement.workload import GenerationWorkload, Workload, workloads
from bench.models.bitpacking.packed_modules import count_parameters, packed_linears
from bench.models.network import stored_bytes
from bench.models.offload import is_offloaded
from bench.records.record import Cost, MissingMeasurement, SizeAndWork
from bench.schema import CostsConfig
from bench.ui import SILENT, Progress, format_quantity

if TYPE_CHECKING:
    from bench.models.model import Model


MAX_DISAGREEMENT = 0.01
"""Largest difference between an analytic and a counted number, relative to the counted one."""
ANALYTIC_QUANTITIES = {
    "flops": ("flops", "macs", "visual_flops"),
    "flops_causal": ("flops_causal", "macs_causal"),
}
"""Analytic quantities that are dropped together, by the one that is compared with the count."""


def count_costs(model: Model, config: CostsConfig, progress: Progress = SILENT) -> CostReport:
    """Count a model's size and the FLOPs of one forward at the config's shapes.

    For a vision-language model the prefill of one image prompt is timed as well, and the size of
    its KV cache is recorded.
    """
    found = CostReport()
    found.add(_size_costs(model))
    if model.config.kind == "image_text":
        _add_prompt_costs(found, model, config)
    else:
        found.add(flops_costs(model, config))
    return without_contradicted(found, progress)


def count_size_and_work(model: Model, config: CostsConfig) -> SizeAndWork:
    """Count parameters, bytes and the FLOPs of one forward, in the fastest possible way."""
    network, flops, reason = model.network, None, None
    try:
        counted = count_call(model, config)
        if counted.without_formula:
            reason = f"no formula for {', '.join(counted.without_formula)}"
        else:
            flops = float(counted.total)
    except UserError as error:
        reason = str(error)
    held = held_tensors(network)
    buffers = {id(tensor) for tensor in network.buffers()}
    return SizeAndWork(
        parameters=count_parameters(network),
        packed=sum(linear.numel for _, linear in packed_linears(network)),
        # A weight that became a plain attribute still takes its memory.
        bytes=stored_bytes(network) + tensor_bytes(t for t in held if id(t) not in buffers),
        flops=flops,
        reason=reason,
        held=sum(tensor.numel() for tensor in held),
        padding=count_padding(network),
        # Requires reading all weights, which takes minutes if they are on a disk.
        nonzero=None
        if is_offloaded(network)
        else count_nonzero(network) + sum(int(tensor.count_nonzero()) for tensor in held),
    )


def without_contradicted(found: CostReport, progress: Progress) -> CostReport:
    """Replace analytic numbers that the count contradicts by missing measurements, and warn."""
    # A formula covers only the changes for which it was written; the count sees what runs.
    values = {(c.scope, c.quantity, c.how): c.value for c in found.costs}
    report = CostReport(list(found.costs), list(found.missing))
    for (scope, quantity, how), analytic in values.items():
        counted = values.get((scope, quantity, "counted"))
        if quantity not in ANALYTIC_QUANTITIES or how != "analytic" or counted is None:
            continue
        if abs(analytic - counted) <= MAX_DISAGREEMENT * counted:
            continue
        dropped = ANALYTIC_QUANTITIES[quantity]
        report.costs = [
            c for c in report.costs
            if (c.scope, c.how) != (scope, "analytic") or c.quantity not in dropped
        ]  # fmt: skip
        reason = (
            f"{format_quantity(analytic)} by the formula, but {format_quantity(counted)} counted"
        )
        report.missing.append(
            MissingMeasurement(scope=scope, quantity=quantity, reason=reason, how="analytic")
        )
        progress.warn(f"no analytic {quantity.replace('_', ' ')} for {scope}: {reason}")
    return report


def _add_prompt_costs(report: CostReport, model: Model, config: CostsConfig) -> None:
    # A vision-language model runs for real, because methods that skip visual tokens decide by
    # values, which do not exist on the meta device.
    inputs = image_prompt.build_image_prompt(model, config.words)
    report.add(prompt_flops_costs(model, config, inputs))
    report.add(_prefill_costs(model, inputs))


def _size_costs(model: Model) -> Measurements:
    stored = model.quantization
    if stored is not None and not stored.dequantized:
        yield _counted("parameters", stored.parameters)
        yield _counted("bytes", stored.bytes, "B")
        reason = f"the weights are packed by {stored.method}"
        yield MissingMeasurement(
            scope="model", quantity="nonzero_parameters", reason=reason, how="counted"
        )
        yield MissingMeasurement(
            scope="model", quantity="active_parameters", reason=reason, how="analytic"
        )
        return
    size = count_size(model.network, model.structure)
    other = size.parameters - size.routed - size.shared
    parts = {"routed": size.routed, "shared": size.shared, "other": other}
    yield Cost(
        scope="model",
        quantity="parameters",
        unit="1",
        value=size.parameters,
        how="counted",
        parts=dict(parts),
    )
    yield _counted("nonzero_parameters", size.nonzero)
    # Analytic, because it assumes top-k of equally large experts instead of observing routing.
    yield Cost(
        scope="model", quantity="active_parameters", unit="1", value=size.active, how="analytic"
    )
    # In memory a dequantized checkpoint is dense; its savings are in its files.
    yield _counted("bytes", stored.bytes if stored else size.bytes, "B")


def _counted(quantity: str, value: float, unit: str = "1") -> Cost:
    return Cost(scope="model", quantity=quantity, unit=unit, value=value, how="counted")


def _prefill_costs(model: Model, inputs: ModelInputs) -> list[Cost]:
    lengths = image_prompt.prompt_tokens(model, inputs)
    scope = lengths.scope
    found = image_prompt.time_prefill(model, inputs)
    costs = [
        Cost(scope=scope, quantity="cache_bytes", unit="B", value=found.cache_bytes, how="counted"),
        Cost(
            scope=scope,
            quantity="seconds",
            unit="s",
            value=found.median,
            how="measured",
            parts=_min_and_max(found.seconds),
        ),
    ]
    if found.side_cache_bytes:
        costs.append(
            Cost(
                scope=lengths.token_scope,
                quantity="side_cache_bytes",
                unit="B",
                value=found.side_cache_bytes,
                how="counted",
            )
        )
    if found.overhead:
        middle, spread = statistics.median(found.overhead), _min_and_max(found.overhead)
        costs.append(
            Cost(
                scope=scope,
                quantity="method_seconds",
                unit="s",
                value=middle,
                how="measured",
                parts=spread,
            )
        )
    return costs


def _min_and_max(seconds: list[float]) -> dict[str, float]:
    return {"least": min(seconds), "most": max(seconds)}


def phase_costs(seconds: dict[str, float]) -> list[Cost]:
    """Return the wall time of each phase of a run as a cost."""
    return [
        Cost(scope=f"phase {name}", quantity="wall", unit="s", value=s, how="measured")
        for name, s in seconds.items()
    ]


def measure_costs(
    subject: MeasuredPair, config: CostsConfig, progress: Progress = SILENT
) -> CostReport:
    """Measure everything that the config lists, at every shape of its grid that fits the model."""
    found, model = CostReport(), subject.model
    if not config.measure:
        return found
    if "memory" in config.measure:
        disk = disk_bytes(model.network)
        found.costs.append(
            Cost(scope="model", quantity="disk_bytes", unit="B", value=disk, how="counted")
        )
    best = None
    if "roofline" in config.measure:
        best = _limits_of_device(model)
        found.add(_device_limit_costs(best, model))
    # Running out of memory ends one shape instead of the run: smaller shapes of the grid still give
    # numbers, and those of this shape from before the error are kept.
    for work in workloads(model, config.timing):
        if isinstance(work, MissingMeasurement):
            found.missing.append(work)
            continue
        progress.step(doing=f"measuring {work.shape}")
        try:
            found.add(_costs_at_shape(subject, work, config, best))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            found.missing.append(
                MissingMeasurement(
                    scope=work.shape, quantity="further cost", reason="out of memory"
                )
            )
        # Free cached blocks, so that fragments of one shape do not make the next one fail.
        release_memory(model.device)
    return found


def _costs_at_shape(
    subject: MeasuredPair, work: Workload, config: CostsConfig, best: DeviceLimits | None
) -> Measurements:
    if "latency" in config.measure:
        yield from speedup.speedup_costs(subject, work, config.timing, best)
    if "memory" in config.measure:
        yield from memory_costs(subject.model, work)
    if "energy" in config.measure:
        yield from energy.energy_costs(subject, work, config.timing.energy_seconds)


def _limits_of_device(model: Model) -> DeviceLimits | None:
    """Return the limits of the model's device, or None if it lacks the memory to measure them."""
    try:
        return device_limits(model.device, parameter_dtype(model.network), torch.get_num_threads())
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def _device_limit_costs(best: DeviceLimits | None, model: Model) -> Measurements:
    if best is None:
        yield MissingMeasurement(scope="device", quantity="roofline", reason="out of memory")
        return
    kind = str(parameter_dtype(model.network)).removeprefix("torch.")
    yield Cost(
        scope="device",
        quantity="matrix_rate",
        unit="FLOP/s",
        value=best.matrix_rate,
        how="measured",
        note=kind,
    )
    yield Cost(
        scope="device", quantity="copy_bandwidth", unit="B/s", value=best.bandwidth, how="measured"
    )


@torch.no_grad()
def memory_costs(model: Model, work: Workload) -> Measurements:
    """Yield the peak memory of each stage and the size of the KV cache, from separate calls.

    A peak is the size of the weights plus the call's allocations on top of the memory in use before
    it, as if the model were alone: the dense model in the same process does not count.
    """
    inputs, network = work.on(model.device), model.network
    if not isinstance(work, GenerationWorkload):
        with PeakMemory(model.device) as peak:
            work.forward(network, inputs)
        yield _peak_cost(network, f"{FORWARD} {work.shape}", peak)
        return
    with PeakMemory(model.device) as peak:
        output = work.forward(network, inputs)
    prefill, decode = f"{PREFILL} {work.shape}", f"{DECODE} {work.shape}"
    yield _peak_cost(network, prefill, peak)
    filled = kv_cache_bytes(output.past_key_values)
    # The cache of the prefill must be gone before the next baseline is taken.
    del output
    with PeakMemory(model.device) as peak:
        # Restart after the first token, so that decoding does not include the prefill's peak.
        cache = work.generate(network, inputs, lambda n: peak.restart() if n == 1 else None)
    yield _peak_cost(network, decode, peak)
    yield Cost(scope=prefill, quantity="cache_bytes", unit="B", value=filled, how="counted")
    # The last generated token is never an input, so the cache grows by new_tokens - 1.
    each = (kv_cache_bytes(cache) - filled) / (work.new_tokens - 1) / work.batch
    yield Cost(scope=decode, quantity="cache_bytes_per_token", unit="B", value=each, how="counted")


def disk_bytes(network: nn.Module) -> int:
    """Return the bytes of the weights in safetensors files, with tied weights counted once."""
    # Tied tensors share storage. Empty and meta tensors have no address and are compared by
    # identity.
    kept = {
        (tensor.data_ptr() if tensor.numel() and not tensor.is_meta else id(tensor)): tensor
        for tensor in network.state_dict(keep_vars=True).values()
    }
    return tensor_bytes(kept.values())


def _peak_cost(network: nn.Module, scope: str, peak: PeakMemory) -> Cost:
    weights = stored_bytes(network)
    parts = {"weights": float(weights), "above": float(peak.above)}
    return Cost(
        scope=scope,
        quantity="peak_bytes",
        unit="B",
        value=weights + peak.above,
        how="measured",
        parts=parts,
        note=peak.how,
    )
