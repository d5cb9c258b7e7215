"""Whatever is typed: no traceback, an exit code of the contract, one sentence when it is wrong."""

import json
import os

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bench.cli.main import main
from bench.cli.parser import COMMANDS
from bench.records import Store
from tests.records.test_store import make

CODES = {0, 1, 2, 75}
KEYS = [
    "model", "method", "benchmark", "ratio", "seed", "threads", "benchmark.limit", "calibration",
    "method.camera_p.ratio", "method.camera_p", "hydra/launcher", "hydra.mode", "sweep", "packages",
    "experiment", "model.path", "objective", "hydra.sweeper.params", "", "tracker", "costs",
]  # fmt: skip
VALUES = [
    "micro_moe", "camera_p", "[camera_p,dense]", "[]", "null", "-1", "0.5", "nan", "1,2", "{a:1}",
    "interval(0,1)", "choice(a,b)", "${seed}", "${oc.env:HOME}", "${nothing}", "'", "[", "\\",
    "???", "true",
    "{_target_:os.system}", "MULTIRUN", "range(3)", "a/../b", "joblib", "", "𝕏", "\x00",
]  # fmt: skip
PLAIN = ["latest", "-m", "--json", "--yes", "-h", "--", "-", "--cfg", "job"]
overrides = st.tuples(
    st.sampled_from(["", "+", "++", "~"]), st.sampled_from(KEYS), st.just("="),
    st.sampled_from(VALUES),
).map("".join)  # fmt: skip
words = st.one_of(st.sampled_from([*COMMANDS, *PLAIN]), overrides, st.text(max_size=12))

# These look at every model and data set, or ask the network, whatever else is typed.
SLOW_COMMANDS = {"doctor", "prefetch"}
thorough = os.environ.get("HYPOTHESIS_PROFILE") == "searching"
bounded = settings(
    max_examples=1000 if thorough else 40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A results folder with one record, in a folder where nothing else can be harmed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    Store(tmp_path / "results").write(make(), [], "")
    return tmp_path / "results"


def answer(capsys, arguments):
    capsys.readouterr()
    code = main(arguments)
    said = capsys.readouterr()
    assert code in CODES, (arguments, said.err)
    assert "Traceback" not in said.err + said.out, arguments
    if code == 2 and "-h" not in arguments:
        assert said.err.strip(), arguments
    return code, said


@bounded
@given(
    st.sampled_from(sorted({*COMMANDS, "rum"} - SLOW_COMMANDS - {"run"})),
    st.lists(words, max_size=4),
)
@example("show", ["--results-dir", "\x00"])
@example("status", ["\x00"])
def test_any_command_with_any_words(results, capsys, command, rest):
    answer(capsys, [command, *rest])


@bounded
@given(st.lists(words, max_size=5))
def test_run_with_any_words_and_a_model_that_is_not_there(results, capsys, rest):
    # The last word is wrong, so that nothing is ever run; the others may be anything.
    code, _ = answer(capsys, ["run", *rest, "model.path=/nowhere/at/all"])
    assert code in (0, 2)  # 0: only Hydra's own questions, such as --cfg


@settings(bounded, max_examples=300 if thorough else 12)
@example(b"", 1826, 0)  # a key of the config that the listing reads
@given(st.binary(max_size=80), st.integers(0, 10_000), st.integers(0, 7))
def test_a_damaged_record_is_named_and_hides_nothing(results, capsys, noise, place, bit):
    store = Store(results)
    store.write(make("b" * 12), [], "")
    file = store.folder("b" * 12) / "record.json"
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 1 << bit
    cut = place % len(content)
    variants = (bytes(content), bytes(content[:cut]), noise, bytes(content[:cut]) + noise)
    for damaged in variants:
        file.write_bytes(damaged)
        found = Store(results)
        ids = {record.id for record in found.all()}
        assert "a" * 12 in ids
        assert ("b" * 12 in ids) != ("b" * 12 in found.unreadable)
    # Commands take most of the time: one variant of each example stands for the others.
    file.write_bytes(variants[bit % len(variants)])
    code, said = answer(capsys, ["ls", "runs", "--json", "--results-dir", str(results)])
    assert code == 0
    assert "a" * 12 in {row["run"] for row in json.loads(said.out)}
    answer(capsys, ["show", "b" * 12, "--results-dir", str(results)])
