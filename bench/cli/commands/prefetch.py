"""`bench prefetch`: download what a run needs, so that it works offline afterwards."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from bench.cli.commands.table import runs_of_table
from bench.config.overrides import Overrides
from bench.config.sweep_checks import alternative_configs
from bench.data.calibration import prefetch_calibration
from bench.data.prompts import prefetch_prompts
from bench.errors import EXIT_DONE
from bench.evaluation import prefetch_benchmark
from bench.models.source import prefetch_model
from bench.ui import print_text


def prefetch_run(arguments: list[str]) -> Iterator[str]:
    """Download the weights and data sets of a run, or of all runs of a sweep.

    Yield one line per item once it is on this machine; runs of a sweep may repeat items.
    """
    overrides = Overrides.parse(arguments).without_repeats()
    for config in alternative_configs(overrides):
        yield f"model {config.model.name}: {prefetch_model(config.model)}"
        yield from prefetch_benchmark(config.benchmark)
        if config.uses_calibration:
            yield prefetch_calibration(config.calibration)
        if config.uses_prompts:
            yield prefetch_prompts(config.prompts)


def run_command(given: argparse.Namespace) -> int:
    """`bench prefetch KEY=VALUE ...`, or `bench prefetch TABLE ...`."""
    names = [word for word in given.overrides if "=" not in word and not word.startswith("~")]
    overrides = [word for word in given.overrides if word not in names]
    runs = runs_of_table(names[0], overrides) if names else [overrides]
    # Runs share models and data, which are reported once.
    reported: set[str] = set()
    for line in (line for run in runs for line in prefetch_run(run)):
        if line not in reported:
            print_text(line)
            reported.add(line)
    return EXIT_DONE
