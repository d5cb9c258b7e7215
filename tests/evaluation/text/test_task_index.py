"""Task files are found by name, quickly, whatever the name."""

import sys

import pytest

from bench.data.synthetic.world import TASKS
from bench.errors import UserError
from bench.evaluation.task_packages import pip_command
from bench.evaluation.text import task_definitions, task_index

INDEX = task_index.index_of(())


def definition(name):
    (outline,) = task_index.outlines(name, INDEX)
    return task_definitions.read_definition(outline.leaves[0])


def test_the_micro_tasks_are_the_tasks_of_the_world():
    assert set(task_index.FILES.micro_names()) == set(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_a_micro_task_changes_only_where_the_data_come_from(task):
    theirs = definition(task)
    ours = task_definitions.read_micro_definition(task_index.FILES.find_micro(task))
    changed = {key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key)}
    assert changed == {"custom_dataset", "dataset_kwargs"}
    assert ours["task"] == task


def test_the_nine_are_found_without_a_search():
    task_index._named_files.cache_clear()
    fresh = task_index.index_of(())
    assert all(fresh.find(task).yaml_path.is_file() for task in TASKS)
    assert task_index._named_files.cache_info().misses == 0


@pytest.mark.parametrize("name", ["lambada_openai", "gsm8k", "squadv2", "mmlu_anatomy", "ifeval"])
def test_any_other_task_is_found_too(name):
    entry = INDEX.find(name)
    assert task_index.load_yaml(entry.yaml_path, resolve_func=False)["task"] == name


def test_a_group_is_put_together_by_the_harness_without_its_data():
    (outline,) = task_index.outlines("mmlu", INDEX)
    assert len(outline.leaves) == 57
    assert next(iter(outline.groups)) == "mmlu"
    assert outline.chain("mmlu_anatomy") == ["mmlu_anatomy", "mmlu_stem", "mmlu"]
    (bbh,) = task_index.outlines("leaderboard_bbh", INDEX)
    assert len(bbh.leaves) == 24


def test_only_the_folders_of_the_names_asked_for_are_searched():
    task_index._named_files.cache_clear()
    fresh = task_index.index_of(())
    for name in ("gsm8k", "leaderboard_bbh", "ifeval"):
        task_index.outlines(name, fresh)
    assert task_index._named_files.cache_info().misses <= 6


@pytest.mark.slow  # builds the harness's own index of 14,000 files
def test_every_name_stands_for_what_it_does_in_the_harness():
    from lm_eval.tasks import TaskManager

    theirs = TaskManager().task_index
    for name, entry in theirs.items():
        found = INDEX.find(name)
        assert found is not None, name
        assert (found.kind, found.yaml_path) == (entry.kind, entry.yaml_path), name
        if entry.kind.name == "TAG":
            assert found.tags == entry.tags, name


@pytest.fixture
def two_folders(tmp_path, monkeypatch):
    """A harness of two folders, so that a search through all of them costs nothing."""
    files = {
        "arc/easy.yaml": "task: arc_easier\ntag: [first_tag, 'second tag']\n",
        "arc/hard.yaml": "include: _base_yaml\ntask: arc_harder  # the harder one\n",
        "arc/_base_yaml": "tag:\n  - first_tag\n",
        "bbh/group.yaml": "group: bbh_all\ntask:\n  - arc_easier\n  - {task: inner, x: 1}\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return task_index.NameIndex({}, tmp_path)


def test_a_tag_stands_for_its_tasks_also_those_that_include_it(two_folders):
    found = task_index.outlines("first_tag", two_folders)
    assert [outline.name for outline in found] == ["arc_easier", "arc_harder"]


def test_a_task_that_is_defined_in_its_group_is_not_built_either(two_folders):
    (outline,) = task_index.outlines("bbh_all", two_folders)
    assert [leaf.task_name for leaf in outline.leaves] == ["arc_easier", "bbh_all::inner"]
    assert outline.leaves[1].overrides == {"task": "bbh_all::inner", "x": 1}


def test_an_unknown_name_is_refused_with_the_nearest(two_folders):
    with pytest.raises(UserError, match=r"unknown task 'arc_esier'.*'arc_easier'"):
        task_index.outlines("arc_esier", two_folders)
    with pytest.raises(UserError, match=r"'arc_esy'.*'arc_easy'.*allowed: arc_challenge"):
        task_index.FILES.find_micro("arc_esy")


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_code_of_a_model_is_never_run(name):
    with pytest.raises(UserError, match=f"'{name}' executes generated code"):
        definition(name)


def test_a_package_that_is_not_installed_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    for name in list(sys.modules):
        if name.startswith("lm_eval.tasks.ifeval"):
            monkeypatch.delitem(sys.modules, name)
    said = r"'ifeval' of lm_eval needs langdetect, .* pip install 'lm_eval\[ifeval\]'"
    with pytest.raises(UserError, match=said):
        definition("ifeval")


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("langdetect", "pip install 'lm_eval[ifeval]'"),
        ("antlr4", "pip install 'lm_eval[math]'"),
        ("jieba", "pip install 'lm_eval[longbench]'"),
        ("nothing_of_this_name", "pip install 'nothing_of_this_name'"),
    ],
)
def test_the_command_installs_the_harness_with_the_right_extra(module, command):
    assert pip_command("lm_eval", module) == command
