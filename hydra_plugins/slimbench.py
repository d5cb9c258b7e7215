"""Names under which Hydra finds slimbench's sweepers, launchers and source of models.

Hydra discovers plug-ins in this namespace package only, and whenever it starts it loads every
module of it as a separate copy. The implementations are therefore in `bench.sweeps.launchers`, and
optional libraries are imported when they are used.
"""

from bench.config import composition, overrides
from bench.sweeps import grid_sweeper, optuna_sweeper
from bench.sweeps.launchers import joblib_pool, local, ray_cluster, slurm_array


class GridSweeper(grid_sweeper.GridSweeper):
    """Grid whose plan is written before its first job is launched."""


class ListSweeper(grid_sweeper.ListSweeper):
    """Runs listed one by one, as `bench table` does for the cells of a table."""


class OptunaSweeper(optuna_sweeper.OptunaSweeper):
    """Optuna search whose trials are launched as jobs."""


class LocalLauncher(local.LocalLauncher):
    """Jobs in this process."""


class JoblibLauncher(joblib_pool.JoblibLauncher):
    """Jobs in worker processes of this machine."""


class SubmititLauncher(slurm_array.SubmititLauncher):
    """Jobs on Slurm, or in processes of this machine through submitit."""


class RayLauncher(ray_cluster.RayLauncher):
    """Jobs on a Ray cluster, started on this machine or an existing one."""


class ModelNames(overrides.ModelNames):
    """Configs of models that are given by hub id, folder or file."""


class PluginMethods(composition.PluginMethods):
    """Configs of methods that plug-ins declare without a file."""


class SearchPath(composition.SearchPath):
    """The places of these sources, and of plug-ins' configs, in Hydra's search path."""
