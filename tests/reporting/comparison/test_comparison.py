"""Runs are compared sample by sample; numbers of different identity are not subtracted."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from bench.cli.main import main
from bench.errors import UserError
from bench.records import Store
from bench.reporting.comparison import ComparedRun, baseline_of, compare, find_flips
from bench.reporting.comparison.metric_forms import unit_scores
from tests.reporting.comparison.synthetic_runs import metric, record, rows

DENSE = [1.0] * 30 + [0.0] * 10
PRUNED = [1.0] * 20 + [0.0] * 18 + [1.0] * 2


def run(identifier, tasks, method=None, **more):
    """A run whose tasks are accuracies of the given scores."""
    metrics = [metric(task, float(np.mean(s)), len(s)) for task, s in tasks.items()]
    if len(metrics) > 1:
        mean = float(np.mean([row.value for row in metrics]))
        metrics.append(metric("average", mean, len(metrics), "mean"))
    found = pd.DataFrame([row for task, s in tasks.items() for row in rows(task, s)])
    return ComparedRun(record(identifier, metrics, method, **more), found)


def only(baseline, candidate, task):
    (found,) = [c for c in compare(baseline, [candidate]).contrasts if c.task == task]
    return found


def test_an_accuracy_is_tested_on_the_samples_that_flipped():
    found = only(run("a", {"t": DENSE}), run("b", {"t": PRUNED}, "prune"), "t")
    assert (found.gained, found.lost, found.n) == (2, 10, 40)
    assert found.p == pytest.approx(2 * sum(math.comb(12, k) for k in range(3)) / 2**12)
    assert found.difference == pytest.approx(-0.2)
    assert found.low < -0.2 < found.high < 0
    assert found.retention == pytest.approx(100 * 22 / 30)
    assert found.retention_low < found.retention < found.retention_high


def test_pairing_goes_by_document_and_not_by_order():
    baseline, candidate = run("a", {"t": DENSE}), run("b", {"t": PRUNED}, "prune")
    shuffled = ComparedRun(candidate.record, candidate.samples.sample(frac=1, random_state=0))
    assert only(baseline, shuffled, "t") == only(baseline, candidate, "t")


def test_the_average_is_the_mean_of_the_tasks_and_its_interval_is_theirs_combined():
    ours = run("a", {"t": DENSE, "u": PRUNED})
    theirs = run("b", {"t": PRUNED, "u": PRUNED[::-1]}, "prune")
    found = only(ours, theirs, "average")
    parts = [only(ours, theirs, task) for task in ("t", "u")]
    assert found.difference == pytest.approx(np.mean([part.difference for part in parts]))
    widths = [(part.high - part.low) / 2 for part in parts]
    assert (found.high - found.low) / 2 == pytest.approx(math.hypot(*widths) / 2, rel=0.1)
    assert found.test == "bootstrap"


def test_a_task_outside_the_average_does_not_enter_it():
    losses = [3.0, 3.5, 2.5, 3.2]
    text = pd.DataFrame(
        rows("text", losses, "unused", loglikelihoods=[[-8 * x] for x in losses], n_tokens=8)
    )
    perplexity = metric("text", math.exp(np.mean(losses)), 4, "perplexity", higher_is_better=False)

    def with_text(base):
        metrics = [*base.record.metrics, perplexity]
        config = {"benchmark": {**base.record.config["benchmark"], "perplexity": {"text": {}}}}
        changed = base.record.model_copy(update={"metrics": tuple(metrics), "config": config})
        return ComparedRun(changed, pd.concat([base.samples, text]))

    ours = with_text(run("a", {"t": DENSE, "u": PRUNED}))
    theirs = with_text(run("b", {"t": PRUNED, "u": PRUNED}, "prune"))
    assert only(ours, theirs, "average").baseline == pytest.approx(np.mean([0.75, 0.55]))
    same = only(ours, theirs, "text")
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert same.retention == pytest.approx(100)


def test_an_average_of_single_questions_is_no_stronger_than_those_that_differ():
    tasks = [f"t{number}" for number in range(9)]
    ours = run("a", {task: [1.0] for task in tasks})
    theirs = run("b", {task: [float(task > "t1")] for task in tasks}, "prune")
    found = only(ours, theirs, "average")
    # No resample of one question differs from it, so the bootstrap alone would be certain.
    assert found.low == found.high == pytest.approx(-2 / 9)
    assert found.p == 0.5


def test_every_candidate_and_task_is_one_family_and_the_averages_another():
    ours = run("a", {"t": DENSE, "u": DENSE})
    candidates = [run(i, {"t": PRUNED, "u": DENSE}, "prune") for i in ("b", "c")]
    found = compare(ours, candidates).contrasts
    tasks = [c for c in found if c.task == "t"]
    averages = [c for c in found if c.task == "average"]
    assert [c.p_holm for c in tasks] == pytest.approx([4 * tasks[0].p] * 2)
    assert [c.p_holm for c in averages] == pytest.approx([min(1, 2 * averages[0].p)] * 2)


def test_no_difference_is_said_to_be_seen_on_fewer_flips_than_can_be_significant():
    scores = [1.0, 0.0] * 5
    assert only(run("a", {"t": scores}), run("b", {"t": scores}, "prune"), "t").detectable == 0.6


def test_numbers_that_samples_do_not_give_again_stand_side_by_side_only():
    ours, theirs = run("a", {"t": DENSE}), run("b", {"t": PRUNED}, "prune")
    harness_f1 = metric("t", 0.42, 40, "f1")
    ours, theirs = (
        ComparedRun(each.record.model_copy(update={"metrics": (harness_f1,)}), each.samples)
        for each in (ours, theirs)
    )
    found = only(ours, theirs, "t")
    assert (found.p, found.low, found.difference) == (None, None, 0)
    assert "do not reproduce this number" in found.note


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metric": "acc_norm"}, "its metric is acc in run a0000000 and acc_norm in run b0000000"),
        ({"filter": "strict"}, "its filter is none"),
        ({"shots": 5}, "its shots is 0"),
        ({"split": "validation"}, "its split is test"),
        ({"task_version": "2"}, "its task version is None"),
        ({"n": 39}, "its samples is 40 in run a0000000 and 39 in run b0000000: give both"),
    ],
)
def test_a_different_identity_is_refused_by_name(change, said):
    ours, theirs = run("a", {"t": DENSE}), run("b", {"t": PRUNED}, "prune")
    changed = theirs.record.metrics[0].model_copy(update=change)
    other = ComparedRun(theirs.record.model_copy(update={"metrics": (changed,)}), theirs.samples)
    with pytest.raises(UserError, match=said):
        compare(ours, [other])


def test_a_different_harness_version_or_data_set_is_refused():
    ours = run("a", {"t": DENSE})
    newer = run("b", {"t": PRUNED}, "prune", environment={"versions": {"lm-eval": "0.5"}})
    with pytest.raises(UserError, match=r"harness is lm-eval 0\.4\.13 .* lm-eval 0\.5"):
        compare(ours, [newer])
    moved = run("b", {"t": PRUNED}, "p", provenance={"data": {"t": {"fingerprint": "other"}}})
    with pytest.raises(UserError, match="data fingerprint"):
        compare(ours, [moved])


@pytest.mark.parametrize(
    ("column", "said"), [("doc_hash", "the document of t"), ("prompt_hash", "the prompt of t")]
)
def test_different_documents_or_prompts_are_refused_by_number(column, said):
    ours, theirs = run("a", {"t": DENSE}), run("b", {"t": PRUNED}, "prune")
    theirs.samples.loc[[7, 9], column] = "something else"
    with pytest.raises(UserError, match=f"{said} document 7 differs between the runs, as do 1"):
        compare(ours, [theirs])


def test_a_run_without_samples_is_refused():
    ours, theirs = run("a", {"t": DENSE}), run("b", {"t": PRUNED}, "prune")
    with pytest.raises(UserError, match="one of the runs has no recorded samples"):
        compare(ours, [ComparedRun(theirs.record, pd.DataFrame())])


def test_one_refused_task_leaves_the_others_and_no_average():
    ours = run("a", {"t": DENSE, "u": DENSE})
    theirs = run("b", {"t": PRUNED, "u": PRUNED}, "prune")
    theirs.samples.loc[0, "prompt_hash"] = "something else"
    found = compare(ours, [theirs])
    assert [c.task for c in found.contrasts] == ["u"]
    assert any("t is not compared: the prompt" in sentence for sentence in found.refused)
    assert "average is not compared: one of its tasks is not compared" in found.refused


def test_the_baseline_is_the_one_dense_run():
    dense, other = record("a", []), record("b", [], "prune")
    assert baseline_of([other, dense]) is dense
    with pytest.raises(UserError, match="none of the runs is dense: choose the baseline"):
        baseline_of([other])
    with pytest.raises(UserError, match=r"2 of the runs are dense: .* a0000000, c0000000"):
        baseline_of([dense, record("c", [])])


def test_the_forms_of_the_harnesses_are_found_by_the_value_that_they_give():
    pope = rows("pope", [1, 0, 1, 1], "pope_accuracy", category=["random"] * 3 + ["popular"])
    mean = metric("pope", (2 / 3 + 1) / 2, 4, "pope_accuracy_mean")
    assert unit_scores(pd.DataFrame(pope), mean).observed == pytest.approx(mean.value)

    right = [1, 1, 1, 0, 1, 1]
    units, parts = ["x", "x", "y", "y", "z", "z"], ["count"] * 4 + ["colour"] * 2
    mme = pd.DataFrame(rows("mme", right, "mme_perception_score", unit=units, category=parts))
    points = (200 + 50) / 2 + 200
    assert unit_scores(mme, metric("mme", points, 6, "mme_perception_score")).binary is False
    share = unit_scores(mme, metric("mme", points / 400, 3, "mme_perception_share"))
    assert len(share.units) == 3
    assert unit_scores(mme, metric("mme", points + 1, 6, "mme_perception_score")) is None

    said = ["A", "A. a dog", "B", "C"]
    turned = rows(
        "mmbench_en", [0] * 4, "unused", unit=["1", "1", "2", "2"], response=said,
        target=["A", "A", "B", "B"],
    )  # fmt: skip
    found = unit_scores(pd.DataFrame(turned), metric("mmbench_en", 0.5, 2, "mmbench_accuracy"))
    assert found.units["score"].tolist() == [1, 0]

    group = pd.DataFrame([*rows("mmlu_a", [1, 0, 0]), *rows("mmlu_b", [1])])
    assert unit_scores(group, metric("mmlu", 0.5, 4)).binary is True
    assert unit_scores(group, metric("mmlu", 2 / 3, 4)).units["stratum"].nunique() == 2


def test_flips_say_what_was_asked_and_what_each_run_answered():
    ours, theirs = run("a", {"t": DENSE}), run("b", {"t": PRUNED}, "prune")
    found = find_flips(ours, theirs, ours.record.metrics[0], 2)
    assert [(flip.document, flip.lost) for flip in found] == [
        (20, True), (21, True), (38, False), (39, False),
    ]  # fmt: skip
    assert (found[0].prompt, found[0].target, found[0].source) == ("t? 20", "yes", "here")
    # The first choice is the likelier one where the score is 0, the second where it is 1.
    assert (found[0].baseline_answer, found[0].candidate_answer) == ("not so", "yes")


def test_a_length_normalised_metric_reads_the_answers_by_its_own_rule():
    ours, theirs = run("a", {"t": [1.0]}), run("b", {"t": [0.0]}, "prune")
    for each in (ours, theirs):
        each.samples.at[0, "loglikelihoods"] = [-1.0, -1.5]
        each.samples["acc_norm"] = each.samples["acc"]
    (plain,) = find_flips(ours, theirs, metric("t", 1.0, 1, "acc"), 1)
    (normed,) = find_flips(ours, theirs, metric("t", 1.0, 1, "acc_norm"), 1)
    assert (plain.baseline_answer, normed.baseline_answer) == ("yes", "not so")


@pytest.fixture
def stored(tmp_path):
    for each in (
        run("a", {"t": DENSE, "u": PRUNED}),
        run("b", {"t": PRUNED, "u": PRUNED}, "prune"),
    ):
        Store(tmp_path).write(each.record, each.samples.to_dict("records"), "")
    return tmp_path


def test_the_command_prints_a_table_and_flips(stored, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["compare", "b", "a", "--flips", "1", "--results-dir", str(stored)]) == 0
    out = capsys.readouterr().out
    assert "prune against dense: tiny on exam" in out
    assert "+2 / -10" in out and "-20.0 [" in out
    assert "u: a difference below" in out
    assert "lost: t document 20" in out and "gained: t document 38" in out


def test_the_command_prints_json(stored, capsys):
    assert main(["compare", "a", "b", "--json", "--results-dir", str(stored)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["baseline"]["label"] == "dense"
    assert [row["task"] for row in found["contrasts"]] == ["average", "t", "u"]


def test_one_run_alone_is_refused(stored, capsys):
    assert main(["compare", "a", "--results-dir", str(stored)]) == 2
    assert "name at least two" in capsys.readouterr().err


def answered(identifier, scores, method=None):
    """A run with no answer where a score is None."""
    kept = [score for score in scores if score is not None]
    found = pd.DataFrame(
        [
            row | {"acc": score, "missing": "why" if score is None else None}
            for row, score in zip(rows("t", [s or 0.0 for s in scores]), scores, strict=True)
        ]
    )
    number = metric("t", float(np.mean(kept)), len(kept), missing=len(scores) - len(kept))
    return ComparedRun(record(identifier, [number], method), found)


def test_samples_that_only_one_run_answered_are_in_neither_value():
    gap = [None, *PRUNED[1:20], None, *PRUNED[21:]]
    dense, pruned = answered("a", DENSE), answered("b", gap, "prune")
    whole = [i for i, score in enumerate(gap) if score is not None]
    for baseline, candidate, first, second in (
        (dense, pruned, DENSE, gap), (pruned, dense, gap, DENSE)
    ):  # fmt: skip
        found = only(baseline, candidate, "t")
        assert found.n == 38
        assert found.baseline == pytest.approx(np.mean([first[i] for i in whole]))
        assert found.candidate == pytest.approx(np.mean([second[i] for i in whole]))
        assert found.note == "paired over the 38 samples that both runs answered"
    assert only(answered("a", DENSE), answered("b", PRUNED, "p"), "t").note is None
    # Also where both lack the same answers.
    assert only(pruned, answered("c", gap, "q"), "t").note.startswith("paired over the 38 samples")


def test_numbers_over_other_samples_that_cannot_be_paired_are_refused():
    dense, pruned = answered("a", DENSE), answered("b", [None, *PRUNED[1:]], "prune")
    off = metric("t", 0.1, 39, missing=1)
    wrong = ComparedRun(record("b", [off], "prune"), pruned.samples)
    with pytest.raises(UserError, match="no answer to 0 and 1 samples, and these numbers cannot"):
        compare(dense, [wrong])


def test_tasks_that_one_run_alone_has_scored_are_named():
    def run(name, method, *tasks):
        made = record(name, [metric(task, 0.5, 2) for task in tasks], method)
        samples = [row for task in tasks for row in rows(task, [1.0, 0.0])]
        return ComparedRun(made, pd.DataFrame(samples))

    found = compare(run("a", None, "arc", "rte"), [run("b", "prune", "arc", "piqa")])
    assert [row.task for row in found.contrasts] == ["arc"]
    assert found.refused == (
        "rte: not compared, since only run a0000000 has scored it",
        "piqa: not compared, since only run b0000000 has scored it",
    )
