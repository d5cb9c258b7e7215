"""A plan or a record may ask for code, and only the person at the keyboard can allow it."""

import pickle
import sys
from pathlib import Path

import pytest
from hydra import compose
from omegaconf import OmegaConf

import bench
from bench.cli.main import main
from bench.config.composition import compose_run_config, hydra_config_tree
from bench.config.gate import SHIPPED_HYDRA, check_plan, refuse_unplanned
from bench.config.overrides import Overrides
from bench.config.sweep_checks import Admitted, admit, admit_plan, alternative_configs
from bench.errors import UserError
from bench.runner.replay import recorded_config
from bench.sweeps import create_plan
from tests.records.test_store import make
from tests.runner.test_launch import SMALL, THIRD_PARTY

HERE = Path("results/sweeps/s")
NOT_SETTABLE = "of Hydra's own config only"


class Touch:
    """Unpickled, it leaves a file: code has run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """An installed package with a method and its config."""
    folder = tmp_path / "site" / "third_party_of_gate"
    (folder / "conf" / "method").mkdir(parents=True)
    (folder / "__init__.py").write_text(THIRD_PARTY)
    (folder / "conf" / "__init__.py").touch()
    (folder / "conf" / "method" / "nothing.yaml").write_text(
        "# @package method.nothing\n_target_: third_party_of_gate.Nothing\n"
    )
    monkeypatch.syspath_prepend(str(folder.parent))
    return ["packages=[methods,third_party_of_gate]",
            "hydra.searchpath=[pkg://third_party_of_gate.conf]"]  # fmt: skip


@pytest.mark.parametrize("override", [
    "+hydra.callbacks.x={_target_: pandas.read_pickle, filepath_or_buffer: x}",
    "+hydra.callbacks.x={_target_: hydra.utils.get_method, path: os.system}",
    "+hydra={callbacks: {x: {_target_: os.system}}}",
    "++hydra.job.env_set.LD_PRELOAD=/tmp/x.so", "hydra.job.env_copy=[HF_TOKEN]",
    "hydra.run.dir=/tmp/elsewhere", "hydra.sweep.dir=/tmp/elsewhere", "hydra.sweep.subdir=../..",
    "hydra.output_subdir=.hydra", "hydra.job.chdir=true", "hydra/job_logging=default",
    "+hydra.job_logging.handlers.x={class: logging.FileHandler, filename: /tmp/x}",
    "hydra.hydra_logging.root={handlers: [x]}", "hydra.help.template=x",
])  # fmt: skip
def test_of_hydras_own_config_a_list_can_be_set(override):
    with pytest.raises(UserError, match=NOT_SETTABLE):
        admit(Overrides.parse([override]))


@pytest.mark.parametrize("override", [
    "+hydra.launcher.x={_target_: hydra._internal.utils.os.system, command: id}",
    "+hydra.launcher.x=[{deep: {_target_: methods.camera.pruning.os.system}}]",
    "+hydra.sweeper.params={x: {_target_: logging.FileHandler}}",
    "hydra.launcher._target_=os.system", "hydra.sweeper._target_=methods.x",
    "+hydra.launcher.x='${oc.create:{_target_: os.system}}'",
    "+hydra.launcher.x='${${oc.env:HOME}:x}'",
    "hydra.launcher='${method}'", "+hydra.launcher.x='${method}'",
    "+experiment@hydra.callbacks.x=demo",
])  # fmt: skip
def test_a_launcher_or_sweeper_holds_plain_settings(override):
    with pytest.raises(UserError):
        admit(Overrides.parse(["method=camera_p", override]))


def test_what_acts_in_hydras_config_is_as_it_is_shipped():
    with hydra_config_tree():
        own = compose("config", return_hydra_config=True).hydra
    plain = OmegaConf.to_container(own, resolve=False)
    for key, expected in SHIPPED_HYDRA.items():
        node = plain
        for part in key.split("."):
            node = node[part]
        assert node == expected, key


@pytest.mark.parametrize("overrides", [
    ["-m", "model={allow_remote_code: true},{}"],
    ["-m", "hydra/sweeper=list", "hydra.sweeper.runs=[[+model.allow_remote_code=true]]"],
    ["-m", "hydra/sweeper=list", "hydra.sweeper.runs=[['+hydra.job.env_set.A=b']]"],
    ["-m", "+hydra.sweeper.params={'hydra.job.chdir': 'true,false'}"],
    ["experiment=../../tmp/evil"], ["method=[../../tmp/evil]"], ["hydra/launcher=../../evil"],
])  # fmt: skip
def test_no_run_of_a_sweep_and_no_choice_goes_round_the_gate(overrides):
    with pytest.raises(UserError):
        alternative_configs(Overrides.parse(overrides))


@pytest.mark.parametrize("overrides", [
    ["hydra/launcher=slurm", "hydra.launcher.setup=[module load cuda]", "-m", "seed=1,2"],
    ["hydra/launcher=joblib", "hydra.launcher.jobs=2", "-m", "seed=1,2", "hydra.verbose=true"],
    ["sweep=camera_p_pareto", "hydra.sweeper.trials=3"], ["experiment=demo"],
    ["results_dir=../elsewhere", "seed=3"], ["benchmark.data.arc_easy=../data/a.jsonl"],
])  # fmt: skip
def test_what_people_type_passes(overrides):
    assert isinstance(admit(Overrides.parse(overrides)), Admitted)


@pytest.mark.parametrize("asked", [
    "packages=[methods,os]", "++packages=[os]", "hydra.searchpath=[file:///tmp]",
    "model.trust_remote_code=true", "++model={trust_remote_code: true}", "tracker.entity=them",
    "hydra.launcher.setup=[curl example.org]", "hydra.launcher.additional_parameters={wrap: id}",
    "hydra.launcher.address=ray://example.org:1", "hydra.launcher.timeout_min='1\n id'",
    "hydra.sweeper.study=../../x", "seed='${oc.env:SEED}'",
    "model={trust_remote_code: true},{}",
])  # fmt: skip
def test_a_plan_asks_and_only_this_command_allows(asked):
    for arguments, runs in (([asked], []), ([], [[asked]])):
        if runs and "hydra." in asked:
            continue
        with pytest.raises(UserError, match="which no plan can allow"):
            check_plan(HERE, Overrides.parse(arguments), runs, [])
        check_plan(HERE, Overrides.parse(arguments), runs, [asked])
    with pytest.raises(UserError, match="resuming changes nothing"):
        refuse_unplanned(HERE, Overrides.parse(["seed=1"]), [["seed=2"]], [asked])


@pytest.mark.parametrize("asked", [
    "model=micro_moe", "hydra/launcher=joblib", "hydra.launcher.jobs=2", "seed=1,2", "seed=${seed}",
    "hydra.launcher.timeout_min=null", "hydra.sweeper.trials=3", "+method.x.y={a: [1]}",
    "hydra.sweeper.objectives=[maximize average]",
])  # fmt: skip
def test_a_plan_of_plain_things_needs_no_word(asked):
    check_plan(HERE, Overrides.parse(["-m", asked]), [], [])


@pytest.mark.parametrize("job", [
    ["+hydra.callbacks.x={_target_: os.system}"], ["hydra.searchpath=[file:///tmp]"],
    ["packages=[os]"], ["experiment=../../../tmp/evil"], ["+model.allow_remote_code=true"],
    ["seed='${oc.create:x}'"],
])  # fmt: skip
def test_a_planned_job_passes_the_same_gate(job):
    with pytest.raises(UserError):
        admit_plan(HERE, ["-m", "seed=1,2"], [["seed=1"], job], [])


@pytest.mark.parametrize("arguments", [["seed=1,2"], ["method=dense,camera_p"], ["seed=range(3)"]])
def test_a_plan_of_a_single_run_has_no_several_values(arguments):
    with pytest.raises(UserError, match="several values: add -m"):
        admit_plan(HERE, arguments, [], [])


def foreign_plan(results, arguments, jobs=()):
    plan = create_plan(results, arguments, None)
    return plan.with_jobs(jobs, complete=bool(jobs))


def test_resuming_a_foreign_plan_runs_no_pickle(tmp_path, capsys):
    proof, pickled = tmp_path / "proof", tmp_path / "x.pickle"
    pickled.write_bytes(pickle.dumps(Touch(str(proof))))
    code = f"+hydra.callbacks.x={{_target_: pandas.read_pickle, filepath_or_buffer: {pickled}}}"
    results = tmp_path / "results"
    foreign_plan(results, ["-m", "seed=1,2", code])
    assert main(["resume", "latest", "--results-dir", str(results)]) == 2
    assert NOT_SETTABLE in capsys.readouterr().err
    assert not proof.exists()
    assert pickle.loads(pickled.read_bytes()) is None
    assert proof.exists()


def test_a_resumed_plan_writes_where_it_lies(tmp_path, capsys):
    results = tmp_path / "results"
    foreign_plan(results, ["-m", *SMALL, "seed=1,2", f"results_dir={tmp_path / 'elsewhere'}"])
    assert main(["resume", "latest", "--results-dir", str(results)]) == 2
    assert "results_dir" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()


def test_methods_of_a_third_party_are_verified_and_exported_on_the_users_word(
    third_party, tmp_path, capsys
):
    results = tmp_path / "results"
    (record,) = bench.run([*SMALL, *third_party, "method=nothing", f"results_dir={results}"])
    for command in (["verify", record.id], ["export", record.id, str(tmp_path / "out")]):
        where = ["--results-dir", str(results)]
        assert main([*command, *where]) == 2
        said = capsys.readouterr().err
        assert "which no record can allow" in said
        assert all(allowed in said for allowed in third_party)
        assert main([*command, *third_party, *where]) == 0, capsys.readouterr().err
    rescore = ["rescore", record.id, "--results-dir", str(results)]
    assert main(rescore) == 2
    assert "which no record can allow" in capsys.readouterr().err
    # A run on images has no answers for a harness: it is refused for that, and not for its code.
    assert main([*rescore, *third_party]) == 2
    assert "cannot be scored again" in capsys.readouterr().err
    with pytest.raises(UserError, match="only packages"):
        recorded_config(record, ["seed=2"])


def test_resuming_needs_the_same_word(third_party, tmp_path, capsys):
    results = tmp_path / "results"
    arguments = ["-m", *SMALL, *third_party, "method=nothing", "seed=1", f"results_dir={results}"]
    bench.run(arguments)
    (folder,) = (results / "sweeps").iterdir()
    (folder / "jobs" / "00000.json").unlink()
    resume = ["resume", "latest", "--results-dir", str(results)]
    assert main(resume) == 2
    said = capsys.readouterr().err
    assert "which no plan can allow" in said
    assert main([*resume, *third_party]) == 0, capsys.readouterr().err


@pytest.fixture(scope="module")
def plain_config():
    return compose_run_config(["method=camera_p"]).plain()


def changed(record, **sections):
    config = {**record.config}
    for name, values in sections.items():
        config[name] = {**config[name], **values} if isinstance(values, dict) else values
    return record.model_copy(update={"config": config})


@pytest.mark.parametrize("sections", [
    {"packages": ["methods", "os"]}, {"model": {"trust_remote_code": True}},
    {"model": {"trust_remote_code": True, "allow_remote_code": True, "path": "model",
               "revision": "0" * 40}},
    {"packages": ["antigravity"], "method": {"camera_p": {"_target_": "antigravity.x"}}},
])  # fmt: skip
def test_a_record_widens_nothing(plain_config, sections):
    record = changed(make().model_copy(update={"config": plain_config}), **sections)
    with pytest.raises(UserError, match="which no record can allow"):
        recorded_config(record)


@pytest.mark.parametrize("knobs", [
    {"camera_p": {"_target_": "methods.baselines.expert_scores.ExpertTokenCounts"}},
    {"camera_p": {"inner": {"_target_": "os.system"}}}, {"x]": {}}, {"../../tmp/evil": {}},
])  # fmt: skip
def test_the_class_of_a_method_is_never_that_of_a_record(plain_config, knobs):
    stored = {**plain_config, "method": {**plain_config["method"], **knobs}}
    if "camera_p" in knobs:
        stored["method"]["camera_p"] = {**plain_config["method"]["camera_p"], **knobs["camera_p"]}
    record = make().model_copy(update={"config": stored})
    try:
        config = recorded_config(record)
    except UserError:
        return
    assert type(config.method["camera_p"]).__name__ == "CameraP"


def test_the_models_own_code_needs_the_list_the_word_and_the_folder(plain_config, own_code):
    record = make().model_copy(update={"config": plain_config})
    said = [*own_code, "model.trust_remote_code=true"]
    listed = compose_run_config([*own_code, "model=own_code"]).plain()["model"]
    asks = {**listed, "trust_remote_code": True, "revision": "0" * 40}
    assert recorded_config(changed(record, model=asks), said).model.allow_remote_code
    theirs = {**asks, "source": "them/evil", "allow_remote_code": True}
    assert not recorded_config(changed(record, model=theirs), said).model.allow_remote_code
    unlisted = {**asks, "name": "micro_moe"}
    assert not recorded_config(changed(record, model=unlisted), said).model.allow_remote_code
    local = changed(record, model={**asks, "path": "model"})
    with pytest.raises(UserError, match=r"model\.path=FOLDER"):
        recorded_config(local, said)
    allowed = recorded_config(local, [*said, "model.path=model"]).model
    assert (allowed.path, allowed.allow_remote_code) == ("model", True)


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a/b", "..\\evil"])
def test_the_name_of_a_task_is_no_path(name):
    with pytest.raises(UserError, match=r"benchmark\.tasks"):
        compose_run_config([f"benchmark.tasks=['{name}']"])


@pytest.mark.parametrize("words", [
    ["show", "\x1b[31mred"], ["run", "model=\x1b]0;title\x07x"], ["\x9b2J"],
    ["gc", "--results-dir", "\u202elive"], ["table", "\x1b[2Jx"],
])  # fmt: skip
def test_no_message_holds_a_control_character(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr()
    assert not set("\x1b\x9b\x07\u202e") & set(said.out + said.err)


@pytest.mark.parametrize(("overrides", "reason"), [
    (["method=camera_p", "method.camera_p.ratio=[0.1,0.2]"], "ratio"),
    (["seed=99999999999999999999999"], "seed"),
    (["method=camera_p", "+method.x={1: 2}"], "method"), (["objective='a\x07'"], "control"),
    (["costs.timing.max_seconds=inf"], "finite"), (["+method.'[x]'={a: 1}"], "method"),
])  # fmt: skip
def test_what_a_record_cannot_hold_is_refused_before_the_run(overrides, reason):
    with pytest.raises(UserError, match=reason):
        compose_run_config(overrides)


def test_a_method_with_a_list_for_a_ratio_is_refused_before_the_run(tmp_path, monkeypatch):
    folder = tmp_path / "several_ratios"
    (folder / "conf" / "method").mkdir(parents=True)
    (folder / "__init__.py").write_text(THIRD_PARTY + "    ratio: list[float] = [0.1, 0.2]\n")
    (folder / "conf" / "__init__.py").touch()
    (folder / "conf" / "method" / "several.yaml").write_text(
        "# @package method.several\n_target_: several_ratios.Nothing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    given = ["hydra.searchpath=[pkg://several_ratios.conf]", "packages=[several_ratios]"]
    with pytest.raises(UserError, match=r"method\.several\.ratio=\[0\.1, 0\.2\] is not one number"):
        compose_run_config([*given, "method=several"])


@pytest.mark.parametrize("group", ["experiment", "sweep"])
def test_no_config_file_names_packages_whose_code_may_run(group, tmp_path):
    (tmp_path / group).mkdir()
    (tmp_path / group / "mine.yaml").write_text(
        "# @package _global_\n# Mine.\npackages: [methods, antigravity]\n"
    )
    chosen = [f"hydra.searchpath=[file://{tmp_path}]", f"{group}=mine"]
    for call in (lambda words: admit(Overrides.parse(words)), compose_run_config):
        with pytest.raises(UserError, match="a config file cannot allow code; give packages="):
            call(chosen)
    assert "antigravity" not in sys.modules
    said = compose_run_config([*chosen, "packages=[methods]"])
    assert said.packages == ("methods",)
