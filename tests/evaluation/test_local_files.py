"""A user's own files in place of a task's data set."""

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from bench.data.synthetic.world import TASKS, documents_by_split
from bench.errors import UserError
from bench.evaluation import BenchmarkConfig, PerplexityConfig, evaluate, plan
from bench.evaluation.local_files import LABELS, TEXT_COLUMNS
from bench.evaluation.text.task_definitions import restrict_to_splits

REAL = Path(__file__).parents[2] / "shared" / "data" / "real_tasks"


def rows_of(task, split=None, count=8):
    data = documents_by_split(task)
    return data[split or ("test" if "test" in data else "validation")][:count]


def write(file, rows):
    text = "\n".join(map(json.dumps, rows))
    if file.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(json.dumps(rows) if file.suffix == ".json" else text)
    return str(file)


def planned(task, path, **options):
    options = {"tasks": (task,), "data": {task: str(path)}} | options
    return plan(BenchmarkConfig(name="local", **options), offline=True)


def test_every_task_has_its_columns_listed():
    assert set(TEXT_COLUMNS) == set(LABELS) == set(TASKS)


@pytest.mark.sample(3)
@pytest.mark.parametrize("task", TASKS)
def test_a_file_of_the_same_documents_gives_the_same_answers(task, model, tmp_path):
    embedded = plan(BenchmarkConfig(name="m", suite="micro", tasks=(task,), limit=8), offline=True)
    local = planned(task, write(tmp_path / "mine.parquet", rows_of(task)))
    ours, theirs = evaluate(model, local), evaluate(model, embedded)
    assert ours.samples == theirs.samples
    assert [m.split for m in ours.metrics] == [m.split for m in theirs.metrics]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".json.gz"])
def test_every_format_is_read_and_hashed(tmp_path, suffix):
    file = tmp_path / f"mine{suffix}"
    found = planned("piqa", write(file, rows_of("piqa")), suite="micro")
    assert len(found.harness.tasks[0].tasks["piqa"].eval_docs) == 8
    source = found.sources["piqa"]
    assert (source.origin, source.revision) == ("file", None)
    assert source.fingerprint == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("task", ["arc_easy", "boolq", "hellaswag"])
def test_examples_from_the_scored_file_never_show_its_answer(task, tmp_path, model):
    found = planned(task, write(tmp_path / "mine.parquet", rows_of(task)), num_fewshot=3)
    samples = evaluate(model, found).samples
    questions = [sample["prompt"].split("\n\n")[-1] for sample in samples]
    assert len(set(questions)) == 8
    for sample, question in zip(samples, questions, strict=True):
        assert sample["prompt"].count(question) == 1


def test_a_folder_gives_a_split_per_file(tmp_path, model):
    write(tmp_path / "test.parquet", rows_of("arc_easy"))
    write(tmp_path / "train.jsonl", rows_of("arc_easy", "train"))
    found = planned("arc_easy", tmp_path, num_fewshot=2)
    shown = {row["question"] for row in rows_of("arc_easy", "train")}
    prompt = evaluate(model, found).samples[0]["prompt"]
    assert sum(question in prompt for question in shown) == 2


def refusal(task, path, **options):
    with pytest.raises(UserError) as refused:
        planned(task, path, **options)
    return str(refused.value)


def test_a_missing_column_is_named(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "sol2"} for row in rows_of("piqa")]
    message = refusal("piqa", write(tmp_path / "mine.parquet", rows))
    assert message.startswith(f"benchmark.data.piqa={tmp_path}/mine.parquet")
    assert "no column 'sol2'" in message
    assert "goal, sol1, sol2, label" in message


def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path):
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"not a table")
    other = tmp_path / "mine.csv"
    other.write_text("goal,sol1")
    cut = tmp_path / "cut.json.gz"
    write(cut, rows_of("piqa"))
    cut.write_bytes(cut.read_bytes()[:-20])
    damaged = tmp_path / "damaged.json.gz"
    content = bytearray(gzip.compress(json.dumps(rows_of("piqa")).encode()))
    content[12:40] = bytes(28)
    damaged.write_bytes(content)
    for file in (cut, damaged):
        assert f"{file.name} cannot be read as .gz" in refusal("piqa", file)
    assert "no such file" in refusal("piqa", tmp_path / "nowhere.parquet")
    assert "cannot be read as .parquet" in refusal("piqa", broken)
    assert "must be one of .parquet, .jsonl" in refusal("piqa", other)
    assert "has no rows" in refusal("piqa", write(tmp_path / "empty.jsonl", []))
    assert "must contain validation.parquet" in refusal("piqa", tmp_path)
    assert "cannot be read" in refusal("piqa", write(tmp_path / "list.json", [1, 2]))


UNLABELLED = {
    "boolq": -1, "rte": -1, "piqa": "x", "hellaswag": "", "winogrande": "", "arc_easy": "E",
    "arc_challenge": "", "openbookqa": "?", "mathqa": "f",
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_a_row_without_an_answer_is_named(task, tmp_path):
    rows, (column, _) = rows_of(task), LABELS[task]
    rows[2] = rows[2] | {column: UNLABELLED[task]}
    message = refusal(task, write(tmp_path / "mine.jsonl", rows))
    assert f"mine.jsonl: row 2 (line 3) has {column}={UNLABELLED[task]!r}, which" in message


def test_a_letter_beyond_the_options_and_options_without_letters_are_named(tmp_path):
    rows = rows_of("mathqa")
    rows[2] |= {"options": "a ) 1 , b ) 2 , c ) 3 , d ) 4", "correct": "e"}
    message = refusal("mathqa", write(tmp_path / "four.jsonl", rows))
    # The harness reads option d only up to a comma.
    assert "row 2 (line 3) has correct='e', which is not an answer" in message
    assert "one of 'a', 'b', 'c': use" in message
    rows[2] |= {"options": "see the picture", "correct": "a"}
    message = refusal("mathqa", write(tmp_path / "none.jsonl", rows))
    assert "row 2 (line 3) has options='see the picture'; this task needs a string such" in message


def test_an_empty_path_is_refused_and_null_is_none():
    with pytest.raises(ValidationError, match=r"benchmark\.data\.piqa is empty: give a path"):
        BenchmarkConfig(name="b", tasks=("piqa",), data={"piqa": ""})
    assert BenchmarkConfig(name="b", tasks=("piqa",), data={"piqa": None}).data == {}
    with pytest.raises(ValidationError, match="at least 1 character"):
        PerplexityConfig(text="english", path="")


def test_rows_that_do_not_fit_another_task_are_refused(tmp_path):
    path = write(tmp_path / "mine.parquet", rows_of("piqa"))
    assert "the rows do not fit lambada_openai" in refusal("lambada_openai", path)


def test_a_key_that_names_no_task_is_refused_with_the_nearest():
    message = refusal("piqa", "x.parquet", data={"piqqa": "x.parquet"})
    assert "unknown task in benchmark.data 'piqqa': did you mean 'piqa'?" in message


def test_restricting_a_definition_keeps_what_is_there():
    defined = {"training_split": "train", "validation_split": "dev", "test_split": "test"}
    whole = restrict_to_splits(defined, {"train", "dev", "test"})
    assert {**whole, "fewshot_split": None} == {**defined, **whole}
    alone = restrict_to_splits({**defined, "test_split": None}, {"dev"})
    assert alone["test_split"] == alone["fewshot_split"] == "dev"
    assert alone["training_split"] is alone["validation_split"] is None


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real data sets' files")
@pytest.mark.parametrize("task", ["arc_easy", "piqa", "openbookqa"])
def test_files_of_the_real_data_sets_are_scored(task, model):
    evaluation = evaluate(model, planned(task, REAL / f"{task}.parquet", limit=10))
    assert {(m.task, m.metric, m.n) for m in evaluation.metrics} == {
        (task, "acc", 10),
        (task, "acc_norm", 10),
    }
