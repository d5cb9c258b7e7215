""""""

import pytest

from bench.config.composition import compose_run_config, config_names
from bench.config.overrides import Overrides
from bench.config.sweep_checks import alternative_configs
from bench.errors import UserError


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "org" / "here").mkdir(parents=True)
    return tmp_path


def model(*overrides):
    return compose_run_config(overrides).model


@pytest.mark.parametrize(
    "value", ["Qwen/Qwen2.5-0.5B", "HuggingFaceTB/SmolLM2-135M", "a/b", "0-x/y_z.v1"]
)
def test_a_hub_id_is_a_model(value):
    found = model(f"model={value}", "model.revision=v1")
    assert (found.name, found.source, found.path, found.revision) == (value, value, None, "v1")


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("mine", "mine"),
        ("./mine", "mine"),
        ("./mine/", "mine"),
        ("org/here", "here"),
        ("missing.gguf", "missing"),
        ("deep/down/Model-Q4_1.gguf", "Model-Q4_1"),
        ("./nowhere", "nowhere"),
        ("./mine/../data", "data"),
    ],
)
def test_a_path_is_a_model(value, name):
    found = model(f"model={value}")
    assert (found.source, found.path, found.name) == ("local", value, name)


def test_an_absolute_path_is_a_model(own_folder):
    assert model(f"model={own_folder / 'mine'}").path == str(own_folder / "mine")


def test_the_same_folder_is_the_same_run_however_it_is_given():
    short = compose_run_config(["model=./mine"]).identity()
    assert (
        short
        == compose_run_config(["model=local", "model.path=mine", "model.name=mine"]).identity()
    )


def test_a_config_comes_before_a_folder_of_its_name(own_folder):
    (own_folder / "micro_moe").mkdir()
    (own_folder / "micro_moe" / "config.json").write_text("{}")
    assert model("model=micro_moe").source == "embedded:micro_moe"


@pytest.mark.parametrize("value", ["micro_mo", "data", "a/b/c", "a//b", "-x/y"])
def test_anything_else_is_unknown(value):
    with pytest.raises(UserError, match=r"unknown model .*or a hub id as ORG/NAME") as raised:
        model(f"model={value}")
    assert repr(value) in str(raised.value)


def test_a_typing_error_is_answered_with_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'micro_moe'"):
        model("model=micro_mo")


def test_a_sweep_goes_through_all_kinds():
    overrides = Overrides.parse(["-m", "model=a/b,micro_moe,./mine", "seed=1,2"])
    names = [config.model.name for config in alternative_configs(overrides)]
    assert set(names) == {"a/b", "micro_moe", "mine"}


def test_only_files_are_listed():
    assert "hub" in config_names("model")
    assert not any("/" in name for name in config_names("model"))


def test_an_adapter_is_part_of_the_name_once():
    found = model("model=a/b", "model.adapter=./french")
    assert found.name == "a/b+french"
    assert type(found)(**found.model_dump()).name == "a/b+french"
    assert model("model=a/b", "model.adapter=me/lora").name == "a/b+lora"
