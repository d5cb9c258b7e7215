"""Records are whole or absent, found by id, and one bad file never hides the others."""

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import Stopped, UserError
from bench.records import (
    AppliedMethod,
    Cost,
    DenseModel,
    Metric,
    Record,
    Store,
    json_values,
    run_id,
)
from bench.records import load as load_frame
from bench.records import samples as load_samples
from bench.records.files import disk_errors_as_stopped, write_bytes, write_folder
from bench.records.json_values import parse_json
from bench.records.record_file import with_checksum
from bench.sweeps.plan import all_sweeps


def make(identifier="a" * 12, ratio=None, value=0.5):
    methods = ()
    if ratio is not None:
        methods = (
            AppliedMethod(
                name="camera_p", config={"ratio": ratio}, effect="zeroed", report={}, seconds=1.0
            ),
        )
    metric = Metric(
        benchmark="b", task="arc_easy", metric="acc", filter="none", shots=0, split="test",
        value=value, stderr=0.1, n=10, higher_is_better=True, headline=True,
    )  # fmt: skip
    cost = Cost(scope="model", quantity="parameters", unit="1", value=7.0, how="counted")
    return Record(
        id=identifier, started="2026-01-01", finished="2026-01-01", sweep=None, command="bench run",
        config={"benchmark": {"name": "b"}}, environment={},
        model=DenseModel(
            name="m", source="s", revision=None, fingerprint="f", architecture="A",
            parameters=7, bytes=28,
        ),
        methods=methods, metrics=(metric,), costs=(cost,), provenance={},
    )  # fmt: skip


def test_what_is_written_is_read_back(tmp_path):
    store = Store(tmp_path)
    folder = store.write(make(), [{"task": "arc_easy", "doc_id": 0, "acc": 1.0}], "a: 1\n")
    assert store.find("a" * 12) == make()
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.yaml", "record.json", "samples.parquet",
    ]  # fmt: skip
    assert load_samples("aaa", tmp_path).to_dict("records") == [
        {"task": "arc_easy", "doc_id": 0, "acc": 1.0}
    ]


def test_a_prefix_finds_a_run_and_says_what_is_wrong_otherwise(tmp_path):
    store = Store(tmp_path)
    for identifier in ("abc000000000", "abd000000000"):
        store.write(make(identifier), [], "")
    assert store.get("abc").id == "abc000000000"
    with pytest.raises(UserError, match="ambiguous"):
        store.get("ab")
    with pytest.raises(UserError, match="did you mean 'abc000000000'"):
        store.get("abc00000001x")


@pytest.mark.parametrize("name", ["", "latest:"])
def test_an_empty_name_is_no_run_though_there_is_only_one(tmp_path, name):
    """As `bench export "$RUN" DIR` gives it when the variable is not set."""
    store = Store(tmp_path)
    store.write(make("abc000000000"), [], "")
    with pytest.raises(UserError, match="as with an unset shell variable"):
        store.get(name)


def test_the_latest_run_is_found_by_its_method(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(UserError, match="there are no runs"):
        store.get("latest")
    for identifier, ratio, day in (("c", 0.2, 1), ("b", 0.4, 2), ("a", None, 3)):
        record = make(identifier * 12, ratio).model_copy(update={"started": f"2026-01-0{day}"})
        store.write(record, [], "")
    words = ("latest", "latest:camera_p", "latest:camera_p 0.2", "latest:dense")
    assert [store.get(word).id[0] for word in words] == ["a", "b", "c", "a"]
    with pytest.raises(UserError, match="did you mean 'camera_p'"):
        store.get("latest:camera")


def test_a_failed_write_leaves_nothing(tmp_path):
    def fill(folder):
        (folder / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "runs" / "x", fill)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_failed_file_write_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_bytes(path, b"old")

    def broken(handle):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_writing_again_replaces_the_record(tmp_path):
    store = Store(tmp_path)
    store.write(make(value=0.5), [], "")
    store.write(make(value=0.75), [], "")
    assert store.find("a" * 12).metrics[0].value == 0.75
    assert [p.name for p in store.runs.iterdir()] == ["a" * 12]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[: len(text) // 2], "not JSON"),
        (lambda text: json.dumps({**json.loads(text), "schema_version": 99}), "version 99"),
        (lambda text: json.dumps({**json.loads(text), "schema_version": "3"}), "version '3'"),
        (lambda text: "[]", "does not contain a JSON object"),
        (lambda text: json.dumps({"schema_version": 1}), "id: field required"),
    ],
)
def test_a_damaged_record_is_set_aside_with_its_reason(tmp_path, damage, reason):
    store = Store(tmp_path)
    store.write(make("a" * 12), [], "")
    store.write(make("b" * 12), [], "")
    path = store.folder("a" * 12) / "record.json"
    path.write_text(damage(path.read_text()))
    assert [record.id for record in store.all()] == ["b" * 12]
    assert reason in store.unreadable["a" * 12]
    with pytest.raises(UserError, match="cannot be read"):
        store.get("aaa")


def test_a_results_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        Store(tmp_path / "file").ensure_writable()


def test_records_become_one_long_frame(tmp_path):
    store = Store(tmp_path)
    store.write(make("a" * 12), [], "")
    store.write(make("b" * 12, ratio=0.4, value=0.25), [], "")
    frame = load_frame(tmp_path)
    metrics = frame[frame.kind == "metric"]
    assert dict(zip(metrics.label, metrics.value, strict=True)) == {
        "dense": 0.5, "camera_p 0.4": 0.25,
    }  # fmt: skip
    assert list(frame[frame.kind == "cost"].quantity) == ["parameters", "parameters"]
    assert load_frame(tmp_path / "empty").empty


def test_the_id_depends_on_every_input_and_not_on_their_order():
    base = {"config": {"a": 1, "b": [1, 2]}, "weights": "w"}
    assert run_id(base) == run_id(dict(reversed(base.items())))
    assert len(run_id(base)) == 12
    changed = [
        {**base, "weights": "v"},
        {**base, "config": {"a": 1, "b": [2, 1]}},
        {**base, "config": {"a": 1.5, "b": [1, 2]}},
    ]
    assert len({run_id(inputs) for inputs in [base, *changed]}) == 4


@pytest.mark.parametrize(
    ("part", "content", "key"),
    [
        ("config", {"benchmark": {"name": "b"}, "model": {"path": 5}}, "model.path"),
        ("config", {"benchmark": {"name": "b"}, "model": {"path": ["x"]}}, "model.path"),
        ("config", {"benchmark": {"name": 5}}, "benchmark.name"),
        ("config", {"benchmark": {"name": "b", "perplexity": {"t": 5}}}, "benchmark.perplexity.t"),
        ("config", {"benchmark": {"name": "b"}, "packages": [5]}, "packages.0"),
        ("provenance", {"data": {"t": {"origin": "file", "location": 5}}}, "data.t.location"),
        ("provenance", {"data": {"t": {"origin": "file"}}}, "origin=file needs a location"),
        ("provenance", {"identity": {"files": 5}}, "identity.files"),
        ("environment", {"versions": {"torch": [1]}}, "versions.torch"),
    ],
)
def test_what_reports_read_has_its_type_or_the_record_is_set_aside(tmp_path, part, content, key):
    store = Store(tmp_path)
    path = store.write(make(), [], "") / "record.json"
    changed = {**json.loads(path.read_text()), part: content}
    del changed["checksum"], changed["text_checksum"]
    path.write_text(with_checksum(changed))
    assert store.all() == []
    assert part in store.unreadable["a" * 12]
    assert key in store.unreadable["a" * 12]


@pytest.mark.parametrize("ratio", [2**53 + 1, 2**62, -(2**62)])
def test_a_ratio_that_no_float_holds_is_refused_by_name(tmp_path, ratio):
    with pytest.raises(ValueError, match="whole numbers go up to"):
        make(ratio=ratio)
    Store(tmp_path).write(make(ratio=2**53), [], "")
    assert set(load_frame(tmp_path)["ratio"]) == {2.0**53}


@pytest.mark.parametrize("link", ["unfinished", "run"])
def test_unfinished_state_behind_a_link_is_never_removed(tmp_path, link):
    store, elsewhere = Store(tmp_path / "results"), tmp_path / "elsewhere"
    run = "a" * 12
    kept = elsewhere / run / "kept"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    os.utime(kept, (0, 0))
    if link == "unfinished":
        store.root.mkdir()
        (store.root / "unfinished").symlink_to(elsewhere)
    else:
        store.unfinished(run).parent.mkdir(parents=True)
        store.unfinished(run).symlink_to(elsewhere / run)
    store.write(make(run), [], "")
    with store.claim(run):
        assert kept.read_text() == "mine"


@pytest.mark.parametrize(("text", "fits"), [
    ("9223372036854775807", True), ("-9223372036854775807", True), ("9223372036854775808", False),
    ("1" * 400, False), ("1e308", True), ("1e309", False), ("-1E+999", False), ("1e0999", False),
    ("1" * 400 + ".5", False), ("9" * 18 + "e300", False), ("12e99", True), ("1e-999", True),
    ('"1e999 9223372036854775808"', True), ("0." + "3" * 30, True),
])  # fmt: skip
def test_numbers_that_do_not_fit_are_refused_wherever_they_stand(text, fits):
    content = f'{{"a": [1, 2.5, {text}], "b": "x"}}'.encode()
    if fits:
        assert parse_json(content) == json.loads(content)
    else:
        with pytest.raises(ValueError, match=r"it contains 9|it contains 1|it contains -1"):
            parse_json(content)


NUMBERS = st.integers(-(2**65), 2**65) | st.floats()
TEXTS = st.text() | st.text('[]{}"\\e0+, ')
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(VALUES, st.integers(0, 70))
def test_the_fast_parser_takes_and_refuses_what_the_slow_one_does(value, depth):
    def outcome(parse):
        try:
            return repr(parse(content))
        except ValueError as error:
            return f"refused: {error}"

    for _ in range(depth):
        value = [value]
    content = json.dumps(value).encode()
    assert outcome(parse_json) == outcome(json_values._parse_json_slowly)


@pytest.mark.parametrize("change", [b"x", b" ", b"1", b'"', b"}"])
def test_no_changed_byte_of_a_record_changes_what_is_read(tmp_path, change):
    store = Store(tmp_path)
    path = store.write(make(ratio=0.25), [], "") / "record.json"
    written, text = store.get("a" * 12), path.read_bytes()
    for at in range(len(text)):
        path.write_bytes(text[:at] + change + text[at + 1 :])
        found = store.find("a" * 12)
        # White space may change, as when an editor formats the file.
        assert found in (None, written)
    assert "checksum" in store.unreadable["a" * 12] or "JSON" in store.unreadable["a" * 12]


@pytest.mark.parametrize(
    "form", [{"indent": 4}, {"separators": (",", ":")}, {"indent": 2, "sort_keys": True}]
)
def test_a_record_that_was_formatted_anew_is_the_same(tmp_path, form):
    store = Store(tmp_path)
    path = store.write(make(ratio=0.25), [], "") / "record.json"
    written = store.get("a" * 12)
    path.write_text(json.dumps(json.loads(path.read_text()), **form))
    assert store.get("a" * 12) == written
    changed = json.loads(path.read_text()) | {"command": "bench run model=other"}
    path.write_text(json.dumps(changed, **form))
    assert store.find("a" * 12) is None
    assert "its checksum does not match" in store.unreadable["a" * 12]
    del changed["checksum"], changed["text_checksum"]
    path.write_text(json.dumps(changed, **form))
    assert store.find("a" * 12) is None
    assert "it has no checksum" in store.unreadable["a" * 12]


def test_of_many_unreadable_records_some_are_named_and_all_are_known(tmp_path, capsys):
    store = Store(tmp_path)
    for number in range(50):
        store.folder(f"{number:012}").mkdir(parents=True)
        (store.folder(f"{number:012}") / "record.json").write_text("{")
    assert store.all() == []
    assert len(store.unreadable) == 50
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 21
    assert "more files of" in warnings[-1]
    assert store.all() == []
    assert capsys.readouterr().err == ""


def test_a_record_as_it_was_written_is_parsed_once(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.write(make(), [], "")
    monkeypatch.delattr("bench.records.record_file.parse_json")
    assert store.get("a" * 12) == make()


@pytest.mark.parametrize("name", ["~", "s3:", "a:b"])
def test_a_folder_name_means_nothing_to_the_libraries_that_write(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Store(Path(name)).write(make(), [], "")
    assert (tmp_path / name / "runs" / make().id / "samples.parquet").is_file()


def test_samples_of_a_different_run_are_refused(tmp_path):
    """A file copied between folders would otherwise give wrong intervals without a word."""
    store = Store(tmp_path)
    for name in "ab":
        store.write(make(name * 12), [{"task": "arc_easy", "doc_id": 0, "acc": 1.0}], "")
    other = (store.folder("b" * 12) / "samples.parquet").read_bytes()
    (store.folder("a" * 12) / "samples.parquet").write_bytes(other)
    with pytest.raises(UserError, match="it holds the samples of run 'bbbbbbbbbbbb'"):
        load_samples("aaa", tmp_path)
    assert len(load_samples("bbb", tmp_path)) == 1


@pytest.mark.parametrize("kind", ["a file", "a dangling link", "an endless link"])
@pytest.mark.parametrize("place", ["runs", "sweeps"])
def test_a_folder_that_cannot_be_listed_does_not_look_empty(tmp_path, place, kind):
    """As that of a disk that is not mounted: nothing in it was deleted."""
    folder = tmp_path / place
    if kind == "a file":
        folder.touch()
    else:
        folder.symlink_to("nowhere" if kind == "a dangling link" else place)
    with pytest.raises(UserError, match=f"{place}: cannot be read as a folder"):
        Store(tmp_path).ids() if place == "runs" else all_sweeps(tmp_path)


@pytest.mark.parametrize("place", ["runs", "locks", "unfinished"])
def test_what_stands_in_place_of_a_folder_is_named_before_any_work(tmp_path, place):
    (tmp_path / place).touch()
    with pytest.raises(UserError, match=f"cannot be written .{place} in it is a file"):
        Store(tmp_path).ensure_writable()


@pytest.mark.parametrize(("inside", "raised"), [(True, Stopped), (False, PermissionError)])
def test_permissions_taken_away_meanwhile_stop_the_run(tmp_path, inside, raised):
    """Raised by hand, because the permissions of files do not bind root."""
    place = tmp_path / "results" / "runs" if inside else tmp_path / "weights"
    with pytest.raises(raised), disk_errors_as_stopped(tmp_path / "results"):
        raise PermissionError(errno.EACCES, "Permission denied", str(place))
