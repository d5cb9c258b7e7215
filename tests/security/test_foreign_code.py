"""Code runs only from the packages that the user named, and from models on the list."""

import pytest

from bench.cli.main import main
from bench.config.composition import compose_run_config
from bench.config.overrides import Overrides
from bench.config.sweep_checks import single_runs
from bench.errors import UserError
from bench.security import refuse_foreign_code

REFUSED = "only code from"


@pytest.mark.parametrize("where", [
    "+method.camera_p.inner._target_=os.system",
    "+method.camera_p.list=[{a: {_target_: subprocess.run}}]",
    "+calibration.extra={_target_: os.system}",
    "method.camera_p._target_=os.system",
    "method.camera_p._target_=methodsx.camera.CameraP",
    "+model.extra={deep: [[{_target_: builtins.exec}]]}",
])  # fmt: skip
def test_a_target_outside_the_packages_is_refused_however_deep(where):
    with pytest.raises(UserError, match=REFUSED):
        compose_run_config(["method=camera_p", where])


@pytest.mark.parametrize("where", [
    "+hydra.callbacks.mine._target_=os.system",
    "hydra.launcher._target_=os.system",
    "hydra.sweeper._target_=os.system",
    "+hydra.job_logging.handlers.x.class=os.system",
])  # fmt: skip
def test_hydras_own_config_names_no_foreign_code_either(where):
    with pytest.raises(UserError, match=f"{REFUSED}|of Hydra's own config only"):
        single_runs(Overrides.parse(["-m", where]))


def test_a_package_that_the_user_names_may_run():
    refuse_foreign_code({"_target_": "mine.Method"}, ["methods", "mine"])
    with pytest.raises(UserError, match=r"os\.system"):
        refuse_foreign_code({"filters": {"x": {"()": "os.system"}}}, ["logging"])
    with pytest.raises(UserError, match=r"a\.0\.b\._target_=theirs\.Method"):
        refuse_foreign_code({"a": [{"b": {"_target_": "theirs.Method"}}]}, ["methods", "mine"])


def test_what_is_no_method_is_refused_even_from_a_named_package():
    target = "methods.baselines.expert_scores.ExpertTokenCounts"
    with pytest.raises(UserError, match="is not a"):
        compose_run_config(["method=camera_p", f"method.camera_p._target_={target}"])


@pytest.mark.parametrize(
    "override", ["model.allow_remote_code=true", "++model.allow_remote_code=true"]
)
def test_nobody_puts_a_model_on_the_list_in_passing(override, capsys, tmp_path):
    given = ["run", override, "model.trust_remote_code=true", f"results_dir={tmp_path}"]
    assert main(given) == 2
    assert "conf/model" in capsys.readouterr().err


def test_a_listed_model_still_needs_the_users_word_and_a_commit(capsys, tmp_path, own_code):
    given = ["model=own_code", "model.trust_remote_code=true", f"results_dir={tmp_path}"]
    assert main(["run", *own_code, *given]) == 2
    assert "commit of 40 hexadecimal digits" in capsys.readouterr().err


@pytest.mark.parametrize("text", [
    "benchmark.limit=!!python/object/apply:os.system [id]", "seed=!!python/name:os.system",
])  # fmt: skip
def test_values_build_no_objects(text, capsys, tmp_path):
    assert main(["run", text, f"results_dir={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "Traceback" not in said
