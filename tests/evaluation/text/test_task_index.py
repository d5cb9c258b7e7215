"""Task files are found by name, quickly, whatever the name."""

import subprocess
import sys
import time

import pytest

from bench.data.synthetic.world import TASKS
from bench.errors import UserError
from bench.evaluation.text import task_data


def test_the_micro_tasks_are_the_tasks_of_the_world():
    assert set(task_data.FILES.micro_names()) == set(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_a_micro_task_changes_only_where_the_data_come_from(task):
    theirs = task_data.read_task_definition(task_data.find_task_file(task))
    ours = task_data.read_task_definition(task_data.FILES.find_micro(task))
    changed = {key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key)}
    assert changed == {"custom_dataset", "dataset_kwargs"}
    assert ours["task"] == task


def test_the_nine_are_found_without_a_search():
    task_data.find_task_file.cache_clear()
    began = time.perf_counter()
    files = [task_data.find_task_file(task) for task in TASKS]
    assert time.perf_counter() - began < 0.5
    assert all(file.is_file() for file in files)


@pytest.mark.parametrize("name", ["lambada_openai", "gsm8k", "squadv2", "mmlu_anatomy"])
def test_any_other_task_is_found_too(name):
    assert task_data.load_yaml(task_data.find_task_file(name), resolve_func=False)["task"] == name


@pytest.mark.parametrize("name", ["mmlu", "ai2_arc"])
def test_a_group_or_a_tag_has_no_file_of_its_own(name):
    assert task_data.find_task_file(name) is None


@pytest.mark.slow  # builds the harness's full index
def test_a_tag_stands_for_its_tasks_and_a_group_names_its_data():
    assert task_data.expand_tag("ai2_arc") == ["arc_challenge", "arc_easy"]
    assert task_data.expand_tag("mmlu") == ["mmlu"]
    assert task_data.expand_tag("boolq") == ["boolq"]
    assert task_data.group_data_sets("mmlu") == ["cais/mmlu"]
    with pytest.raises(UserError, match="unknown task 'acc'"):
        task_data.expand_tag("acc")


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown task 'arc_esy'.*'arc_easy'"):
        task_data.find_task_file("arc_esy")
    with pytest.raises(UserError, match=r"'arc_esy'.*'arc_easy'.*allowed: arc_challenge"):
        task_data.FILES.find_micro("arc_esy")


def test_code_of_a_model_is_never_run():
    with pytest.raises(UserError, match="'humaneval' executes generated code"):
        task_data.read_task_definition(task_data.find_task_file("humaneval"))


def test_importing_evaluation_is_light():
    heavy = ("torch", "lm_eval", "pandas", "datasets", "transformers")
    code = f"import bench.evaluation, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
