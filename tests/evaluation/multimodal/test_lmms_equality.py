"""Answers and scores are those of lmms-eval's own adapter and its own evaluator.

Its `llava_hf` imports decord, which only videos need: an empty module stands in for it here, and
all that is called is lmms-eval's own code.
"""

import sys
import types
from argparse import Namespace
from dataclasses import replace

import datasets
import pytest
from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask

from bench.data.chat import VICUNA_TEMPLATE
from bench.evaluation import BenchmarkConfig, evaluate, plan
from bench.evaluation.multimodal import task_index
from tests.evaluation.multimodal.test_tasks_by_name import ROWS

TASKS = ("vqav2_val", "scienceqa_img", "pope", "mme")
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def adapters(mllms, tmp_path_factory):
    """Load the tiny LLaVA as lmms-eval does, without and with its chat template."""
    folder = tmp_path_factory.mktemp("llava")
    mllms["llava"].network.save_pretrained(folder)
    mllms["llava"].processor.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        decord = types.ModuleType("decord")
        decord.VideoReader = decord.cpu = None
        patch.setitem(sys.modules, "decord", decord)
        from lmms_eval.models.chat.llava_hf import LlavaHf as Chat
        from lmms_eval.models.simple.llava_hf import LlavaHf as Simple

    options = {"device": "cpu", "dtype": "float32", "device_map": "cpu"}
    simple, chat = (adapter(str(folder), **options) for adapter in (Simple, Chat))
    # That of llava-1.5-7b-hf, which the tiny processor does not have.
    chat._image_processor.chat_template = VICUNA_TEMPLATE
    return simple, chat


@pytest.fixture(scope="module")
def config():
    return BenchmarkConfig(
        name="b", harness="lmms_eval", suite="micro", tasks=TASKS, limit=6, batch_size=4
    )


def run_harness(theirs, ours, kind, folder, **generation):
    """Score what we planned by lmms-eval's own evaluator, tasks and adapter."""
    from lmms_eval.evaluator import evaluate as harness

    own = {}
    for planned in ours.harness.tasks:
        planned.task.dataset.save_to_disk(folder / planned.name)
        defined = task_index._with_includes(task_index.find_task_file(planned.name))
        defined |= {
            "dataset_path": str(folder / planned.name),
            "dataset_name": None,
            "dataset_kwargs": {"load_from_disk": True},
            "generation_kwargs": {**(defined.get("generation_kwargs") or {}), **generation},
        }
        own[planned.name] = kind(config=defined)
        theirs.task_dict[planned.name] = own[planned.name].dataset
    return harness(
        theirs, own, bootstrap_iters=0, distributed_executor_backend="torchrun",
        cli_args=Namespace(output_path=str(folder), process_with_media=True),
    )  # fmt: skip


def test_it_equals_the_harness_with_its_own_model(config, adapters, mllms, tmp_path):
    ours = plan(config, offline=True)
    expected = run_harness(adapters[0], ours, ConfigurableTask, tmp_path)
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


def test_several_images_are_asked_about_as_by_the_chat_adapter(adapters, mllms, tmp_path):
    """Lists of images (SEED-Bench) and images among the text (MMMU), by lmms-eval's messages."""
    tasks = ("seedbench", "mmmu_val")
    data = {}
    for task in tasks:
        rows = datasets.Dataset.from_list(
            [ROWS[task], {**ROWS[task], "question": "Why <image 2>?"}]
        )
        if "image_3" in ROWS[task]:
            rows = rows.cast_column("image_3", datasets.Image())
        data[task] = str(tmp_path / f"{task}.parquet")
        rows.to_parquet(data[task])
    few = {"max_new_tokens": 12}
    config = BenchmarkConfig(
        name="b", harness="lmms_eval", suite="real", tasks=tasks, data=data, gen_kwargs=few,
        allow_missing=1.0,
    )  # fmt: skip
    ours = plan(config, offline=True)
    expected = run_harness(adapters[1], ours, ConfigurableMessagesTask, tmp_path, **few)
    found = evaluate(mllms["llava"], ours)
    answers = {(row["task"], row["doc_id"]): row["response"] for row in found.samples}
    assert len(set(answers.values())) > 2
    for name in tasks:
        for sample in expected["samples"][name]:
            assert answers[name, sample["doc_id"]].strip() == sample["filtered_resps"][0].strip()


@pytest.mark.broad
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


@pytest.mark.broad
@pytest.mark.parametrize("name", ["qwen2_vl", "internvl"])
def test_other_architectures_are_asked_as_well(name, config, mllms):
    small = config.model_copy(update={"tasks": ("gqa", "pope"), "limit": 2})
    found = evaluate(mllms[name], plan(small, offline=True))
    assert {m.task for m in found.metrics if m.headline} == {"gqa", "pope", "average"}
    assert len(found.samples) == 4
