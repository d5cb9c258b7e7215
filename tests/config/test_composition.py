"""Composition: order of methods, shared ratio, sweeps, identity, and what is refused."""

import pytest
from hydra import compose as hydra_compose
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from bench.config.composition import compose_run_config, config_names, hydra_config_tree
from bench.config.overrides import Overrides
from bench.config.run_config import validate
from bench.config.sweep_checks import alternative_configs, single_runs
from bench.errors import UserError
from bench.security import CONFIG_DIR


def test_methods_keep_their_order():
    assert list(compose_run_config(["method=[camera_p,random_experts]"]).method) == [
        "camera_p", "random_experts",
    ]  # fmt: skip
    assert list(compose_run_config(["method=[random_experts,camera_p]"]).method) == [
        "random_experts", "camera_p",
    ]  # fmt: skip
    assert compose_run_config(["method=dense"]).method == {}
    assert compose_run_config([]).method == {}


def test_the_shared_ratio_reaches_every_method_and_its_own_wins():
    config = compose_run_config(
        ["method=[camera_p,random_experts]", "ratio=0.6", "method.camera_p.ratio=0.1"]
    )
    assert config.method["camera_p"].ratio == 0.1
    assert config.method["random_experts"].ratio == 0.6


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "overrides",
    [
        ["results_dir=/elsewhere"],
        ["tracker=none"],
        ["force=true"],
        ["offline=true"],
        ["threads=1"],
        ["ratio=0.6"],
        ["calibration=english"],
        ["objective=arc_easy"],
    ],
)
def test_what_does_not_decide_the_dense_result_is_not_in_its_identity(overrides):
    assert compose_run_config(overrides).identity() == compose_run_config([]).identity()


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=5"],
        ["method.camera_p.ratio=0.3"],
        ["method.camera_p.alpha=0.5"],
        ["calibration=english"],
        ["calibration.rows=3"],
        ["benchmark.limit=3"],
        ["benchmark.num_fewshot=1"],
        ["model.dtype=bfloat16"],
        ["costs.length=64"],
    ],
)
def test_what_decides_a_pruned_result_is_in_its_identity(overrides):
    base = ["method=camera_p"]
    assert compose_run_config([*base, *overrides]).identity() != compose_run_config(base).identity()


def test_windows_of_a_perplexity_decide_and_their_absence_is_no_entry():
    base = compose_run_config(["benchmark=perplexity_micro"]).identity()
    few = ["benchmark=perplexity_micro", "benchmark.perplexity.english.windows=2"]
    assert "windows" not in base["benchmark"]["perplexity"]["english"]
    assert compose_run_config(few).identity() != base


def test_the_order_of_methods_is_part_of_the_identity():
    one = compose_run_config(["method=[camera_p,random_experts]"])
    other = compose_run_config(["method=[random_experts,camera_p]"])
    assert one.identity() != other.identity()


def test_every_alternative_of_a_sweep_is_looked_at_once():
    sweep = ["-m", "method=dense,camera_p,[camera_p,random_experts]", "ratio=0.2,0.4", "seed=3"]
    singles = single_runs(Overrides.parse(sweep))
    assert singles == [
        ["method=dense", "ratio=0.2", "seed=3"],
        ["method=dense", "ratio=0.4", "seed=3"],
        ["method=camera_p", "ratio=0.2", "seed=3"],
        ["method=camera_p", "ratio=0.4", "seed=3"],
        ["method=[camera_p,random_experts]", "ratio=0.2", "seed=3"],
        ["method=[camera_p,random_experts]", "ratio=0.4", "seed=3"],
    ]


def test_an_experiments_own_sweep_is_looked_at_too():
    singles = single_runs(Overrides.parse(["experiment=demo"]))
    methods = {single[0] for single in singles}
    assert {"method=dense", "method=camera_p", "method=random_experts"} <= methods


EXPERIMENTS = [
    f"{group}={name}" for group in ("experiment", "sweep") for name in config_names(group)
]


@pytest.mark.parametrize("choice", EXPERIMENTS)
def test_what_an_experiment_sets_holds(choice):
    """Its values, and not those that `config.yaml` sets for every run."""
    group, name = choice.split("=")
    content = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / group / f"{name}.yaml"))
    set_here = {key: content[key] for key in content.keys() - {"defaults", "hydra"}}
    with hydra_config_tree():
        composed = OmegaConf.to_container(hydra_compose("config", overrides=[f"{group}={name}"]))
    assert set_here
    assert leaves(set_here).items() <= leaves(composed).items()


@pytest.mark.parametrize(
    ("group", "name"),
    [("model", "micro_vgg"), ("benchmark", "images"), ("method", "wgsef"), ("tracker", "none")],
)
def test_a_section_that_is_a_name_says_how_a_file_chooses_one(group, name):
    with pytest.raises(UserError, match=rf"{group}={name}: .*`- override /{group}: {name}`"):
        validate({**compose_run_config([]).plain(), group: name})


def leaves(tree, prefix=""):
    """The values of nested mappings, by their dotted names."""
    if not isinstance(tree, dict):
        return {prefix: str(tree)}
    return {
        k: v for key, below in tree.items() for k, v in leaves(below, f"{prefix}.{key}").items()
    }


# What is for models and texts of the user's says what it cannot do without.
NEEDED = {
    ("model", "local"): ["model.path=/somewhere"],
    ("model", "hub"): ["model.source=someones/model"],
    ("model", "torchvision"): ["model.source=torchvision:resnet18"],
    ("model", "module"): ["model._target_=methods.Net"],
    ("calibration", "text"): ["calibration.path=/x.txt"],
    ("benchmark", "lm_eval"): ["benchmark.tasks=[mmlu]"],
    ("benchmark", "lmms_eval"): ["benchmark.tasks=[mmstar]"],
}


@pytest.mark.broad
@pytest.mark.parametrize(
    "group", ["model", "method", "benchmark", "calibration", "tracker", "costs"]
)
def test_every_shipped_config_composes(group):
    names = config_names(group)
    assert names
    for name in names:
        config = compose_run_config([f"{group}={name}", *NEEDED.get((group, name), [])])
        if group == "method":
            assert list(config.method) == [name]
        elif group in ("model", "benchmark", "calibration", "costs"):
            assert getattr(config, group).name.partition(":")[0] == name


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["method=camera_q_"], ["unknown method 'camera_q_'"]),
        (["seed=-1"], ["seed=-1", "greater than or equal to 0"]),
        (["benchmark.batch_size=0"], ["benchmark.batch_size=0"]),
        (["modell=micro_moe"], ["modell", "did you mean 'model'"]),
        (["+moodel.x=1"], ["moodel"]),
        (["seed"], ["seed"]),
        (["model.dtype=float8"], ["model.dtype=float8", "float32"]),
        (["method=[camera_p,3]"], ["method=[camera_p,3] names no method: give names"]),
        (["method=[[camera_p]]"], ["method=[[camera_p]] names no method: give names"]),
        (["benchmark=[null]"], ["benchmark=[null] is not a choice: allowed: camera,"]),
        (["method=[camera_p", "ratio=0.2"], ["method=[camera_p"]),
    ],
)
def test_wrong_input_is_one_sentence(overrides, parts):
    with pytest.raises(UserError) as error:
        compose_run_config(overrides)
    said = str(error.value)
    assert "\n" not in said
    for part in parts:
        assert part in said


DOUBLES = [
    ("method=[gptq,gptq]", "names gptq twice"),
    ("method=[camera_p,gptq,camera_p]", "names camera_p twice"),
    ("model=[micro_moe,micro_llava]", "a run has one model"),
    ("benchmark=[camera_micro,nine_tasks]", "a run has one benchmark"),
    ("calibration=[english,english]", "names english twice"),
    ("tracker=[none,wandb]", "a run has one tracker"),
    ("costs=[quick,full]", "a run has one costs"),
    ("hydra/launcher=[local,joblib]", "a run has one hydra/launcher"),
    ("benchmark.tasks=[arc_easy,arc_easy]", "arc_easy is named twice"),
    ("costs.measure=[latency,memory,latency]", "latency is named twice"),
    ("costs.timing.lengths=[16,16]", "16 is named twice"),
]


@pytest.mark.sample(5)
@pytest.mark.parametrize(("text", "said"), DOUBLES)
def test_two_things_that_cannot_both_be_meant_are_refused(text, said):
    for wrong in ([text], ["ratio=0.4", text]):
        with pytest.raises(UserError, match=said):
            compose_run_config(wrong)
        with pytest.raises(UserError, match=said):
            alternative_configs(Overrides.parse(wrong))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["-m", "method=dense,[gptq,gptq]"], "names gptq twice"),
        (["-m", "method=dense,gptq", "model=[micro_moe,micro_moe]"], "names micro_moe twice"),
        (["-m", "ratio=0.2,0.4", "benchmark.tasks=[boolq,boolq]"], "boolq is named twice"),
        (["model=micro_moe", "model=micro_llava"], "choose model twice"),
        (["method=_training"], "unknown method '_training'"),
        (["method=[camera_p,_group_training]"], "unknown method '_group_training'"),
        (["-m", "method=dense,_training"], "unknown method '_training'"),
        (["method=gptq", "method=camera_p"], "choose method twice"),
        (["hydra/sweeper=list", "hydra.sweeper.runs=[['method=[gptq,gptq]']]"], "gptq twice"),
    ],
)
def test_nor_in_a_sweep_or_one_after_the_other(overrides, said):
    with pytest.raises(UserError, match=said):
        alternative_configs(Overrides.parse(overrides))


def test_a_list_of_one_and_a_chain_of_methods_are_fine():
    config = compose_run_config(["model=[micro_moe]", "method=[camera_p,gptq]"])
    assert list(config.method) == ["camera_p", "gptq"]
    assert config.model.name == "micro_moe"


def test_a_target_that_is_not_a_method_is_refused():
    for target in ("os.system", "bench.records.Store", "no.such.thing"):
        with pytest.raises(UserError, match="_target_"):
            compose_run_config(["method=camera_p", f"method.camera_p._target_={target}"])


@settings(max_examples=25, deadline=None)
@given(st.text(alphabet=st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=20))
def test_any_text_composes_or_is_refused_in_one_line(text):
    try:
        compose_run_config([text])
    except UserError as error:
        assert "\n" not in str(error)
