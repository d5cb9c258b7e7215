"""Task files of a user's own: found, trusted or not, scored as lm-eval scores them."""

import pytest

from bench.errors import UserError
from bench.evaluation import BenchmarkConfig, evaluate, plan
from bench.evaluation.text import task_index
from tests.evaluation.text.own_tasks import row, write_rows, write_tasks


@pytest.fixture
def folder(tmp_path):
    return write_tasks(tmp_path / "mine")


def planned(folder, *tasks, **settings):
    settings = {"num_fewshot": None, "include": (str(folder),), **settings}
    return plan(BenchmarkConfig(name="mine", tasks=tasks, **settings), offline=True)


def test_tasks_of_each_kind_are_scored_from_files_beside_them(model, folder):
    names = ("colour_choice", "colour_written", "colour_last", "colour_whole")
    plan_ = planned(folder, *names)
    assert {source.origin for source in plan_.sources.values()} == {"file"}
    found = evaluate(model, plan_)
    shown = {m.task: m for m in found.metrics if m.headline}
    assert {name: shown[name].n for name in names} == {
        "colour_choice": 7, "colour_written": 5, "colour_last": 5, "colour_whole": 5,
    }  # fmt: skip
    assert {m.filter for m in found.metrics if m.task == "colour_written"} == {"strict", "loose"}


def test_a_changed_byte_of_the_data_is_seen_at_once(folder):
    before = planned(folder, "colour_choice")
    file = folder / "choice.jsonl"
    stamp = file.stat()
    file.write_text(file.read_text().replace("number 3", "number 9"))
    import os

    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    after = planned(folder, "colour_choice")
    assert before.fingerprints != after.fingerprints
    (task,) = after.harness.leaves
    assert "number 9" in task.eval_docs[3]["question"]


def test_where_a_folder_lies_changes_nothing(folder, tmp_path):
    elsewhere = write_tasks(tmp_path / "other" / "place")
    one, other = (planned(each, "colour_written") for each in (folder, elsewhere))
    assert one.fingerprints == other.fingerprints
    # The files that a definition names are absolute in neither.
    assert one.definitions == other.definitions


CODE = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
def process_docs(dataset):
    return dataset.select(range(2))
"""


@pytest.fixture
def with_code(folder):
    (folder / "utils.py").write_text(CODE)
    (folder / "coded.yaml").write_text(
        "include: choice.yaml\ntask: colour_coded\nprocess_docs: !function utils.process_docs\n"
    )
    return folder


def test_python_in_a_folder_runs_only_with_consent(with_code):
    with pytest.raises(UserError, match=r"coded.yaml names Python code.*benchmark.trust_code=true"):
        planned(with_code, "colour_coded")
    # Indexing the folder runs nothing either.
    planned(with_code, "colour_choice")
    assert not (with_code / "ran").exists()
    found = planned(with_code, "colour_coded", trust_code=True)
    assert (with_code / "ran").exists()
    assert len(found.harness.leaves[0].eval_docs) == 2


def test_the_code_of_a_folder_is_part_of_the_definition(with_code, forget_sources):
    before = planned(with_code, "colour_coded", trust_code=True).definitions
    file = with_code / "utils.py"
    file.write_text(file.read_text().replace("range(2)", "range(1)"))
    forget_sources()
    assert planned(with_code, "colour_coded", trust_code=True).definitions != before


@pytest.mark.parametrize("tail", [
    "metric_list: [{metric: colour_metric, aggregation: mean, higher_is_better: true}]\n",
    "metric_list: [{metric: f1, hf_evaluate: true, aggregation: mean}]\n",
])  # fmt: skip
def test_a_metric_that_is_fetched_with_its_code_is_refused(folder, tail):
    (folder / "fetched.yaml").write_text(f"include: choice.yaml\ntask: colour_fetched\n{tail}")
    with pytest.raises(UserError, match="is fetched from the hub with its code"):
        planned(folder, "colour_fetched")


def test_an_included_file_names_code_as_well(with_code):
    (with_code / "inner.yaml").write_text("include: coded.yaml\ntask: colour_inner\n")
    with pytest.raises(UserError, match=r"task 'colour_inner'.*coded.yaml names Python code"):
        planned(with_code, "colour_inner")


@pytest.mark.parametrize("place", ["process_docs", "doc_to_text"])
def test_code_that_raises_is_named_by_file_and_line(folder, place):
    code = {
        "process_docs": "def mine(rows):\n    return rows.map(lambda row: {'x': row['nosuch']})\n",
        "doc_to_text": "def mine(row):\n    return row['nosuch']\n",
    }[place]
    (folder / "own.py").write_text(code)
    (folder / "raising.yaml").write_text(
        f"include: choice.yaml\ntask: colour_raising\n{place}: !function own.mine\n"
    )
    with pytest.raises(UserError, match=r"KeyError: 'nosuch'.*/own\.py:2\)"):
        planned(folder, "colour_raising", trust_code=True)


@pytest.mark.parametrize("content", ["task: [colour_own]", "task: [colour_inner]"])
def test_a_group_that_contains_itself_is_refused(folder, content):
    (folder / "own.yaml").write_text(f"group: colour_own\n{content}\n")
    (folder / "inner.yaml").write_text("group: colour_inner\ntask: [colour_own]\n")
    with pytest.raises(UserError, match="the group 'colour_own' contains itself"):
        planned(folder, "colour_own")


@pytest.mark.parametrize("shots", ["-3", "many", "1.5", "true"])
def test_a_number_of_shots_in_a_file_that_is_none_is_refused(folder, shots):
    (folder / "own.yaml").write_text(
        f"include: choice.yaml\ntask: colour_own\nnum_fewshot: {shots}\n"
    )
    with pytest.raises(UserError, match=r"task 'colour_own': num_fewshot=.*from 0 on is needed"):
        planned(folder, "colour_own")


def test_examples_of_a_split_that_is_not_there_are_refused(folder):
    """They would come from the scored split, and the record would say nothing."""
    (folder / "own.yaml").write_text(
        "include: choice.yaml\ntask: colour_own\nfewshot_split: nosuch\n"
    )
    with pytest.raises(UserError, match="'colour_own': its data have no fewshot_split=nosuch"):
        planned(folder, "colour_own", num_fewshot=2)
    planned(folder, "colour_own", num_fewshot=0)


@pytest.mark.parametrize("sampler", ["first_n", "default"])
@pytest.mark.parametrize(("split", "most"), [("train", 10), ("test", 6)])
def test_more_examples_than_there_are_are_refused(folder, sampler, split, most):
    """A question is never its own example, so its split has one less for it."""
    (folder / "own.yaml").write_text(
        "include: choice.yaml\ntask: colour_own\n"
        f"fewshot_split: {split}\nfewshot_config: {{sampler: {sampler}}}\n"
    )
    with pytest.raises(UserError, match=f"num_fewshot={most + 1}, but its data have {most} exam"):
        planned(folder, "colour_own", num_fewshot=most + 1)
    assert planned(folder, "colour_own", num_fewshot=most)


def test_an_aggregation_that_does_not_exist_is_refused_before_scoring(folder):
    (folder / "own.yaml").write_text(
        "include: choice.yaml\ntask: colour_own\n"
        "metric_list:\n  - metric: acc\n    aggregation: nosuch\n"
    )
    with pytest.raises(UserError, match="the aggregation of its metric 'acc' does not exist"):
        planned(folder, "colour_own")


def test_an_empty_file_of_rows_is_named(folder):
    (folder / "choice.jsonl").write_text("")
    with pytest.raises(UserError, match=r"cannot be read: choice\.jsonl is empty"):
        planned(folder, "colour_choice")


def test_two_files_with_one_task_are_refused(folder):
    """lm-eval would use one of them without a word."""
    for name in ("one.yaml", "two.yaml"):
        (folder / name).write_text("include: choice.yaml\ntask: colour_own\n")
    with pytest.raises(UserError, match=r"one.yaml and two.yaml both define .* 'colour_own'"):
        planned(folder, "colour_choice")


@pytest.mark.parametrize(("name", "content", "said"), [
    ("twice.yaml", "include: choice.yaml\ntask: colour_own\ntask: colour_other\n",
     r"twice.yaml sets 'task' in line 2 and again in line 3: keep one"),
    ("twice.yaml", "include: choice.yaml\ntask: own\nmetadata:\n  a: 1\n  'a': 2\n", "sets 'a' in"),
    # Files whose names end otherwise are read only where another one includes them.
    ("base_yaml", "num_fewshot: 0\nnum_fewshot: 1\n", r"base_yaml sets 'num_fewshot' in line 1"),
])  # fmt: skip
def test_a_key_that_is_set_twice_is_refused(folder, name, content, said):
    """YAML's loaders would use the last value without a word."""
    (folder / name).write_text(content)
    (folder / "more.yaml").write_text("include: base_yaml\ntask: colour_more\n")
    if name != "base_yaml":
        (folder / "base_yaml").write_text("num_fewshot: 0\n")
    with pytest.raises(UserError, match=said):
        planned(folder, "colour_choice")


def test_anchors_and_merges_are_no_repetition(folder):
    (folder / "merged.yaml").write_text(
        "include: choice.yaml\ntask: colour_merged\nmetadata:\n  one: &one {a: 1, b: 2}\n"
        "  two: &two {c: 3}\n  both: {<<: *one, <<: *two, a: 4}\n  again: *one\n"
    )
    assert set(planned(folder, "colour_merged").sources) == {"colour_merged"}


@pytest.mark.parametrize("template", [
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "{{ ''.__class__.__mro__ }}",
])  # fmt: skip
def test_a_template_reaches_no_python(folder, template, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "sly.yaml").write_text(
        f'include: choice.yaml\ntask: colour_sly\ndoc_to_text: "{template}"\n'
    )
    with pytest.raises(UserError, match="task 'colour_sly' of lm-eval cannot be set up"):
        planned(folder, "colour_sly")
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: f / "nowhere", "nowhere: no such file or folder"),
        (lambda f: f / "choice.yaml", "choice.yaml is a file: give the folder in which it lies"),
        (lambda f: write_rows(f / "x.jsonl", []).parent / "empty", "no task file NAME.yaml"),
    ],
)
def test_a_folder_without_tasks_is_one_sentence(folder, change, reason):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=reason):
        planned(change(folder), "colour_choice")


def test_a_broken_file_is_named(folder):
    (folder / "broken.yaml").write_text("task: [unclosed")
    with pytest.raises(UserError, match=r"broken.yaml cannot be read as a task file"):
        planned(folder, "colour_choice")


def test_a_file_that_is_not_there_is_named_with_the_cure(folder):
    (folder / "choice.jsonl").unlink()
    with pytest.raises(UserError, match=r"'choice.jsonl' is not in .*benchmark.data.colour_choice"):
        planned(folder, "colour_choice")


def test_a_data_set_of_the_hub_is_named_with_the_cure(folder):
    (folder / "far.yaml").write_text(
        "include: choice.yaml\ntask: colour_far\ndataset_path: someone/colours\n"
        "dataset_kwargs: null\n"
    )
    with pytest.raises(UserError, match=r"someone/colours.*bench prefetch.*benchmark.data.TASK"):
        planned(folder, "colour_far")


def test_an_unknown_task_is_refused_with_the_nearest_of_ones_own(folder, monkeypatch):
    # Without the harness's 14,000 names, which take seconds to list.
    monkeypatch.setattr(task_index, "_task_folders", lambda root: ())
    with pytest.raises(UserError, match=r"unknown task 'colour_chioce'.*'colour_choice'"):
        planned(folder, "colour_chioce")


def test_files_of_ones_own_may_replace_those_of_a_task(model, folder, tmp_path):
    file = write_rows(tmp_path / "mine.jsonl", map(row, range(3)))
    found = evaluate(model, planned(folder, "colour_choice", data={"colour_choice": str(file)}))
    assert {m.n for m in found.metrics} == {3}
