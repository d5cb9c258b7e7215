"""Sweepers for grids and for lists of runs, whose jobs are planned before they are launched."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from bench.config.overrides import refuse_endless_grid, sweep_values
from bench.errors import UserError
from bench.sweeps.plan import plan_in
from bench.sweeps.status import left_by_others, unfinished_jobs


class LaunchingSweeper(Sweeper):  # type: ignore[misc]  # Hydra has no types
    """Sweeper that stores the configured launcher."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Store the objects that Hydra passes, and instantiate the launcher."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )


class GridSweeper(LaunchingSweeper):
    """Hydra's basic grid, stored in the sweep's plan so that it can be inspected and resumed.

    Unlike Hydra's own sweeper it does not compose every job up front: all alternatives have been
    validated before the sweep starts.
    """

    def __init__(
        self, max_batch_size: int | None, params: dict[str, str] | None, max_jobs: int
    ) -> None:
        """Take the grid of the config, the jobs per launch (null: all), and their maximum."""
        self.params = dict(params or {})
        self.max_batch_size, self.max_jobs = max_batch_size, max_jobs

    def sweep(self, arguments: list[str]) -> None:
        """Launch the jobs that are not done, in the order of the plan, until all have ended.

        Jobs that another process runs are waited for, and launched if it does not end them.
        """
        folder = Path(self.config.hydra.sweep.dir)
        plan = plan_in(folder).with_jobs(self.jobs(arguments), complete=True)
        missing, launched = unfinished_jobs(plan), 0
        while True:
            waiting = iter([list(job.overrides) for job in missing])
            while batch := list(itertools.islice(waiting, self.max_batch_size)):
                self.launcher.launch(batch, initial_job_idx=launched)
                launched += len(batch)
            missing = left_by_others(plan)
            if not missing:
                return

    def jobs(self, arguments: list[str]) -> list[list[str]]:
        """Return the overrides of every job; the command line wins over the config."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        configured = [f"{key}={values}" for key, values in self.params.items()]
        return grid_jobs(parser.parse_overrides([*configured, *arguments]), self.max_jobs)


class ListSweeper(GridSweeper):
    """Runs that are not a product of values: each is listed with its own overrides.

    bench run -m hydra/sweeper=list "hydra.sweeper.runs=[['method=dense'],['method=gptq']]"
    """

    def __init__(self, runs: Sequence[Sequence[str]]) -> None:
        """Take the overrides of each run."""
        super().__init__(max_batch_size=None, params=None, max_jobs=len(runs))
        self.runs = [list(run) for run in runs]

    def jobs(self, arguments: list[str]) -> list[list[str]]:
        """Return the overrides of each listed run, followed by those of the command line."""
        # Last, so that they take precedence.
        return [[*run, *arguments] for run in self.runs]


def grid_jobs(overrides: list[Override], max_jobs: int) -> list[list[str]]:
    """Return every combination of the values; the last key varies fastest.

    A later override of the same key wins, so that the command line wins over the config.

    Raises:
        UserError: an override is an interval, which only a search can sample, or there are more
            than `max_jobs` combinations.
    """
    values: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = [str(override.input_line)]
        elif override.is_discrete_sweep():
            values[key] = [f"{key}={value}" for value in sweep_values(override)]
        else:
            raise UserError(
                f"{override.input_line} is a continuous range, but a grid needs single values: "
                "list the values, or use a search (hydra/sweeper=optuna)"
            )
    refuse_endless_grid({key: len(texts) for key, texts in values.items()}, max_jobs)
    return [list(job) for job in itertools.product(*values.values())]
