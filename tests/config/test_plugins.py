"""Plug-ins: what entry points and a project file declare, and who has to agree to it."""

import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from bench import plugins
from bench.cli.main import main
from bench.config.composition import compose_run_config, config_names
from bench.errors import UserError
from bench.estimation.boards import hardware_names, load_hardware
from bench.plugins import active, read_project
from bench.reporting.terminal_views import list_configs

METHOD = """
from bench.method import Method, MethodReport, RecipeConfig

class Halve(Method):
    \"\"\"Half of everything.\"\"\"
    ratio: float = 0.5
    units: list[str] = ["a"]
    target: int

    def check(self, structure):
        pass

    def apply(self, model, context):
        return MethodReport("none")

class Unchecked(Method):
    def apply(self, model, context):
        return MethodReport("none")

class Stranger:
    pass

class Training(Halve):
    recipe: RecipeConfig = RecipeConfig()
    data: str = "digits"
    unit: str = "groups"
    target: int = 1
"""


@pytest.fixture(autouse=True)
def own_consents(tmp_path, monkeypatch):
    """No consent, entry point or import path of another test or of this machine's user."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(plugins.PROJECT_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for cached in (plugins.installed, plugins._tell_untrusted):
        cached.cache_clear()
    yield
    plugins.installed.cache_clear()
    for name in [name for name in sys.modules if name.startswith("halving")]:
        del sys.modules[name]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a project file, entered by a folder below it."""
    folder = tmp_path / "project"
    (folder / "settings" / "benchmark").mkdir(parents=True)
    (folder / "inner").mkdir()
    (folder / "halving.py").write_text(METHOD)
    (folder / "settings" / "benchmark" / "one_task.yaml").write_text(
        "# One task.\ndefaults: [nine_tasks_micro, _self_]\nname: one_task\ntasks: [arc_easy]\n"
    )
    file = folder / "slimbench.toml"
    file.write_text('configs = ["settings"]\n[methods]\nhalve = "halving:Halve"\n')
    monkeypatch.chdir(folder / "inner")
    return file


def test_a_project_counts_after_consent_and_until_its_file_changes(project, caplog):
    assert "halve" not in config_names("method")
    assert "halving" not in sys.modules
    assert main(["trust"]) == 0
    assert active().methods == {}  # nobody confirmed
    assert main(["trust", "--yes"]) == 0
    assert "halve" in config_names("method")
    assert "one_task" in config_names("benchmark")
    config = compose_run_config(["method=halve", "method.halve.target=3", "benchmark=one_task"])
    assert config.method["halve"].model_dump() == {"ratio": 0.2, "units": ["a"], "target": 3}
    assert config.benchmark.tasks == ("arc_easy",)
    project.write_text(project.read_text() + "\n")
    with pytest.raises(UserError, match="'halve'"):
        compose_run_config(["method=halve"])


def test_a_training_without_a_config_file_follows_the_recipe_and_images_of_the_run(project):
    text = project.read_text().replace("halving:Halve", "halving:Training")
    project.write_text(text)
    plugins.trust(project)
    given = ["model=micro_lenet", "benchmark=images", "benchmark.images.data=mnist_5k"]
    given += ["recipe.epochs=3", "unit=macs", "method=halve", "method.halve.recipe.rate=0.5"]
    halve = compose_run_config(given).method["halve"]
    assert (halve.recipe.epochs, halve.recipe.rate) == (3, 0.5)
    assert (halve.data, halve.unit) == ("mnist_5k", "macs")


def test_a_board_of_a_plug_in_is_found_and_a_wrong_one_is_one_sentence(project):
    plugins.trust(project)
    folder = project.parent / "settings" / "hardware"
    folder.mkdir()
    board = "name: mine\ndevice: cpu\npeak: {float32: 1e12}\nbandwidth: 1e11\n"
    folder.joinpath("mine.yaml").write_text(board + "memory: 8e9\n")
    assert "mine" in hardware_names()
    assert load_hardware("mine").memory == 8e9
    assert load_hardware("mine").utilisation == load_hardware("h100").utilisation
    for content, said in ((board, r"mine\.yaml: memory: field required"), ("[", "as YAML")):
        folder.joinpath("mine.yaml").write_text(content)
        with pytest.raises(UserError, match=said):
            load_hardware("mine")
    folder.joinpath("mine.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(UserError, match="as YAML: UnicodeDecodeError"):
        load_hardware("mine")


def test_a_name_that_an_untrusted_project_may_add_says_how_to_allow_it(project):
    with pytest.raises(UserError, match="adds 'halve', allow it with `bench trust"):
        compose_run_config(["method=halve"])


def test_a_project_that_nobody_trusts_is_named_once(project, capsys, monkeypatch):
    monkeypatch.setenv("BENCH_LOG_LEVEL", "INFO")
    for _ in range(2):
        config_names("method")
    said = capsys.readouterr().err
    assert said.count("is not trusted") == 1
    assert str(project) in said


def test_the_environment_names_a_project_or_none(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert active() == plugins.installed()
    monkeypatch.setenv(plugins.PROJECT_VARIABLE, str(project))
    assert active().methods == {"halve": "halving:Halve"}
    assert plugins.project_in_use() == str(project)
    monkeypatch.setenv(plugins.PROJECT_VARIABLE, "")
    monkeypatch.chdir(project.parent)
    assert active() == plugins.installed()
    monkeypatch.setenv(plugins.PROJECT_VARIABLE, str(tmp_path / "none.toml"))
    with pytest.raises(UserError, match="no such file"):
        active()


def test_nothing_in_a_project_hides_an_installed_package(project, monkeypatch):
    monkeypatch.setenv(plugins.PROJECT_VARIABLE, str(project))
    before = list(sys.path)
    active()
    active()
    assert sys.path == [*before, str(project.parent)]


def test_configs_and_classes_are_described(project, monkeypatch):
    monkeypatch.setenv(plugins.PROJECT_VARIABLE, str(project))
    described = {row["benchmark"]: row["about"] for row in list_configs("benchmark")}
    assert described["one_task"] == "One task."
    described = {row["method"]: row["about"] for row in list_configs("method")}
    assert described["halve"] == "halving:Halve, a plug-in"


def test_consents_are_kept_side_by_side_and_outlive_damage(project, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text("")
    plugins.trust(project)
    plugins.trust(other)
    assert plugins.is_trusted(project)
    assert plugins.is_trusted(other)
    assert len(json.loads(plugins.consents_file().read_text())) == 2
    plugins.consents_file().write_text("[")
    assert not plugins.is_trusted(project)


@pytest.mark.parametrize(("content", "said"), [
    ("packages", "is no TOML"), ('package = ["a"]', "did you mean 'packages'"),
    ('packages = "a"', "is not a list of strings"),
    ('packages = ["a.b"]', "not the name of a top-level"),
    ('packages = ["os"]', "is Python's or slimbench's own"),
    ('packages = ["bench"]', "is Python's or slimbench's own"),
    ('configs = ["missing"]', "missing is not a folder"), ('path = ["missing"]', "is not a folder"),
    ('methods = ["a"]', "is not a table"),
    ('[methods]\n"a.b" = "a:B"', "is not a valid name of a method"),
    ('[methods]\na = "a.B"', "is not a class, as in"), ('[methods]\na = "os:system"', "Python's"),
    ('[methods]\ncamera_p = "a:B"', "slimbench has a method 'camera_p'"),
    ("# " + "x" * plugins.MAX_BYTES, "is larger than"), ("\xff", "TOML"),
])  # fmt: skip
def test_a_wrong_project_file_is_one_sentence(content, said, tmp_path):
    file = tmp_path / "slimbench.toml"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=said):
        read_project(file)


def test_a_config_by_a_name_of_slimbench_is_refused(project):
    group = project.parent / "settings" / "method"
    group.mkdir()
    (group / "camera_p.yaml").write_text("ratio: 1\n")
    with pytest.raises(UserError, match="slimbench has a config of this name"):
        read_project(project)


@pytest.mark.parametrize(("target", "said"), [
    ("halving:Unchecked", r"Unchecked \(.*halving\.py:16\) does not define check"),
    ("halving:Stranger", r"derive Stranger \(.*halving\.py:20\) from it"),
    ("halving:Missing", "halving has no class Missing"),
    ("halving_absent:Halve", "ModuleNotFoundError: No module named 'halving_absent'"),
    ("halving_broken:Halve", r"ZeroDivisionError: division by zero \(.*halving_broken\.py:2\)"),
    ("halving_unparsed:Halve", r"SyntaxError: .*\(.*halving_unparsed\.py:1\)"),
])  # fmt: skip
def test_a_class_at_fault_is_named_with_its_line(project, monkeypatch, target, said):
    monkeypatch.setenv(plugins.PROJECT_VARIABLE, str(project))
    (project.parent / "halving_broken.py").write_text("\n1 / 0\n")
    (project.parent / "halving_unparsed.py").write_text("def\n")
    project.write_text(f'[methods]\nfaulty = "{target}"\n')
    with pytest.raises(UserError, match=said):
        compose_run_config(["method=faulty"])


def declare(monkeypatch, **groups):
    """Let these groups of entry points be all that is installed."""
    points = {
        group: [EntryPoint(name, value, group) for name, value in named.items()]
        for group, named in groups.items()
    }
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: points.get(group.rpartition(".")[2], [])
    )
    plugins.installed.cache_clear()


def test_installed_packages_need_no_consent(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = project.parent / "halving_package"
    (package / "conf" / "method").mkdir(parents=True)
    (package / "__init__.py").write_text(METHOD)
    (package / "conf" / "method" / "halve_twice.yaml").write_text(
        "# @package method.halve_twice\n_target_: halving_package.Halve\ntarget: 2\n"
    )
    monkeypatch.syspath_prepend(str(project.parent))
    declare(monkeypatch, conf={"x": "halving_package.conf"}, methods={"halve": "halving:Halve"})
    assert {"halve", "halve_twice"} <= set(config_names("method"))
    assert list(compose_run_config(["method=halve_twice"]).method) == ["halve_twice"]
    assert active().packages == ("halving_package", "halving")


@pytest.mark.parametrize(("groups", "said"), [
    ({"conf": {"x": "halving_nowhere.conf"}}, "is not a folder of an installed package"),
    ({"methods": {"x": "halving.Halve"}}, "entry point slimbench.methods of x"),
    ({"methods": {"camera_p": "halving:Halve"}}, "slimbench has a method 'camera_p'"),
])  # fmt: skip
def test_a_wrong_entry_point_is_one_sentence(monkeypatch, groups, said):
    declare(monkeypatch, **groups)
    with pytest.raises(UserError, match=said):
        active()


def test_a_project_and_installed_packages_add_up(project, monkeypatch):
    monkeypatch.setenv(plugins.PROJECT_VARIABLE, str(project))
    declare(monkeypatch, methods={"halve": "elsewhere:Halve", "third": "elsewhere:Third"})
    # The installed one first: a folder must not change what a name means.
    assert active().methods == {"halve": "elsewhere:Halve", "third": "elsewhere:Third"}
    assert set(active().packages) == {"elsewhere", "halving"}


def test_the_example_declares_one_thing_in_both_ways():
    import tomllib

    folder = Path(__file__).parents[2] / "examples" / "plugin"
    points = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["entry-points"]
    found = read_project(folder / "slimbench.toml")
    assert points["slimbench.methods"] == found.methods
    (config_package,) = points["slimbench.conf"].values()
    assert found.configs == (folder.joinpath(*config_package.split(".")),)
