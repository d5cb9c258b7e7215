"""Every task scores right and wrong answers as its paper does, through the harness's own files."""

import math
import statistics

import pytest
from lmms_eval.api.model import lmms

from bench.evaluation import BenchmarkConfig, plan
from bench.evaluation.metrics import headline_average
from bench.evaluation.multimodal import derived_metrics, lmms_eval
from bench.evaluation.multimodal.lmms_eval import _run_harness

LETTERS = "ABCD"
RIGHT = {
    "gqa": lambda doc: doc["answer"],
    "vqav2_val": lambda doc: doc["multiple_choice_answer"],
    "scienceqa_img": lambda doc: LETTERS[doc["answer"]],
    "textvqa_val": lambda doc: doc["answers"][0],
    "pope": lambda doc: doc["answer"],
    "mme": lambda doc: doc["answer"],
    "mmbench_en_dev_static": lambda doc: doc["answer"],
}
HEADLINES = {
    "pope": "pope_accuracy_mean",
    "mme": "mme_perception_score",
    "mmbench_en_dev_static": "mmbench_accuracy",
}


class Answering(lmms):
    """A model of the harness that answers as a function of the document and its place says."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def generate_until(self, requests):
        told = [(r.args[3], self.task_dict[r.args[4]][r.args[5]][r.args[3]]) for r in requests]
        return [self.function(place, doc) for place, doc in told]

    loglikelihood = generate_until_multi_round = None


def planned(*tasks, **settings):
    config = BenchmarkConfig(
        name="b", harness="lmms_eval", suite="micro", tasks=tasks,
        metrics={name: metric for name, metric in HEADLINES.items() if name in tasks}, **settings,
    )  # fmt: skip
    return config, plan(config, offline=True).harness.tasks


def scored(config, task, function):
    return {
        m.metric: m
        for m in lmms_eval.task_metrics(config, task, _run_harness(Answering(function), task))
    }


@pytest.fixture(scope="module")
def seven():
    return planned(*RIGHT, limit=60)


def of(seven, name):
    config, tasks = seven
    return config, next(task for task in tasks if task.name == name)


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["gqa", "vqav2_val", "scienceqa_img", "textvqa_val"])
def test_half_right_is_a_half(name, seven):
    config, task = of(seven, name)
    right = RIGHT[name]
    half = scored(config, task, lambda place, doc: right(doc) if place % 2 else "zzz")
    (metric,) = half.values()
    assert (metric.metric, metric.value, metric.n) == ("exact_match", 0.5, 60)
    assert metric.headline and metric.higher_is_better
    assert metric.stderr == pytest.approx(statistics.stdev([0.0, 1.0] * 30) / math.sqrt(60))
    assert scored(config, task, lambda _, doc: "zzz")["exact_match"].value == 0


def test_pope_is_the_mean_of_its_splits_each_of_which_is_there():
    config, (task,) = planned("pope")
    doc_split = [doc["category"] for doc in task.task.dataset_no_image[task.split]]
    assert set(doc_split) == {"random", "popular", "adversarial"}
    rows = scored(
        config, task, lambda place, doc: doc["answer"] if doc_split[place] != "random" else "maybe"
    )
    assert rows["pope_accuracy_random"].value == 0
    assert rows["pope_accuracy_popular"].value == rows["pope_accuracy_adversarial"].value == 1
    assert rows["pope_accuracy_mean"].value == pytest.approx(2 / 3)
    assert rows["pope_accuracy_mean"].headline
    assert not rows["pope_accuracy_random"].headline
    yes = scored(config, task, lambda _, doc: "Yes")
    share = statistics.fmean(d["answer"] == "yes" for d in task.task.dataset_no_image[task.split])
    assert yes["pope_accuracy"].value == pytest.approx(share)
    assert yes["pope_recall"].value == 1
    assert yes["pope_f1_score"].stderr is None


def test_mme_counts_images_twice_and_its_sum_is_not_a_percentage():
    config, (task,) = planned("mme")
    perfect = scored(config, task, lambda _, doc: doc["answer"])
    categories = {doc["category"] for doc in task.task.dataset_no_image[task.split]}
    for category in categories:
        assert perfect[f"mme_{category}"].value == 200
        assert not perfect[f"mme_{category}"].headline
    assert perfect["mme_perception_share"].value == 1
    assert perfect["mme_perception_score"].headline
    yes = scored(config, task, lambda _, doc: "yes")
    # Of every image's two questions one is to be answered yes: half the accuracy, never both.
    assert yes["mme_perception_share"].value == pytest.approx(0.25)
    for part in ("perception", "cognition"):
        known = derived_categories(task, part)
        expected = sum(yes[f"mme_{category}"].value for category in known)
        if known:
            assert yes[f"mme_{part}_score"].value == pytest.approx(expected)
    half = scored(config, task, lambda place, doc: doc["answer"] if place % 4 < 2 else "zzz")
    assert 0 < half["mme_perception_share"].value < 1
    assert half["mme_perception_share"].stderr > 0


def derived_categories(task, part):
    from lmms_eval.tasks.mme.utils import eval_type_dict

    found = {doc["category"] for doc in task.task.dataset_no_image[task.split]}
    return found & set(eval_type_dict[part.capitalize()])


def test_mme_stands_in_the_mean_as_a_share(seven):
    config, tasks = seven
    rows = []
    for task in tasks:
        rows += scored(config, task, lambda _, doc, t=task: RIGHT[t.name](doc)).values()
    (mean,) = headline_average(config, rows)
    assert (mean.value, mean.n, mean.stderr) == (1.0, 7, 0.0)
    assert next(row for row in rows if row.task == "mme" and row.headline).value > 1


@pytest.mark.broad
def test_mmbench_wants_all_rotations_right():
    config, (task,) = planned("mmbench_en_dev_static")
    rows = task.task.dataset_no_image[task.split]
    questions = {doc["index"] % derived_metrics.ROTATION_STRIDE for doc in rows}
    assert len(questions) < len(rows)
    perfect = scored(config, task, lambda _, doc: doc["answer"])
    assert perfect["mmbench_accuracy"].value == 1
    assert perfect["mmbench_accuracy"].n == len(questions)
    assert perfect["gpt_eval_score"].value == 100
    always = scored(config, task, lambda _, doc: "A")
    assert always["mmbench_accuracy"].value == 0
    first = min(questions)
    once = scored(
        config,
        task,
        lambda _, doc: (
            "zzz" if doc["index"] == first + derived_metrics.ROTATION_STRIDE else doc["answer"]
        ),
    )
    assert once["mmbench_accuracy"].value == pytest.approx(1 - 1 / len(questions))
    assert once["mmbench_accuracy"].value * 100 == pytest.approx(once["gpt_eval_score"].value)


def test_an_option_in_words_is_read_without_a_judge():
    config, (task,) = planned("mmbench_en_dev_static", limit=8)
    said = scored(config, task, lambda _, doc: f"The answer is ({doc['answer']}).")
    assert said["mmbench_accuracy"].value == 1


@pytest.mark.parametrize(("limit", "together"), [(3, 4), (4, 4)])
def test_a_limit_cuts_no_pair(limit, together):
    _, (task,) = planned("mme", limit=limit)
    assert len(task.indices) == together


def test_ocr_tokens_are_shown_unless_they_are_switched_off():
    for shown in (True, False):
        _, (task,) = planned("textvqa_val", limit=2, ocr_tokens=shown)
        text = task.task.doc_to_text(task.task.dataset[task.split][0])
        assert ("Reference OCR token: " in text) is shown
