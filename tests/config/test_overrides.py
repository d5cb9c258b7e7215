"""Arguments of a run: every spelling of a key gives one value."""

from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.config.overrides import Overrides, keyword_overrides, sweep_values
from bench.errors import UserError


@pytest.mark.parametrize("text", [
    "force=true", "force=True", "force=TRUE", "+force=true", "++force=True", "force='true'",
    'force="True"', "force=1", "force=yes",
])  # fmt: skip
def test_every_spelling_of_true_is_true(text):
    assert Overrides.parse(["ratio=0.2", text]).is_true("force")


@pytest.mark.parametrize("texts", [
    [], ["force=false"], ["force=null"], ["~force"], ["force=maybe"], ["force=true", "force=false"],
    ["results_dir='force=true'"], ["offline=true"], ["force=true", "~force"], ["force={}"],
])  # fmt: skip
def test_everything_else_is_not(texts):
    assert not Overrides.parse(texts).is_true("force")


@pytest.mark.parametrize("text", [
    "results_dir=/a b/c", "results_dir='/a b/c'", 'results_dir="/a b/c"', "+results_dir=/a b/c",
    "++results_dir='/a b/c'",
])  # fmt: skip
def test_every_spelling_of_a_path_is_the_path(text):
    assert Overrides.parse([text]).value("results_dir") == "/a b/c"


@pytest.mark.parametrize("arguments", [
    ["-m", "seed=1,2"], ["seed=1,2", "-m"], ["--multirun", "seed=1,2"],
    ["-m", "--multirun", "seed=1,2"],
])  # fmt: skip
def test_flags_may_stand_anywhere_and_come_first_for_hydra(arguments):
    parsed = Overrides.parse(arguments)
    assert parsed.multirun
    assert parsed.arguments == ["-m", "seed=1,2"]
    assert not Overrides.parse(["seed=-m"]).multirun


def test_an_unknown_flag_is_refused():
    with pytest.raises(UserError, match=r"unknown flag '--multi': did you mean '--multirun'"):
        Overrides.parse(["--multi", "seed=1,2"])


def test_overrides_of_hydra_and_of_runs_are_told_apart():
    given = ["hydra/launcher=joblib", "+hydra.callbacks.x=1", "seed=1", "hydra.sweep.dir=a"]
    parsed = Overrides.parse(given)
    assert parsed.of_hydra == [given[0], given[1], given[3]]
    assert parsed.of_runs == ["seed=1"]
    assert parsed.without("hydra.sweep").of_hydra == given[:2]


@pytest.mark.parametrize("text", [
    "model.allow_remote_code=true", "+model.allow_remote_code=1",
    "+model={allow_remote_code: true}",
    "~model.allow_remote_code", "model.allow_remote_code=true,false",
])  # fmt: skip
def test_a_key_is_found_inside_a_mapping_too(text):
    assert Overrides.parse([text]).setting("model.allow_remote_code") == [text]


def test_a_key_is_not_found_in_names_that_begin_alike():
    given = ["model.allow_remote_codes=true", "model=micro_moe", "+model={other: 1}"]
    assert Overrides.parse(given).setting("model.allow_remote_code") == []


def test_a_sweep_is_reduced_to_its_first_values():
    given = ["ratio=0.2,0.4", "++seed=range(3,5)", "x=interval(0,1)", "method=[a,b]"]
    assert Overrides.parse(given).first_values() == [
        "ratio=0.2", "++seed=3", "x=0.0", "method=[a,b]",
    ]  # fmt: skip


def values(text):
    (override,) = Overrides.parse([text]).parsed
    return list(sweep_values(override))


@pytest.mark.parametrize(("text", "expected"), [
    ("ratio=range(0.1,0.35,0.1)", ["0.1", "0.2", "0.3"]),
    ("ratio=range(0.1,0.4,0.1)", ["0.1", "0.2", "0.3"]),
    ("ratio=range(0,1,0.25)", ["0.0", "0.25", "0.5", "0.75"]),
    ("ratio=range(0.7,0.1,-0.2)", ["0.7", "0.5", "0.3"]),
    ("ratio=range(1e-3,4e-3,1e-3)", ["0.001", "0.002", "0.003"]),
    ("ratio=sort(range(0.1,0.35,0.1))", ["0.1", "0.2", "0.3"]),
    ("ratio=float(range(1,4))", ["1.0", "2.0", "3.0"]),
    ("seed=range(3,9,2)", ["3", "5", "7"]),
    ("seed=range(3)", ["0", "1", "2"]),
    ("ratio=0.30,3e-1,0.3", ["0.3", "0.3", "0.3"]),
    ("ratio=choice(0.30,3e-1)", ["0.3", "0.3"]),
    ("ratio=interval(0.30,7e-1)", ["0.3", "0.7"]),
])  # fmt: skip
def test_swept_numbers_are_decimals(text, expected):
    assert values(text) == expected


@given(st.integers(-99, 99), st.integers(1, 40), st.integers(1, 20), st.integers(0, 4))
def test_a_range_gives_what_would_be_written_by_hand(start, step, count, places):
    def written(number):
        return str(Decimal(number).scaleb(-places)) + ("" if places else ".0")

    text = f"range({written(start)},{written(start + count * step)},{written(step)})"
    listed = ",".join(written(start + place * step) for place in range(count))
    assert values(f"ratio={text}") == [str(float(number)) for number in listed.split(",")]


def test_a_shuffled_range_keeps_its_numbers():
    assert sorted(values("ratio=shuffle(range(0.1,0.95,0.1))")) == [
        f"0.{digit}" for digit in range(1, 10)
    ]


def test_a_range_without_a_step_is_refused():
    with pytest.raises(UserError, match="the step must be a number other than 0"):
        values("ratio=range(0.1,0.4,0)")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("method=gptq,gptq", "method=[gptq] applies it"),
        ("method=gptq,rtn,gptq", "method=[gptq,rtn] applies them one after the other"),
        ("method=[camera_p,gptq],gptq", "method=[camera_p,gptq] applies them one after the other"),
    ],
)
def test_several_methods_are_advised_as_a_list_that_is_accepted(text, advice):
    with pytest.raises(UserError) as error:
        Overrides.parse([text]).refuse_several_values()
    assert str(error.value).endswith(f"; {advice}")


@pytest.mark.parametrize(
    "text", ["ratio=" + "[" * 1000 + "1" + "]" * 1000, "m=" + "{a:" * 300 + "1" + "}" * 300]
)
def test_an_argument_of_many_levels_is_refused_before_it_is_parsed(text):
    with pytest.raises(UserError, match="30 levels of brackets"):
        Overrides.parse([text])


def test_an_argument_of_many_characters_is_refused():
    with pytest.raises(UserError, match="100,000 characters"):
        Overrides.parse(["seed=" + "1" * 100_001])


@pytest.mark.parametrize("text", ["seed=range(0,4000000000)", "ratio=range(0,1,1e-9)"])
def test_a_range_of_many_values_is_refused_before_it_is_listed(text):
    with pytest.raises(UserError, match="a sweep takes 100,000 at most"):
        Overrides.parse([text]).first_values()


@pytest.mark.parametrize("texts", [
    ["a=1", "+a=2"], ["++a.b=1", "a/b=2"], ["a=1", "~a"], ["a@p=1", "a@p=2"], ["a=1", "a=true"],
    ["a=1", "a=1.0"], ["a=1", "b=1", "a=2", "a=1"], ["a=1,2", "a=1"], ["a=1,2", "a=2,1"],
])  # fmt: skip
def test_one_key_with_two_values_is_refused_however_it_is_written(texts):
    with pytest.raises(UserError, match=r"both set a.*: give one of them"):
        Overrides.parse(texts).without_repeats()


@pytest.mark.parametrize(
    ("texts", "left"),
    [
        ([], []),
        (["a=1", "a.b=2"], ["a=1", "a.b=2"]),
        (["a@p=1", "a@q=1", "a=1"], ["a@p=1", "a@q=1", "a=1"]),
        (["a=1", "b=1", "a=1"], ["a=1", "b=1"]),
        (["a.b=x", "a/b='x'"], ["a.b=x"]),
        (["a=0.4", "a=0.40"], ["a=0.4"]),
        # Hydra would run all pairs of the two lists.
        (["a=1,2", "a=1,2"], ["a=1,2"]),
        (["~a", "~a"], ["~a"]),
    ],
)
def test_a_word_that_is_repeated_counts_once(texts, left):
    assert Overrides.parse(texts).without_repeats().texts == left


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=12)
    | st.floats(-1e6, 1e6).map(lambda number: number + 0.0),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@given(VALUES)
def test_a_keyword_reaches_hydra_as_the_same_value(value):
    if isinstance(value, str) and not value.isprintable():
        return
    (word,) = keyword_overrides({"a": value}, {})
    (override,) = Overrides.parse([word]).parsed
    assert plain(override.value()) == plain(value)


def plain(value):
    """A text that Hydra keeps with its quotes, as the text."""
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return getattr(value, "text", value)


def test_keywords_sweeps_and_mappings_become_words():
    given = {"method": ["a", "b"], "costs": {"length": 64, "flops": {"causal": True}}}
    assert keyword_overrides(given, {"ratio": [0.2, 0.4], "model": ["micro_moe", "./mine"]}) == [
        "method=[a,b]", "costs.length=64", "costs.flops.causal=true",
        "-m", "ratio=0.2,0.4", "model=micro_moe,./mine",
    ]  # fmt: skip


def test_scalars_of_numpy_stand_for_their_numbers():
    given = {"ratio": np.float64(0.5), "seed": np.int64(3), "force": np.bool_(True)}
    assert keyword_overrides(given, {"ratio": np.linspace(0.1, 0.2, 2)}) == [
        "ratio=0.5", "seed=3", "force=true", "-m", "ratio=0.1,0.2",
    ]  # fmt: skip


@pytest.mark.parametrize(("config", "over", "said"), [
    ({"a": {1}}, {}, "is a set: give a text"), ({}, {"a": "bc"}, "is not a list of values"),
    ({}, {"a": 3}, "is not a list of values"), ({}, {"a": []}, "has no values"),
])  # fmt: skip
def test_what_no_config_holds_is_refused(config, over, said):
    with pytest.raises(UserError, match=said):
        keyword_overrides(config, over)
