"""`bench prefetch`: download what a run needs, so that it works offline afterwards."""

from __future__ import annotations

from collections.abc import Iterator


def prefetch(overrides: list[str]) -> Iterator[str]:
    """Download the weights and data sets of a run, or of all runs of a sweep.

    Yields one line per item that is now on this machine.
    """
    from bench import evaluation
    from bench.alternatives import configs
    from bench.data import calibration, prompts
    from bench.models import loading

    seen: set[str] = set()
    for config in configs(overrides):
        lines = [f"model {config.model.name}: {loading.prefetch(config.model)}"]
        lines += evaluation.prefetch(config.benchmark)
        if config.uses_calibration:
            lines.append(calibration.prefetch(config.calibration))
        if config.uses_prompts:
            lines.append(prompts.prefetch(config.prompts))
        for line in lines:
            if line not in seen:
                seen.add(line)
                yield line
