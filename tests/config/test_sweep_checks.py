"""Every recipe and launcher that ships composes, and a recipe's alternatives pass the boundary."""

from pathlib import Path

import pytest
from hydra import compose
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper

from bench.config import sweep_checks
from bench.config.composition import compose_run_config, config_names, hydra_config_tree
from bench.config.overrides import Overrides
from bench.config.sweep_checks import (
    admit,
    alternative_configs,
    check_sweeper,
    every_config,
    single_runs,
)
from bench.errors import UserError

LAUNCHERS = sorted(
    p.stem for p in (Path(__file__).parents[2] / "conf/hydra/launcher").glob("*.yaml")
)


@pytest.mark.sample(1)
@pytest.mark.parametrize("recipe", config_names("sweep"))
def test_a_recipe_composes(recipe):
    sweep = Overrides.parse([f"sweep={recipe}"])
    assert admit(sweep).is_sweep
    found = alternative_configs(sweep)
    assert len(found) > 1
    # The recipe's own choice of a sweeper wins, so that its settings are those of its class.
    check_sweeper(sweep, found, admit(sweep).composed)
    # What is put into a composed config is what Hydra would have composed.
    last = single_runs(sweep)[-1]
    assert found[-1] == compose_run_config(last)


@pytest.mark.broad
def test_the_early_run_of_a_search_is_checked_and_has_one_benchmark():
    def checked(*more):
        sweep = Overrides.parse(["-m", "hydra/sweeper=optuna", "hydra.sweeper.study=s", *more])
        return check_sweeper(sweep, alternative_configs(sweep), admit(sweep).composed)

    early = checked("ratio=interval(0.1,0.2)", "hydra.sweeper.early_tasks=[piqa]")
    assert early.benchmark.tasks == ("piqa",) and not early.benchmark.perplexity
    assert checked("ratio=interval(0.1,0.2)") is None
    with pytest.raises(UserError, match="give each its own search"):
        checked("benchmark=camera_micro,nine_tasks_micro")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_is_a_plugin_of_ours_with_limits(launcher):
    with hydra_config_tree():
        asked = [f"hydra/launcher={launcher}"]
        own = compose("config", overrides=asked, return_hydra_config=True).hydra
        known = Plugins.instance().class_name_to_class
        assert issubclass(known[own.launcher["_target_"]], Launcher)
        assert issubclass(known[own.sweeper["_target_"]], Sweeper)
        if launcher == "local":
            return
        assert {"timeout_min", "mem_gb"} <= set(own.launcher)
        devices = {"devices", "gpus_per_node", "gpus_per_job", "parallel"}
        assert devices & set(own.launcher)


def test_a_single_run_is_no_sweep():
    assert not admit(Overrides.parse(["ratio=0.3"])).is_sweep
    assert admit(Overrides.parse(["experiment=demo"])).is_sweep
    assert admit(Overrides.parse(["-m", "ratio=0.1,0.2"])).is_sweep


def test_the_config_of_a_run_that_was_admitted_is_composed_once(monkeypatch):
    composed = []
    monkeypatch.setattr(
        sweep_checks, "hydra_compose", lambda *a, **k: composed.append(a) or compose(*a, **k)
    )
    words = ["model=micro_moe", "method=camera_p", "ratio=0.3"]
    overrides = Overrides.parse(words)
    (config,) = every_config(overrides, admit(overrides))
    assert len(composed) == 1
    assert config == compose_run_config(words)


@pytest.mark.parametrize(("words", "said"), [
    (["-m", "experiment=demo,camera_quantization"],
     "experiment=camera_quantization has its own sweep"),
    (["-m", "sweep=camera_p_grid,camera_q_grid"], "sweep=camera_q_grid has its own sweep"),
    (["-m", "experiment=null,demo"], "null is not a choice of a sweep"),
])  # fmt: skip
def test_a_sweep_through_sweeps_is_refused(words, said):
    """Hydra ran the first experiment's methods under the name of each."""
    with pytest.raises(UserError, match=said):
        admit(Overrides.parse(words))


@pytest.mark.parametrize("methods", ["dense,camera_p", "camera_p,reap", "[camera_p,rtn],reap"])
def test_a_knob_of_one_method_of_a_sweep_is_named_as_such(methods):
    words = ["-m", f"method={methods}", "method.camera_p.alpha=0.1,0.2"]
    with pytest.raises(UserError, match="only camera_p has it: sweep camera_p in a separate"):
        alternative_configs(Overrides.parse(words))
