"""Tasks by lmms-eval's names: planned on files, images in their places, and what is refused."""

import datasets
import pytest
from PIL import Image

from bench.errors import UserError
from bench.evaluation import BenchmarkConfig, evaluate, plan
from bench.evaluation.multimodal import task_index
from bench.evaluation.multimodal.prompts import PromptEncoder
from bench.evaluation.multimodal.task_needs import refuse_needs


def picture(shade, size=(20, 20)):
    return Image.new("RGB", size, (shade, 255 - shade, 90))


CHOICES = {"choice_a": "one", "choice_b": "two", "choice_c": "three", "choice_d": "four"}
MMMU = {
    "id": "validation_Art_1", "question": "Is <image 1> older than <image 2>?",
    "options": "['yes', 'no']", "question_type": "multiple-choice", "answer": "A",
    "image_1": picture(10), "image_2": picture(200), "image_3": None,
}  # fmt: skip
ROWS = {
    "ocrbench": {
        "image": picture(1), "question": "What is written?", "answer": ["no"],
        "dataset": "IIIT5K", "question_type": "Regular Text Recognition",
    },
    "chartqa": {
        "image": picture(2), "question": "How much?", "answer": "3", "type": "human_test",
    },
    "docvqa_val": {
        "image": picture(3), "question": "Who?", "answers": ["B", "b"], "questionId": "7",
    },
    "mmmu_val": MMMU,
    "mmstar": {
        "index": 0, "image": picture(4), "question": "Which? A: red, B: blue", "answer": "A",
        "category": "math", "l2_category": "geometry",
    },
    "realworldqa": {"image": picture(5), "question": "Which way?", "answer": "C"},
    "ai2d": {"image": picture(6), "question": "What?", "options": ["a", "b"], "answer": "1"},
    "seedbench": {
        "image": [picture(7), picture(70)], "question": "How many?", "answer": "A",
        "data_type": "image", "question_id": "q1", **CHOICES,
    },
    "vlmsareblind": {
        "image": picture(8), "question": "", "prompt": "How many circles?", "groundtruth": "5",
        "task": "Circled Letter",
    },
    "muirbench": {
        "image_list": [picture(8), picture(80), picture(160)], "question": "Which is <image>?",
        "options": ["<image>", "<image>"], "answer": "A", "idx": "1", "task": "Counting",
        "image_relation": "Ordered_Pages", "image_type": "Slides",
    },
}  # fmt: skip
HEADLINES = {"mmstar": "average", "seedbench": "seed_all", "vlmsareblind": "accuracy"}


@pytest.fixture
def files(tmp_path):
    """A parquet file of two rows per task, as the hub's data sets store them."""
    paths = {}
    for task, one in ROWS.items():
        rows = datasets.Dataset.from_list([one, one | {"question": one["question"] + " Say."}])
        if "image_3" in one:
            rows = rows.cast_column("image_3", datasets.Image())
        paths[task] = str(tmp_path / f"{task}.parquet")
        rows.to_parquet(paths[task])
    return paths


def config(files, *tasks, **settings):
    data = {task: files[task] for task in tasks}
    headlines = {task: HEADLINES[task] for task in tasks if task in HEADLINES}
    settings = {"metrics": headlines, "batch_size": "auto", **settings}
    return BenchmarkConfig(
        name="b", harness="lmms_eval", suite="real", tasks=tasks, data=data, **settings
    )


def test_the_common_tasks_are_scored_by_name(files, mllms):
    benchmark = config(files, *ROWS, gen_kwargs={"max_new_tokens": 3}, allow_missing=0.5)
    found = evaluate(mllms["qwen2_vl"], plan(benchmark, offline=True))
    shown = {m.task: m.metric for m in found.metrics if m.headline}
    assert shown == {
        "ocrbench": "ocrbench_accuracy", "chartqa": "relaxed_overall", "docvqa_val": "anls",
        "mmmu_val": "mmmu_acc", "mmstar": "average", "realworldqa": "exact_match",
        "ai2d": "exact_match", "seedbench": "seed_all", "muirbench": "muirbench_score_overall",
        "vlmsareblind": "accuracy", "average": "mean",
    }  # fmt: skip
    # A table by kind of question, in place of a number.
    (by_kind,) = [m for m in found.metrics if m.metric == "accuracy_by_task"]
    assert by_kind.value is None
    rows = {row["task"]: row for row in found.samples}
    assert all(max(row["answer_tokens"]) <= 3 for row in found.samples)
    assert rows["seedbench"]["prompt"].count("<img>") == 2
    # MuirBench's questions and options say themselves where their images stand.
    assert "Which is <image>? Say.\nA. <image>\nB. <image>" in rows["muirbench"]["prompt"]


def test_several_images_stand_in_their_places(files, mllms):
    settings = {"gen_kwargs": {"max_new_tokens": 2}, "allow_missing": 0.5}
    benchmark = config(files, "mmmu_val", "seedbench", **settings)
    found = evaluate(mllms["qwen2_vl"], plan(benchmark, offline=True))
    image = "<img><image></img>"
    assert found.samples[0]["prompt"].startswith(
        f"[user]Is{image}older than{image}?\nA. yes\nB. no"
    )
    again = evaluate(mllms["qwen2_vl"], plan(benchmark, offline=True))
    for column in ("doc_hash", "question_hash", "prompt_hash", "image_hash"):
        assert [r[column] for r in again.samples] == [r[column] for r in found.samples]
    # The order of the images counts, and not only what they show.
    swapped = MMMU | {"image_1": MMMU["image_2"], "image_2": MMMU["image_1"]}
    rows = datasets.Dataset.from_list([swapped]).cast_column("image_3", datasets.Image())
    rows.to_parquet(files["mmmu_val"])
    other = evaluate(mllms["qwen2_vl"], plan(benchmark, offline=True))
    assert other.samples[0]["image_hash"] != found.samples[0]["image_hash"]


def test_interleaved_parts_are_encoded_in_order(mllms):
    for model in mllms.values():
        prompts = PromptEncoder(model, None)
        parts = ["First", picture(1), "then", picture(2), "what?"]
        prompt = prompts.render_parts(parts)
        images = [part for part in parts if not isinstance(part, str)]
        whole = prompts.encode(prompt, images)
        assert whole["input_ids"].shape[0] == 1
        words = [prompt.index(text) for text in ("First", "then", "what?")]
        assert words == sorted(words)


def test_a_task_whose_image_is_absent_is_refused_with_the_row(files):
    rows = datasets.Dataset.from_list([MMMU | {"image_2": None}, MMMU])
    for column in ("image_2", "image_3"):
        rows = rows.cast_column(column, datasets.Image())
    rows.to_parquet(files["mmmu_val"])
    with pytest.raises(UserError, match=r"1 of 2 rows have no answer: its image cannot be opened"):
        plan(config(files, "mmmu_val"), offline=True)


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("mmvet", "is scored by a judge's API"),
        ("llava_in_the_wild", "is scored by a judge's API"),
        ("videomme", "needs video"),
        ("nextqa_mc_test", "needs video"),
        ("nextqa_oe_val", "needs video"),
    ],
)
def test_what_cannot_be_scored_here_is_refused_by_name(task, reason):
    file = task_index.find_task_file(task)
    with pytest.raises(UserError, match=f"task '{task}' of lmms-eval {reason}"):
        task_index.read_task_definition(file, BenchmarkConfig(name="b", harness="lmms_eval"))


def test_what_a_file_says_is_heeded_before_its_code_is_imported(monkeypatch):
    """NExT-QA's module downloads a dictionary, which without a network takes minutes."""
    imported = []
    real = task_index.load_yaml_config

    def loaded(*args, mode):
        imported.append(mode)
        return real(*args, mode=mode)

    monkeypatch.setattr(task_index, "load_yaml_config", loaded)
    with pytest.raises(UserError, match="needs video"):
        task_index.read_task_definition(
            task_index.find_task_file("nextqa_mc_test"),
            BenchmarkConfig(name="b", harness="lmms_eval"),
        )
    assert imported == ["simple"]


def test_what_can_be_scored_here_is_not_refused():
    for task in (*ROWS, *task_index.FILES.micro_names()):
        definition = task_index._with_includes(task_index.find_task_file(task))
        refuse_needs(task, definition, task_index.FILES.harness_folder)


def test_an_unknown_setting_of_generation_is_refused(files):
    with pytest.raises(UserError, match=r"'max_gen_toks': .*allowed: max_new_tokens, until"):
        plan(config(files, "chartqa", gen_kwargs={"max_gen_toks": 3}), offline=True)
