"""Parts of a search: ranges in Hydra's words, and the rule for hopeless trials."""

import json
import math

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from bench.errors import UserError
from bench.sweeps.optuna_sweeper import (
    EarlyResult,
    OptunaSweeper,
    _trial_overrides,
    _write_study,
    is_dominated,
    optuna_distributions,
)
from tests.records.test_store import make


def space(*texts):
    return optuna_distributions(OverridesParser.create().parse_overrides(list(texts)))


def test_hydras_words_as_distributions():
    found, fixed = space(
        "a=interval(0.1,0.7)", "b=interval(1,9)", "c=range(2,9,3)", "d=choice(x,true,3)",
        "e=tag(log,interval(0.01,1))", "f=[1,2]", "g=range(0,1,0.25)", "h=u,v",
    )  # fmt: skip
    assert found == {
        "a": FloatDistribution(0.1, 0.7),
        "b": FloatDistribution(1, 9),
        "c": IntDistribution(2, 8, step=3),
        "d": CategoricalDistribution(["x", "True", "3"]),
        "e": FloatDistribution(0.01, 1, log=True),
        "g": FloatDistribution(0, 0.75, step=0.25),
        "h": CategoricalDistribution(["u", "v"]),
    }
    assert fixed == ["f=[1,2]"]


@pytest.mark.parametrize("text", ["a=interval(3.0,1.0)", "a=range(3,1)", "a=3"])
def test_what_is_no_range(text):
    with pytest.raises(UserError):
        space(text)


shares = st.floats(0, 1)
results = st.builds(
    EarlyResult, shares, st.floats(0, 0.2), st.tuples(st.floats(0, 9), st.floats(0, 9))
)


@given(results, st.lists(results, max_size=5), st.floats(0, 4))
def test_hopeless_is_beaten_at_no_more_cost_and_beyond_doubt(mine, rivals, margin):
    slow = False
    for rival in rivals:
        doubt = (rival.error**2 + mine.error**2) ** 0.5 * margin
        costs_no_more = rival.costs[0] <= mine.costs[0] and rival.costs[1] <= mine.costs[1]
        better = rival.accuracy > mine.accuracy and rival.accuracy - mine.accuracy > doubt
        slow = slow or (costs_no_more and better)
    found = is_dominated(mine, rivals, margin)
    close = any(
        abs(r.accuracy - mine.accuracy - (r.error**2 + mine.error**2) ** 0.5 * margin) < 1e-9
        for r in rivals
    )
    assert found == slow or close
    assert not is_dominated(mine, [mine], margin)


@given(st.lists(results, min_size=1, max_size=6), st.floats(0, 4))
def test_the_best_is_never_hopeless(trials, margin):
    best = max(trials, key=lambda trial: trial.accuracy)
    assert not is_dominated(best, trials, margin)
    assert EarlyResult.from_json(best.to_json()) == best


def sweeper():
    return OptunaSweeper(
        study="s", trials=2, parallel=1, seed=0, space={"ratio": "interval(0.1,0.7)"},
        objectives=["maximize average", "minimize nonzero_parameters", "minimize parameters"],
        early_tasks=["t"], early_margin=0.0,
    )  # fmt: skip


def test_a_trial_without_one_of_the_costs_is_compared_and_stops_none():
    whole = make("a" * 12)
    costs = sweeper()._costs(whole)
    assert costs == (math.inf, 7.0)
    unknown, known = EarlyResult(0.9, 0.0, costs), EarlyResult(0.5, 0.0, (3.0, 7.0))
    assert not is_dominated(known, [unknown], 0.0)
    assert is_dominated(EarlyResult(0.1, 0.0, costs), [known], 0.0)
    assert EarlyResult.from_json(json.loads(json.dumps(unknown.to_json()))) == unknown


def test_the_file_of_a_study_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "planted-secret-0123456789")
    study = optuna.create_study(direction="maximize")
    trial = study.ask({"key": CategoricalDistribution(["planted-secret-0123456789"])})
    trial.set_user_attr("reason", "planted-secret-0123456789 was refused")
    study.tell(trial, 0.5)
    _write_study(study, {"average": "maximize"}, tmp_path)
    text = (tmp_path / "study.json").read_text()
    assert "planted-secret" not in text and "[hidden] was refused" in text
    assert json.loads(text)["trials"][0]["front"]


def test_values_of_a_range_are_decimals():
    found, _ = space("ratio=range(0.1,0.95,0.1)", "seed=range(3,9)", "bits=choice(2.5,3)")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    asked = [tuple(_trial_overrides(study.ask(found), found)) for _ in range(100)]
    ratios = {ratio for ratio, _, _ in asked}
    assert ratios == {f"ratio=0.{digit}" for digit in range(1, 10)}
    assert {seed for _, seed, _ in asked} == {f"seed={number}" for number in range(3, 9)}
    assert {bits for _, _, bits in asked} == {"bits=2.5", "bits=3"}


def test_without_a_seed_every_search_draws_other_values(tmp_path):
    """As in Optuna, whose own default is None."""
    objectives = ["maximize average"]
    drawn = []
    for name in "ab":
        search = OptunaSweeper(name, 3, 1, None, objectives, {}, [], 2.0)
        study = search._study(tmp_path / f"{name}.log", [], {})
        drawn.append(study.ask({"ratio": FloatDistribution(0, 1)}).params["ratio"])
    assert drawn[0] != drawn[1]
