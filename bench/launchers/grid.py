"""The grid sweeper: writes down all jobs of a sweep first, then launches what is not done."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from bench.errors import UserError
from bench.launchers.launching import Launching
from bench.sweep import Plan, unfinished
from bench.sweep.plan import read


class Planned(Launching):
    """Hydra's own grid, kept in the sweep's plan, so that it can be looked at and gone on with.

    Jobs are not composed a second time to see whether that works: every alternative has passed
    the boundary already.
    """

    def __init__(self, max_batch_size: int | None, params: dict[str, str] | None) -> None:
        """Take the recipe's grid, and how many jobs the launcher is given at once (null: all)."""
        self.params = dict(params or {})
        self.max_batch_size = max_batch_size

    def sweep(self, arguments: list[str]) -> Any:
        """Launch the jobs that are neither done nor being worked on, in the plan's order."""
        folder = Path(self.config.hydra.sweep.dir)
        plan = read(folder) or Plan(folder, (), str(Path.cwd()), "")
        plan = plan.with_jobs(self.jobs(arguments), complete=True)
        waiting = iter([list(job.overrides) for job in unfinished(plan)])
        launched = 0
        while batch := list(itertools.islice(waiting, self.max_batch_size)):
            self.launcher.launch(batch, initial_job_idx=launched)
            launched += len(batch)

    def jobs(self, arguments: list[str]) -> list[list[str]]:
        """Return the overrides of every job; what is given on the command line wins."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        recipe = [f"{key}={values}" for key, values in self.params.items()]
        return grid(parser.parse_overrides([*recipe, *arguments]))


class Listed(Planned):
    """Runs that are no product: each is listed with its own overrides.

    bench run -m hydra/sweeper=listed "hydra.sweeper.runs=[['method=dense'],['method=gptq']]"
    """

    def __init__(self, runs: Sequence[Sequence[str]]) -> None:
        """Take the runs."""
        super().__init__(max_batch_size=None, params=None)
        self.runs = [list(run) for run in runs]

    def jobs(self, arguments: list[str]) -> list[list[str]]:
        """Return the listed runs, each with the arguments of the command line as well."""
        return [[*run, *arguments] for run in self.runs]


def grid(asked: list[Override]) -> list[list[str]]:
    """Return every combination of the values, the last key changing first.

    What is given later for the same key counts, so that the command line wins over a recipe.

    Raises:
        UserError: a range without steps, which only a search can go through.
    """
    values: dict[str, list[str]] = {}
    for override in asked:
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = [str(override.input_line)]
        elif override.is_discrete_sweep():
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            raise UserError(
                f"{override.input_line} has no steps: a grid needs choices, "
                "a search (hydra/sweeper=search) takes ranges"
            )
    return [list(job) for job in itertools.product(*values.values())]
