"""The grid sweeper: writes down all jobs of a sweep first, then launches what is not done."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from bench.sweep import unfinished
from bench.sweep.plan import Plan, read


class Planned(BasicSweeper):  # type: ignore[misc]
    """Hydra's own grid, kept in the sweep's plan, so that it can be looked at and gone on with.

    Jobs are not composed a second time to see whether that works: every alternative has passed
    the boundary already.
    """

    def sweep(self, arguments: list[str]) -> Any:
        """Launch the jobs that are neither done nor being worked on, in the plan's order."""
        assert self.config is not None and self.launcher is not None and self.hydra_context
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        asked = parser.parse_overrides([*self._parse_config(), *arguments])
        (grid,) = self.split_arguments(asked, None)
        folder = Path(self.config.hydra.sweep.dir)
        plan = read(folder) or Plan(folder, (), str(Path.cwd()), "")
        plan = plan.with_jobs(grid, complete=True)
        waiting = iter([list(job.overrides) for job in unfinished(plan)])
        launched = 0
        while batch := list(islice(waiting, self.max_batch_size)):
            self.launcher.launch(batch, initial_job_idx=launched)
            launched += len(batch)
        return None
