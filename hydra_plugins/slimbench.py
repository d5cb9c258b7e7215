"""Names under which Hydra finds slimbench's sweepers and launchers.

Hydra discovers plug-ins in this namespace package only, and whenever it starts it loads every
module of it as a separate copy. The implementations are therefore in `bench.launchers`, and
optional libraries are imported when they are used.
"""

from bench.launchers import calls, grid, processes, queue, ray_cluster, search


class PlannedSweeper(grid.Planned):
    """Grid whose plan is written before its first job is launched."""


class ListedSweeper(grid.Listed):
    """Runs listed one by one, as `bench table` does for the cells of a table."""


class SearchSweeper(search.Search):
    """Optuna search whose trials are launched as jobs."""


class HereLauncher(calls.Here):
    """Jobs in this process."""


class JoblibLauncher(processes.Processes):
    """Jobs in worker processes of this machine."""


class SubmititLauncher(queue.Queue):
    """Jobs on Slurm, or in processes of this machine through submitit."""


class RayLauncher(ray_cluster.Ray):
    """Jobs on a Ray cluster, started on this machine or an existing one."""
