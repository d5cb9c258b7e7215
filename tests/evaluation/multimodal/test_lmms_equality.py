"""Answers and scores are those of lmms-eval's own adapter and its own evaluator.

Its `llava_hf` imports decord, which only videos need: an empty module stands in for it here, and
all that is called is lmms-eval's own code.
"""

import sys
import types
from argparse import Namespace
from dataclasses import replace

import pytest
from lmms_eval.api.task import ConfigurableTask

from bench.evaluation import BenchmarkConfig, evaluate, plan
from bench.evaluation.multimodal import task_index

TASKS = ("vqav2_val", "scienceqa_img", "pope", "mme")
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def theirs(mllms, tmp_path_factory):
    """Load the tiny LLaVA as lmms-eval does."""
    folder = tmp_path_factory.mktemp("llava")
    mllms["llava"].network.save_pretrained(folder)
    mllms["llava"].processor.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        decord = types.ModuleType("decord")
        decord.VideoReader = decord.cpu = None
        patch.setitem(sys.modules, "decord", decord)
        from lmms_eval.models.simple.llava_hf import LlavaHf

    return LlavaHf(str(folder), device="cpu", dtype="float32", device_map="cpu")


@pytest.fixture(scope="module")
def config():
    return BenchmarkConfig(
        name="b", harness="lmms_eval", suite="micro", tasks=TASKS, limit=6, batch_size=4
    )


def test_it_equals_the_harness_with_its_own_model(config, theirs, mllms, tmp_path):
    from lmms_eval.evaluator import evaluate as harness

    ours = plan(config, offline=True)
    own = {}
    for planned in ours.harness.tasks:
        folder = tmp_path / planned.name
        planned.task.dataset.save_to_disk(folder)
        defined = task_index._with_includes(task_index.find_task_file(planned.name))
        defined |= {
            "dataset_path": str(folder),
            "dataset_name": None,
            "dataset_kwargs": {"load_from_disk": True},
        }
        own[planned.name] = ConfigurableTask(config=defined)
        theirs.task_dict[planned.name] = own[planned.name].dataset
    expected = harness(
        theirs, own, bootstrap_iters=0, distributed_executor_backend="torchrun",
        cli_args=Namespace(output_path=str(tmp_path), process_with_media=True),
    )  # fmt: skip
    model = replace(mllms["llava"])
    model.config = model.config.model_copy(update={"system_prompt": VICUNA})
    found = evaluate(model, ours)
    answers = {(row["task"], row["doc_id"]): row["response"] for row in found.samples}
    assert len(set(answers.values())) > 5
    for name in TASKS:
        for sample in expected["samples"][name]:
            assert answers[name, sample["doc_id"]] == sample["filtered_resps"][0].strip()
    compared = 0
    for metric in found.metrics:
        key = f"{metric.metric},{metric.filter}"
        if key in expected["results"].get(metric.task, {}):
            assert metric.value == expected["results"][metric.task][key]
            compared += 1
    assert compared >= 8


def test_rows_say_what_was_asked_and_do_not_depend_on_the_batch(config, mllms):
    config = config.model_copy(update={"tasks": ("textvqa_val", "mme", "pope"), "limit": 3})
    ours, model = plan(config, offline=True), mllms["llava"]
    model = replace(model, config=model.config.model_copy(update={"max_length": 240}))
    found = evaluate(model, ours)
    single = config.model_copy(update={"batch_size": 1, "image_cache_gib": 0.0})
    again = evaluate(model, plan(single, offline=True))
    assert [row["response"] for row in again.samples] == [row["response"] for row in found.samples]
    assert again.metrics == found.metrics
    row = found.samples[0]
    assert row["prompt"].startswith("USER: <image>\n") and row["prompt"].endswith(" ASSISTANT:")
    assert row["target"] not in ("", "answer")
    assert len(row["image_hash"]) == len(row["doc_hash"]) == 64
    pope = [row for row in found.samples if row["task"] == "pope"]
    assert {row["category"] for row in pope} <= {"random", "popular", "adversarial"}
    assert all(row["pope_accuracy"] in (0.0, 1.0) for row in pope)


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl"])
def test_other_architectures_are_asked_as_well(name, config, mllms):
    small = config.model_copy(update={"tasks": ("gqa", "pope"), "limit": 2})
    found = evaluate(mllms[name], plan(small, offline=True))
    assert {m.task for m in found.metrics if m.headline} == {"gqa", "pope", "average"}
    assert len(found.samples) == 4
