"""The hash of a task covers what its harness reads of it, and the code that this names."""

import functools
import importlib.util

import lm_eval.api.registry
import pytest

from bench.evaluation import task_planning
from bench.evaluation.task_planning import (
    TaskFiles,
    content_fingerprint,
    definition_hash,
    folders_of,
)

UTILS = """
from . import shared
def process_docs(docs): return docs
def score(items): return shared.factor * sum(items)
class Scorer:
    threshold = 1
"""


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """A harness with two task folders, installed as a package."""
    for folder in ("", "tasks", "tasks/mine", "tasks/other"):
        (tmp_path / "pretended" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "pretended" / folder / "__init__.py").touch()
    tasks = tmp_path / "pretended" / "tasks"
    (tasks / "mine" / "utils.py").write_text(UTILS)
    (tasks / "mine" / "shared.py").write_text("factor = 1")
    (tasks / "mine" / "prompts.yaml").write_text("text: one")
    (tasks / "other" / "utils.py").write_text(UTILS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return TaskFiles("pretended", "pretended", ours=tmp_path)


@pytest.fixture
def hashed(harness, forget_sources):
    """Return the hash of a definition as a new process would see it."""

    def of(**settings):
        forget_sources()
        file = harness.harness_folder / "mine" / "utils.py"
        spec = importlib.util.spec_from_file_location("pretended.tasks.mine.utils", file)
        utils = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(utils)
        definition = {
            "process_docs": utils.process_docs,
            "metric_list": [{"metric": utils.score, "aggregation": "mean"}],
            "filter_list": [{"name": "strict", "filter": [{"function": "take_first"}]}],
            "doc_to_text": "{{question}}",
            **settings,
        }
        return definition_hash(definition, harness)

    return of


def test_equal_definitions_are_equal(hashed):
    assert hashed() == hashed()


@pytest.mark.parametrize("settings", [
    {"doc_to_text": "{{question}} "}, {"num_fewshot": 1}, {"process_docs": None},
    {"generation_kwargs": {"until": ["\n"], "do_sample": False}},
    {"filter_list": [{"name": "strict", "filter": [{"function": "take_last"}]}]},
    {"metric_list": [{"metric": sum, "aggregation": "mean"}]},
    {"metric_list": [{"metric": functools.partial(max, 1), "aggregation": "mean"}]},
], ids=str)  # fmt: skip
def test_a_changed_setting_is_another_task(hashed, settings):
    assert hashed(**settings) != hashed()


def test_arguments_of_a_function_count(hashed):
    bound = [hashed(process_results=functools.partial(max, key)) for key in (1, 2)]
    assert bound[0] != bound[1]


@pytest.mark.parametrize("name", ["mine/utils.py", "mine/shared.py", "mine/prompts.yaml"])
def test_a_changed_file_of_the_tasks_code_is_another_task(harness, hashed, name):
    before = hashed()
    file = harness.harness_folder / name
    file.write_text(file.read_text() + "\n# changed\n")
    assert hashed() != before


@pytest.mark.parametrize("name", ["other/utils.py", "mine/README.md"])
def test_any_file_of_a_package_of_the_users_own_counts(harness, hashed, name):
    """What its code reads cannot be known; installed harnesses count by what is imported."""
    before = hashed()
    (harness.harness_folder / name).write_text("# changed\n")
    assert hashed() != before


def libraries_at(monkeypatch, **versions):
    """Pretend that other versions of libraries are installed, by the names that pip knows."""
    monkeypatch.setattr(
        task_planning, "library_version", lambda name: versions.get(name.replace("-", "_"), "1.0")
    )


@pytest.mark.sample(1)
@pytest.mark.parametrize(("metric", "library"), [
    ("f1", "scikit_learn"), ("mcc", "scikit_learn"), ("bleu", "sacrebleu"), ("ter", "sacrebleu"),
])  # fmt: skip
def test_the_library_that_computes_a_metric_counts_by_its_version(
    hashed, monkeypatch, metric, library
):
    computing = {"aggregation": lm_eval.api.registry.get_metric_aggregation(metric)}
    libraries_at(monkeypatch)
    before = hashed(**computing), hashed()
    libraries_at(monkeypatch, **{library: "1.1"})
    assert hashed(**computing) != before[0]
    # What the task does not use is no part of it.
    assert hashed() == before[1]


def test_a_library_that_the_tasks_code_imports_counts_by_its_version(harness, hashed, monkeypatch):
    shared = harness.harness_folder / "mine" / "shared.py"
    shared.write_text("factor = 1\ndef parse(text):\n    from sympy.parsing import latex\n")
    libraries_at(monkeypatch)
    before = hashed()
    libraries_at(monkeypatch, sympy="1.1")
    assert hashed() != before


@pytest.mark.broad
def test_objects_do_not_count_by_their_place_in_memory(hashed):
    class Sampler:
        def __init__(self, seed):
            self.seed = seed

    marks = [hashed(sampler=Sampler(seed)) for seed in (1, 1, 2)]
    assert marks[0] == marks[1] != marks[2]


def test_documents_of_a_tasks_own_code_count_by_content():
    one, other = ([{"question": text}] for text in ("a", "b"))
    assert content_fingerprint({"test": one}) != content_fingerprint({"test": other})


def test_where_a_task_lies_is_no_part_of_it(hashed):
    marks = [hashed(metadata={"version": 1, "config_source": place}) for place in ("/a", "/b")]
    assert marks[0] == marks[1]


def test_folders_of_all_included_files_are_found(tmp_path):
    for name, content in {
        "mine/task.yaml": "include: ../shared/base.yaml\ntask: mine",
        "shared/base.yaml": "include: '../deep/deeper.yaml'",
        "deep/deeper.yaml": "include: ../mine/task.yaml",
        "other/task.yaml": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    expected = {tmp_path.resolve() / name for name in ("mine", "shared", "deep")}
    assert folders_of(tmp_path / "mine" / "task.yaml") == expected
