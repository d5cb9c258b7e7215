"""A Hydra sweeper for runs that are no product: each is listed with its own overrides.

    bench run -m hydra/sweeper=listed "hydra.sweeper.runs=[['method=dense'],['method=gptq']]"

Hydra finds it because it lies in the `hydra_plugins` namespace; any launcher carries the jobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf

if TYPE_CHECKING:
    from hydra.plugins.launcher import Launcher
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig


class ListedSweeper(Sweeper):  # type: ignore[misc]  # Hydra has no types
    """Launch one job per entry of `runs`, each with the overrides of the command line as well."""

    def __init__(self, runs: Sequence[Sequence[str]]) -> None:
        self.runs = [list(run) for run in runs]
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Remember the config and build the launcher that it names."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launch all runs at once; what is given on the command line wins over a run's own."""
        assert self.config is not None
        assert self.launcher is not None
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        jobs = [[*run, *arguments] for run in self.runs]
        self.validate_batch_is_legal(jobs)
        return self.launcher.launch(jobs, initial_job_idx=0)
