"""The names under which Hydra finds slimbench's sweepers and launchers.

Hydra takes plug-ins from this namespace package only, and loads every module of it whenever it
starts, as a copy of its own: so what they do is in `bench.launchers`, and engines are imported
when they are used.
"""

from bench.launchers import calls, grid, processes, queue, ray_cluster, search


class PlannedSweeper(grid.Planned):
    """A grid, written down before its first job is launched."""


class ListedSweeper(grid.Listed):
    """Runs that are listed one by one, as `bench table` lists its cells'."""


class SearchSweeper(search.Search):
    """Optuna's trials, launched as jobs."""


class HereLauncher(calls.Here):
    """This process."""


class JoblibLauncher(processes.Processes):
    """Worker processes of this machine."""


class SubmititLauncher(queue.Queue):
    """Slurm, or its imitation on this machine."""


class RayLauncher(ray_cluster.Ray):
    """A Ray cluster, started here or there already."""
