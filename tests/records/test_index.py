"""The index gives what the records say, whatever was added, changed, removed or damaged since."""

import json

import pandas as pd
import pytest

from bench.errors import UserError
from bench.records import Record, Store, index, load, samples
from bench.records.index import INDEX
from tests.records.test_store import make


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    for number in range(3):
        store.write(make(f"{number:012x}", value=number / 4), [{"task": "t", "doc_id": 0}], "")
    return store


def values(store):
    frame = load(store.root)
    return dict(zip(frame.run, frame.value, strict=True)) if len(frame) else {}


def fresh(store):
    """What is read without any index."""
    (store.root / INDEX).unlink(missing_ok=True)
    return load(store.root)


def test_with_and_without_an_index_the_frame_is_the_same(store):
    first, again = load(store.root), load(store.root)
    pd.testing.assert_frame_equal(first, again)
    pd.testing.assert_frame_equal(first, fresh(store))
    assert "stamp" not in first


def test_it_is_never_stale(store):
    load(store.root)
    store.write(make("0" * 12, value=0.9), [], "")
    store.write(make("f" * 12, value=0.8), [], "")
    store.folder("0" * 11 + "1").rename(store.root / "gone")
    pd.testing.assert_frame_equal(load(store.root), fresh(store))
    runs = set(load(store.root).run)
    assert runs == {"0" * 12, "0" * 11 + "2", "f" * 12}
    metric = load(store.root).query("kind == 'metric' and run == '000000000000'")
    assert list(metric.value) == [0.9]


def test_a_record_changed_in_place_is_read_again_and_found_damaged(store):
    load(store.root)
    path = store.folder("0" * 12) / "record.json"
    whole = json.loads(path.read_text())
    whole["metrics"][0]["value"] = 1.0
    path.write_text(json.dumps(whole, indent=1) + "\n")
    assert "0" * 12 not in set(load(store.root).run)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all", None])
def test_a_damaged_index_is_made_again(store, content):
    whole = load(store.root)
    path = store.root / INDEX
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    pd.testing.assert_frame_equal(load(store.root), whole)
    assert len(path.read_bytes()) > 100


def test_an_index_of_another_program_is_made_again(store):
    whole = load(store.root)
    pd.DataFrame({"run": ["x"], "stamp": ["y"]}).to_parquet(store.root / INDEX)
    pd.testing.assert_frame_equal(load(store.root), whole)


def test_rows_of_other_code_are_made_again(store, monkeypatch):
    monkeypatch.setattr(index, "_code", lambda: "before")
    monkeypatch.setattr(Record, "label", "old label")
    assert set(load(store.root).label) == {"old label"}
    monkeypatch.undo()
    assert set(load(store.root).label) == {"dense"}


def test_no_flipped_bit_of_a_record_is_read(store):
    path = store.folder("0" * 12) / "record.json"
    content = path.read_bytes()
    place = content.index(b'"value": ') + len(b'"value": ')
    for bit in range(4):
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        path.write_bytes(bytes(flipped))
        again = Store(store.root)
        assert again.find("0" * 12) is None
        assert again.unreadable["0" * 12]
        assert len(again.all()) == 2


def test_damaged_samples_are_one_sentence(store):
    path = store.folder("0" * 12) / "samples.parquet"
    content = bytearray(path.read_bytes())
    content[10] ^= 16
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"samples\.parquet cannot be read: .*force=true"):
        samples("0" * 12, store.root)


def test_an_unreadable_record_is_read_once_and_again_only_when_changed(store, monkeypatch):
    path = store.folder("0" * 12) / "record.json"
    whole = path.read_text()
    path.write_text("{")
    parsed = []
    find = Store.find
    monkeypatch.setattr(Store, "find", lambda self, run: parsed.append(run) or find(self, run))
    for _ in range(2):
        assert set(load(store.root).run) == {"0" * 11 + "1", "0" * 11 + "2"}
    assert sorted(parsed) == sorted(store.ids())
    path.write_text(whole)
    assert "0" * 12 in set(load(store.root).run)
