"""Estimates against measured runs on this machine: phases inside their bounds, memory, width.

Part names: micro_moe, moe, micro_llava, micro_resnet, smollm2. Each runs dense and its methods, and
holds every phase above three seconds against the estimate that the record keeps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import bench
from bench.estimation.accuracy import Compared, compared_phases
from bench.records import Record
from tests.performance.figure import Figure
from tests.performance.random_models import build, tokenizer

LONGEST_UNCHECKED = 3.0
"""Seconds below which a phase is not held against its estimate."""
WIDTH = 2.0
MEMORY_ERROR = 0.15
RUNS = {
    "micro_moe": ("model=micro_moe", ("", "camera_p", "gptq")),
    "moe": ("", ("", "camera_p", "gptq")),
    "micro_llava": ("model=micro_llava benchmark=mllm_seven_micro", ("", "yopo_12")),
    "micro_resnet": ("model=micro_resnet benchmark=images", ("", "wgsef")),
    "smollm2": ("", ("", "gptq")),
}
SMOLLM2 = Path.home() / ".cache/slimbench/real/SmolLM2-135M-Instruct.Q4_1.gguf"


def figures(*parts: str) -> Iterator[Figure]:
    """Yield, per run, the worst phase, the widest bounds and the error of the peak memory."""
    for name in parts or RUNS:
        words, methods = RUNS[name]
        if name == "smollm2" and not SMOLLM2.is_file():
            continue
        with tempfile.TemporaryDirectory() as folder:
            if name == "moe":
                _save_random_moe(Path(folder) / "model")
                words = f"model=local model.path={folder}/model"
            if name == "smollm2":
                words = f"model=local model.path={SMOLLM2}"
            for method in methods:
                yield from _held(f"{name} {method or 'dense'}", _record(words, method, folder))


def _record(words: str, method: str, folder: str) -> Record:
    """Run and return the record; memory is measured, so that its peaks are there."""
    chosen = f"method={method}" if method else ""
    asked = f"{words} {chosen} costs.measure=[memory] tracker=none offline=true"
    # Runs do not measure a busy machine for themselves.
    bench.estimate(asked)
    (record,) = bench.run(f"{asked} results_dir={folder}")
    return record


def _held(name: str, record: Record) -> Iterator[Figure]:
    how = f"run {record.id}, one process"
    long = [
        each
        for each in compared_phases([record])
        if (each.measured or 0.0) > LONGEST_UNCHECKED or (each.low or 0.0) > LONGEST_UNCHECKED
    ]
    if not record.estimate:
        yield Figure(f"{name}: phases", 0, "above 0", False, "this machine's rates are not known")
    for each in long:
        yield Figure(
            f"{name}: {each.phase}", _distance(each), "0 outside", each.inside,
            f"{_seconds(each.measured)} in {_seconds(each.low)} to {_seconds(each.high)}; {how}",
        )  # fmt: skip
        yield Figure(
            f"{name}: {each.phase}, high / low", each.width, f"<= {WIDTH:g}",
            each.width <= WIDTH, how,
        )  # fmt: skip
    estimated = {each.phase: each.peak_bytes for each in record.estimate}
    for method in record.methods:
        if method.peak_bytes is None or f"applying {method.name}" not in estimated:
            continue
        # The record has what applying took on top of the networks that were there before.
        held = 2 * record.model.bytes
        error = estimated[f"applying {method.name}"] / (held + method.peak_bytes) - 1
        yield Figure(
            f"{name}: error of the peak memory", error, f"+-{MEMORY_ERROR:g}",
            abs(error) <= MEMORY_ERROR, how,
        )  # fmt: skip


def _distance(each: Compared) -> float:
    """Return 0 inside the bounds, else how far outside as a share of the nearer bound."""
    if each.measured is None or not each.low or not each.high:
        return float("inf")
    if each.measured < each.low:
        return each.measured / each.low - 1
    return max(0.0, each.measured / each.high - 1)


def _seconds(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f} s"


def _save_random_moe(folder: Path) -> None:
    words = tokenizer(["what the weather is like in the harbour of a small town"] * 50)
    model = build("moe", words)
    model.network.save_pretrained(folder)
    words.save_pretrained(folder)
