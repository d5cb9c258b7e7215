"""The command that a record keeps repeats its run."""

import shlex

import pytest

import bench
from bench.config.composition import compose_run_config

THIRD_PARTY = """
from bench.method import Method, MethodReport

class Nothing(Method):
    def check(self, structure): ...
    def apply(self, model, context): return MethodReport("none")
"""
SMALL = [
    "model=micro_lenet", "benchmark=images", "benchmark.limit=1", "threads=1", "tracker=none",
]  # fmt: skip


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """An installed package with a method and its config."""
    folder = tmp_path / "site" / "third_party"
    (folder / "conf" / "method").mkdir(parents=True)
    (folder / "__init__.py").write_text(THIRD_PARTY)
    (folder / "conf" / "__init__.py").touch()
    (folder / "conf" / "method" / "nothing.yaml").write_text(
        "# @package method.nothing\n_target_: third_party.Nothing\n"
    )
    monkeypatch.syspath_prepend(str(folder.parent))


@pytest.mark.sample(1)
@pytest.mark.parametrize("flags", [[], ["-m"]])
def test_the_search_path_is_part_of_a_runs_command(third_party, tmp_path, flags):
    given = ["hydra.searchpath=[pkg://third_party.conf]", "packages=[methods,third_party]"]
    (record,) = bench.run(
        [*flags, *SMALL, *given, "method=nothing", f"results_dir={tmp_path / 'results'}"]
    )
    assert list(compose_run_config(shlex.split(record.command)[2:]).method) == ["nothing"]


@pytest.mark.broad
def test_the_command_of_a_trial_repeats_it_alone(tmp_path):
    search = [
        "sweep=camera_p_pareto", "hydra.sweeper.trials=1", "hydra.sweeper.early_tasks=[]",
        "benchmark.tasks=[arc_easy]", "~benchmark.perplexity", "benchmark.limit=1",
        "calibration.rows=1", "costs.length=32", "tracker=none", f"results_dir={tmp_path}",
    ]  # fmt: skip
    (trial,) = bench.run(search)
    assert list(bench.run(shlex.split(trial.command)[2:])) == [trial]
    assert len(list((tmp_path / "sweeps").iterdir())) == 1
