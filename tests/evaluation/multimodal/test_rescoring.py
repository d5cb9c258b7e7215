"""Answers about images, scored again from their rows; and what the rows say was seen."""

import pytest

from bench.errors import UserError
from bench.evaluation import BenchmarkConfig, evaluate, plan, rescore


def planned(task, **settings):
    config = BenchmarkConfig(
        name="b", harness="lmms_eval", suite="micro", tasks=(task,), limit=4, **settings
    )
    return plan(config, offline=True)


@pytest.mark.sample(1)
@pytest.mark.parametrize("task", ["pope", "mme", "gqa"])
def test_stored_answers_give_the_same_numbers(task, llava):
    found = evaluate(llava, planned(task, allow_missing=1.0))
    again = rescore(planned(task, allow_missing=1.0), found.samples)
    assert [m.value for m in again.metrics] == [m.value for m in found.metrics]
    assert [row["missing"] for row in again.samples] == [row["missing"] for row in found.samples]
    for row in found.samples:
        assert row["prompt_tokens"][0] > 0
        assert row["image_sizes"] == ["20x20"]
        assert len(row["finish_reasons"]) == len(row["generations"])


def test_rows_without_generations_are_refused_by_name(llava):
    found = evaluate(llava, planned("pope"))
    old = [{**row, "generations": None, "missing": None} for row in found.samples]
    with pytest.raises(UserError, match="task pope, document 0: the run stored no generations"):
        rescore(planned("pope"), old)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("column", "different"), [("doc_hash", "document"), ("question_hash", "prompt")]
)
def test_answers_to_other_questions_are_refused(column, different, llava):
    found = evaluate(llava, planned("pope"))
    old = [{**row, column: "0"} for row in found.samples]
    with pytest.raises(UserError, match=f"task pope, document 0: .*different: {different}"):
        rescore(planned("pope"), old)
    rescore(planned("pope"), [{**row, column: None} for row in found.samples])
