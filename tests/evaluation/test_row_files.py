"""Every row of a user's file is read before a weight is; a fault is one sentence with its place."""

import gzip
import json
import os
import tracemalloc

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from bench.data.synthetic.world import documents_by_split
from bench.errors import UserError
from bench.evaluation import row_files
from bench.evaluation.local_files import RowUse, load_local_rows
from bench.evaluation.row_files import RowFile, read_rows

BOM = b"\xef\xbb\xbf"


def rows_of(task, split="validation", count=6):
    return [dict(row) for row in documents_by_split(task)[split][:count]]


def lines(rows):
    return "\n".join(map(json.dumps, rows)).encode()


def loaded(path, task="piqa", **use):
    return load_local_rows(task, str(path), RowUse("validation", **use))


def refusal(path, task="piqa", **use):
    with pytest.raises(UserError) as refused:
        loaded(path, task, **use)
    message = str(refused.value)
    assert "\n" not in message and message.startswith(f"benchmark.data.{task}={path}")
    return message


def labels(path, task="piqa", **use):
    column = {"arc_easy": "answerKey", "winogrande": "answer"}.get(task, "label")
    return loaded(path, task, **use).splits["validation"][column]


WRITTEN = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)


@given(st.lists(st.dictionaries(st.sampled_from("abc"), WRITTEN), min_size=1), st.data())
def test_whatever_json_holds_is_read_in_every_form(tmp_path_factory, rows, data):
    """U+2028, U+0085 and the like end no line, whatever `str.splitlines` says."""
    folder = tmp_path_factory.getbasetemp()
    bom, end = data.draw(st.sampled_from([b"", BOM])), data.draw(st.sampled_from(["\n", "\r\n"]))
    as_lines = end.join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    as_list = json.dumps(rows, ensure_ascii=False, indent=data.draw(st.sampled_from([None, 1])))
    (folder / "r.jsonl").write_bytes(bom + as_lines)
    (folder / "r.json").write_bytes(bom + b" \n" + as_list.encode() + b"\n")
    (folder / "r.gz").write_bytes(gzip.compress(bom + as_lines))
    size = row_files._CHUNK
    try:
        row_files._CHUNK = data.draw(st.integers(4, 64))
        for name in ("r.jsonl", "r.json", "r.gz"):
            assert read_rows(folder / name, "key") == rows
    finally:
        row_files._CHUNK = size


@pytest.mark.parametrize("written", [1.0, True, "1", " 1 "])
def test_a_label_in_another_form_is_the_label(tmp_path, written):
    rows = [row | {"label": written} for row in rows_of("piqa")]
    (tmp_path / "f.jsonl").write_bytes(lines(rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet")
    for name in ("f.jsonl", "f.parquet"):
        assert list(labels(tmp_path / name)) == [1] * 6
    rows = [row | {"answer": 2.0} for row in rows_of("winogrande")]
    (tmp_path / "w.jsonl").write_bytes(lines(rows))
    assert list(labels(tmp_path / "w.jsonl", "winogrande")) == ["2"] * 6


def test_a_fault_has_its_true_row_and_line(tmp_path):
    file, rows = tmp_path / "f.jsonl", rows_of("piqa")
    good = [json.dumps(row) for row in rows]
    file.write_text("\n".join([good[0], "", good[1], good[2][:-3], good[3]]))
    assert "f.jsonl, line 4, cannot be read as .jsonl: Expecting" in refusal(file)
    file.write_text("\n".join([good[0], "", json.dumps(rows[1] | {"label": -1})]))
    assert "f.jsonl: row 1 (line 3) has label=-1, which is not an answer" in refusal(file)
    file.write_text("\n".join([good[0], json.dumps(rows[1] | {"goal": 5})]))
    assert "row 1 (line 2) has goal=5; this task needs a string" in refusal(file)
    file.write_bytes(good[0].encode() + b"\n" + good[1].encode().replace(b"t", b"\xff", 1))
    assert "line 2, cannot be read" in refusal(file)
    listed = tmp_path / "f.json"
    listed.write_text("[\n" + ",\n".join(good[:3]) + "\n" + good[3] + "]")
    assert "f.json, line 5, cannot be read as .json: Expecting ',' or ']'" in refusal(listed)
    listed.write_text("[\n" + good[0] + ",\n" + good[1].replace(":", ";", 1) + "\n]")
    assert "f.json, line 3, cannot be read as .json: Expecting ':'" in refusal(listed)
    listed.write_text(json.dumps(rows) + " and more")
    assert "text after the end of the list" in refusal(listed)


def test_rows_that_are_not_scored_are_read_all_the_same(tmp_path):
    file, rows = tmp_path / "f.jsonl", rows_of("piqa")
    file.write_bytes(lines(rows[:5]) + b"\n{not json}")
    assert "line 6, cannot be read" in refusal(file, scored=2)
    file.write_bytes(lines([*rows[:5], {"goal": "but nothing else"}]))
    assert "row 5 (line 6) has no column 'sol1'" in refusal(file, scored=2)
    parquet.write_table(pa.Table.from_pylist([*rows[:5], {"goal": "x"}]), tmp_path / "f.parquet")
    assert "row 5 has no column 'sol1'" in refusal(tmp_path / "f.parquet", scored=2)
    file.write_bytes(lines(rows))
    assert len(labels(file, scored=2)) == 2
    # Few-shot examples are drawn from all rows.
    assert len(labels(file, scored=2, examples=True)) == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sol1": "half \ud800"}, "row 3 has a value that cannot be stored in a table"),
        ({"extra": 1 << 70}, "row 3 has a value that cannot be stored in a table"),
        ({"extra": [1]}, "row 3 has a list in column 'extra', row 0 has a string"),
        ({"extra": {"a": 1}}, "row 3 has an object in column 'extra', row 0 has a string"),
    ],
)
def test_values_that_make_no_table_are_named(tmp_path, change, said):
    rows = [row | {"extra": "text"} for row in rows_of("piqa")]
    rows[3] |= change
    (tmp_path / "f.jsonl").write_bytes(lines(rows))
    assert said in refusal(tmp_path / "f.jsonl")


@pytest.mark.parametrize("wrong", [
    ["A", "B"], {"text": ["a"], "label": ["A", "B"]}, "A) b", {}, {"text": [], "label": []},
    # Every model is right where there is one answer, or where two have its letter.
    {"text": ["a"], "label": ["A"]}, {"text": ["a", "b"], "label": ["A", "A"]},
    {"text": ["a", " "], "label": ["A", "B"]},
])  # fmt: skip
def test_choices_of_another_form_are_named(tmp_path, wrong):
    rows = rows_of("arc_easy")
    rows[1] = rows[1] | {"choices": wrong}
    (tmp_path / "f.jsonl").write_bytes(lines(rows))
    assert "row 1 (line 2) has choices=" in refusal(tmp_path / "f.jsonl", "arc_easy")


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("winogrande", {"sentence": "No word is asked for."}),
        ("mathqa", {"options": "a ) 1 ,", "correct": "a"}),
        ("hellaswag", {"endings": ["a", "", "c", "d"]}),
    ],
)
def test_a_question_that_leaves_nothing_to_choose_is_named(tmp_path, task, change):
    rows = rows_of(task)
    rows[1] = rows[1] | change
    (tmp_path / "f.jsonl").write_bytes(lines(rows))
    assert f"row 1 (line 2) has {next(iter(change))}=" in refusal(tmp_path / "f.jsonl", task)


def test_json_without_an_end_in_sight_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "f.jsonl"
    file.write_text("[" * 100_000)
    assert "cannot be read" in refusal(file)
    file.write_text('{"a": ' * 100_000)
    assert "nested too deeply" in refusal(file)
    monkeypatch.setattr(row_files, "MAX_ROW_BYTES", 1 << 10)
    file.write_text('{"a": "' + "x" * 4096)
    assert "longer than" in refusal(file)
    file.write_text('[{"a": "' + "x" * (1 << 22))
    assert "cannot be read" in refusal(file)


def test_what_is_no_file_of_rows_is_one_sentence(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in ("/dev/zero", tmp_path / "pipe.jsonl"):
        assert "is neither a file nor a folder" in refusal(path)
    for name in ("x" * 5000, "a\0b", "~nobody-of-this-name/f.jsonl"):
        assert "no such file or folder" in refusal(name)
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "blank.json").write_bytes(b"[ ]")
    (tmp_path / "mark.jsonl").write_bytes(BOM + b"\r\n\r\n")
    for name in ("empty.jsonl", "blank.json", "mark.jsonl"):
        assert f"{name} has no rows" in refusal(tmp_path / name)
    folder = tmp_path / "folder"
    (folder / "validation.parquet").mkdir(parents=True)
    assert "must contain validation.parquet" in refusal(folder)
    for name in ("validation.json", "validation.jsonl"):
        (folder / name).write_bytes(lines(rows_of("piqa")))
    assert "validation.json and validation.jsonl are both the split validation" in refusal(folder)


def test_unlabelled_rows_are_accepted_up_to_the_share(tmp_path):
    file, rows = tmp_path / "f.jsonl", rows_of("piqa")
    rows[1], rows[4] = rows[1] | {"label": -1}, rows[4] | {"label": 7}
    file.write_bytes(lines(rows))
    found = loaded(file, allow_missing=0.34)
    assert found.unlabelled == (1, 4) and set(found.splits["validation"]["label"]) <= {0, 1}
    assert "(2 of 6 rows have none)" in refusal(file, allow_missing=0.3)
    assert "row 1 (line 2)" in refusal(file, allow_missing=1, examples=True)
    file.write_bytes(lines([row | {"label": -1} for row in rows]))
    assert "(6 of 6 rows have none)" in refusal(file, allow_missing=1)


def test_memory_does_not_grow_with_rows_that_are_not_scored(tmp_path):
    file, rows = tmp_path / "f.jsonl", rows_of("piqa")
    with file.open("wb") as out:
        for _ in range(2000):
            out.write(lines(rows) + b"\n")
    (tmp_path / "f.json").write_text(json.dumps(rows * 2000))
    for name in ("f.jsonl", "f.json"):
        tracemalloc.start()
        for _ in RowFile(tmp_path / name, "key", kept=2):
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 16 * row_files._CHUNK < (tmp_path / name).stat().st_size * 16
