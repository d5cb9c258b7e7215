"""`bench prefetch`: download what a run needs, so that it works offline afterwards."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from bench.errors import EXIT_DONE


def prefetch_run(overrides: list[str]) -> Iterator[str]:
    """Download the weights and data sets of a run, or of all runs of a sweep.

    Yields one line per item that is now on this machine.
    """
    from bench.config.sweep_checks import alternative_configs
    from bench.data import calibration, prompts
    from bench.evaluation import benchmark
    from bench.models import source

    seen: set[str] = set()
    for config in alternative_configs(overrides):
        lines = [f"model {config.model.name}: {source.prefetch_model(config.model)}"]
        lines += benchmark.prefetch_benchmark(config.benchmark)
        if config.uses_calibration:
            lines.append(calibration.prefetch_calibration(config.calibration))
        if config.uses_prompts:
            lines.append(prompts.prefetch_prompts(config.prompts))
        for line in lines:
            if line not in seen:
                seen.add(line)
                yield line


def run_command(given: argparse.Namespace) -> int:
    """`bench prefetch KEY=VALUE ...`, or `bench prefetch TABLE ...`."""
    from bench.cli.commands.table import runs_of_table

    named = [word for word in given.overrides if "=" not in word]
    rest = [word for word in given.overrides if word not in named]
    wanted = runs_of_table(named[0], rest) if named else [rest]
    # The runs of a table share models and data; each is reported once.
    said: set[str] = set()
    for line in (line for overrides in wanted for line in prefetch_run(overrides)):
        if line not in said:
            print(line)
            said.add(line)
    return EXIT_DONE
