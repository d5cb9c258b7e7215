"""Comparison over seeds: the sign-flip test against its definition, pairing, wrong input."""

import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.cli.main import main
from bench.errors import UserError
from bench.records import Store
from bench.reporting.comparison.seeds import compare_seeds, print_seeds
from bench.reporting.statistics import holm, sign_flip_p
from tests.reporting.comparison.synthetic_runs import MODEL, metric, record


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=8))
def test_the_sign_flip_test_counts_all_assignments(gaps):
    totals = [abs(sum(s * g for s, g in zip(signs, gaps, strict=True)))
              for signs in product((1, -1), repeat=len(gaps))]  # fmt: skip
    expected = sum(total >= abs(sum(gaps)) for total in totals) / len(totals)
    assert sign_flip_p(np.array(gaps) / 10) == pytest.approx(expected)


def test_of_many_pairs_signs_are_drawn():
    gaps = np.random.default_rng(1).normal(0.5, 1.0, 40)
    assert 0 < sign_flip_p(gaps) < 0.05
    assert sign_flip_p(gaps - gaps.mean()) == 1


def run(name, method, seed, value, **more):
    config = {"benchmark": {"name": "exam", "harness": "images", "perplexity": {}}, "seed": seed}
    return record(name, [metric("digits", value, 100)], method, config=config, **more)


RUNS = [
    *(run(f"a{seed}", "plain", seed, 0.80 + seed / 100) for seed in range(1, 9)),
    *(run(f"b{seed}", "better", seed, 0.85 + seed / 100) for seed in range(1, 8)),
    *(run(f"c{seed}", "noisy", seed, 0.80 + (seed % 2) / 10) for seed in range(3, 9)),
    run("d1", "once", 1, 0.99),
]


def test_settings_are_compared_in_the_pairs_that_share_a_seed():
    better, noisy = compare_seeds(RUNS, RUNS[0])
    assert (better.series, better.pairs, better.metric) == ("better", 7, "acc %")
    assert better.difference == pytest.approx(5)
    assert better.deviation == pytest.approx(0, abs=1e-9)
    assert better.p == 2 / 2**7
    assert (noisy.series, noisy.pairs) == ("noisy", 6)
    gaps = np.array([(seed % 2) * 10 - seed for seed in range(3, 9)])
    assert noisy.difference == pytest.approx(gaps.mean())
    assert noisy.p == pytest.approx(sign_flip_p(gaps))
    assert [better.p_holm, noisy.p_holm] == pytest.approx(holm([better.p, noisy.p]))


def test_what_cannot_be_compared_over_seeds_is_one_sentence():
    with pytest.raises(UserError, match="no other setting shares two seeds with plain"):
        compare_seeds([*RUNS[:8], RUNS[-1]], RUNS[0])
    other = run("e1", "plain", 1, 0.5, model=MODEL.model_copy(update={"name": "large"}))
    with pytest.raises(UserError, match="run e1000000 is of large on exam"):
        compare_seeds([*RUNS, other], RUNS[0])


def test_the_command_prints_the_table_and_its_numbers(tmp_path, capsys):
    for one in RUNS:
        Store(tmp_path).write(one, [], "")
    place = ["--results-dir", str(tmp_path)]
    assert main(["compare", "--seeds", "--baseline", "a1", *place]) == 0
    assert "better" in capsys.readouterr().out
    assert main(["compare", "--seeds", "--baseline", "a1", "--json", *place]) == 0
    assert [row["series"] for row in json.loads(capsys.readouterr().out)] == ["better", "noisy"]
    assert main(["compare", "--seeds", *place]) == 2
    assert main(["compare", *place]) == 2


def quantized(name, seed, value, **knobs):
    one = run(name, "quantize", seed, value)
    return one.model_copy(
        update={"methods": (one.methods[0].model_copy(update={"config": knobs}),)}
    )


def test_settings_that_differ_in_an_amount_are_two():
    """Such as bits or tokens kept, which no label has: one was overwritten by the other."""
    runs = [
        quantized(f"{bits}{seed}", seed, bits / 10, bits=bits)
        for bits in (2, 3, 4)
        for seed in (1, 2)
    ]
    found = compare_seeds(runs, runs[0])
    assert {row.series: row.difference for row in found} == {
        "quantize, bits=3": pytest.approx(10),
        "quantize, bits=4": pytest.approx(20),
    }
    assert {row.pairs for row in found} == {2}


def test_averages_of_different_tasks_are_not_subtracted():
    def asked(name, seed, tasks):
        one = run(name, f"on {tasks[0]}", seed, 0.5)
        benchmark = {**one.config["benchmark"], "tasks": tasks}
        return one.model_copy(update={"config": {**one.config, "benchmark": benchmark}})

    ours = [asked(f"a{seed}", seed, ["arc", "piqa"]) for seed in (1, 2)]
    theirs = [asked(f"b{seed}", seed, ["rte", "boolq"]) for seed in (1, 2)]
    with pytest.raises(UserError, match=r'is of tiny on exam \(tasks \["rte", "boolq"\]\)'):
        compare_seeds([*ours, *theirs], ours[0])


def test_where_lower_is_better_the_lowest_stands_first(capsys):
    def scored(name, method, seed, value):
        one = run(name, method, seed, 0.5)
        loss = metric("text", value, 9, "perplexity", higher_is_better=False)
        return one.model_copy(update={"metrics": (loss,)})

    values = {"plain": 12.0, "worse": 12.26, "better": 11.94}
    runs = [scored(f"{m[0]}{s}", m, s, v + s) for m, v in values.items() for s in (1, 2)]
    print_seeds(compare_seeds(runs, runs[0]))
    out = capsys.readouterr().out
    assert out.index("-0.06") < out.index("+0.26")


def test_a_baseline_without_one_number_is_refused():
    two = [run(f"a{seed}", "plain", seed, 0.5) for seed in (1, 2)]
    bare = [one.model_copy(update={"metrics": ()}) for one in two]
    with pytest.raises(UserError, match="neither an average nor a single task"):
        compare_seeds(bare, bare[0])
