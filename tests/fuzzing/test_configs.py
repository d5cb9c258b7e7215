"""Any combination of shipped groups composes and is looked at, or is refused in one sentence."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.cli.main import main
from bench.config.composition import compose_run_config, config_names
from bench.config.run_config import RunConfig
from bench.errors import UserError
from bench.runner.inputs import check_run
from bench.runner.session import Session

SMALL = ["micro_moe", "micro_llava", "micro_resnet", "micro_vgg", "micro_lenet", "micro_mobilenet"]
EMBEDDED = ["camera_micro", "mllm_seven_micro", "images", "nine_tasks_micro", "perplexity_micro"]
GROUPS = {
    "model": config_names("model"), "benchmark": config_names("benchmark"),
    "calibration": config_names("calibration"), "prompts": config_names("prompts"),
    "costs": config_names("costs"), "tracker": config_names("tracker"),
}  # fmt: skip
METHODS = config_names("method")

# One step of whatever trains or measures.
ONE_STEP = [
    "benchmark.limit=1", "benchmark.batch_size=1", "calibration.rows=1", "calibration.length=64",
    "prompts.count=1", "prompts.batch=1", "costs.length=16", "costs.words=4", "threads=1",
    "offline=true", "tracker=none",
]  # fmt: skip
thorough = os.environ.get("HYPOTHESIS_PROFILE") == "searching"
patient = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def chosen(groups, methods):
    return [*(f"{group}={name}" for group, name in groups.items()), f"method=[{','.join(methods)}]"]


any_groups = st.fixed_dictionaries(
    {group: st.sampled_from(names) for group, names in GROUPS.items()}
)
any_methods = st.lists(st.sampled_from(METHODS), max_size=2, unique=True)


@pytest.mark.broad
@settings(max_examples=300 if thorough else 12, suppress_health_check=patient)
@given(any_groups, any_methods)
def test_any_groups_compose_or_are_refused_in_a_sentence(groups, methods):
    try:
        config = compose_run_config(chosen(groups, methods))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(config, RunConfig)
        assert list(config.method) == methods


@pytest.mark.broad
@settings(max_examples=60 if thorough else 6, suppress_health_check=patient)
@given(st.sampled_from(SMALL), st.sampled_from(EMBEDDED), any_methods)
def test_small_models_are_fit_or_refused_before_anything_is_loaded(
    tmp_path, model, benchmark, methods
):
    given_words = chosen({"model": model, "benchmark": benchmark}, methods)
    try:
        config = compose_run_config([*given_words, *ONE_STEP, f"results_dir={tmp_path}"])
        check_run(config, Session())
    except UserError as error:
        assert "\n" not in str(error)
    assert not list(tmp_path.rglob("record.json"))


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=patient)
@given(st.sampled_from(SMALL), st.sampled_from(EMBEDDED), any_methods)
def test_small_models_run_one_step_or_are_refused(tmp_path, capsys, model, benchmark, methods):
    steps = [f"++method.{name}.recipe.epochs=1" for name in methods if has_recipe(name)]
    given_words = chosen({"model": model, "benchmark": benchmark}, methods)
    code = main(["run", *given_words, *ONE_STEP, *steps, f"results_dir={tmp_path}"])
    said = capsys.readouterr()
    assert code in (0, 2), said.err
    assert "Traceback" not in said.err
    if code == 2:
        assert said.err.count("\n") == 1


def has_recipe(method):
    """Whether a method trains for a number of epochs."""
    config = compose_run_config([f"method={method}", "model=micro_resnet", "benchmark=images"])
    return "recipe" in type(config.method[method]).model_fields
