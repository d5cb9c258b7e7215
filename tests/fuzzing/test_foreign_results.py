"""A results folder from elsewhere: whatever is in its files, a sentence or a right answer.

Each mutation replaces, adds or removes something in a sound file and lets every command that reads
it go over the folder, in which a second, sound record must stay visible.
"""

import copy
import itertools
import json
import os
import random
import shutil
import signal
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench.cli.main import main
from bench.errors import UserError
from bench.records import AppliedMethod, Store
from bench.records.record import checksum
from bench.records.record_file import parse_record, with_checksum
from bench.sweeps import RunRequest, RunResult, create_plan, perform_job
from tests.reporting.html import synthetic_records

GOOD, BAD = "a" * 12, "b" * 12
SECONDS, SECONDS_OF_WAITING = 10, 60
CANARY = "canary"
NAMES = [
    "[/]", "[bold]x", "$\\frac", "\x1b[31mred\x1b]0;title\x07", "\u202eevil", "\x9b2J", "", " ",
    "../../x", "a" * 5000, "\x00", "<script>", "=1+1", "é" * 40, "\ud800", "%s %n", "{0}", "\\N{x}",
]  # fmt: skip
VALUES = [
    None, True, 0, -1, 1e308, -1e308, 2**63, -(2**70), 10**400, float("nan"), float("inf"), 0.5,
    [], {}, [1, 2], {"a": 1}, [[]], "x", *NAMES,
    {"_target_": "os.system", "command": f"touch {CANARY}"},
    f"+hydra.callbacks.x={{_target_: os.system, command: touch {CANARY}}}",
    "packages=[os]", "results_dir=/tmp/x", "${oc.env:HOME}", "-m", "--cfg",
]  # fmt: skip


@contextmanager
def time_limit():
    """Limit the time of the CPU, and that of a wait, which a busy machine lengthens."""
    limits = ((signal.ITIMER_PROF, signal.SIGPROF, SECONDS),
              (signal.ITIMER_REAL, signal.SIGALRM, SECONDS_OF_WAITING))  # fmt: skip

    def expire(number, frame):
        raise TimeoutError(f"still running at {signal.Signals(number).name}")

    before = {number: signal.signal(number, expire) for _, number, _ in limits}
    for timer, _, seconds in limits:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, number, _ in limits:
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Two records with samples, and a sweep whose only job made the second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    root = tmp_path / "results"
    store = Store(root)
    for run in (GOOD, BAD):
        record = whole_record(run)
        store.write(record, synthetic_records.samples(record, per_task=2), "")
    monkeypatch.setattr("bench.runner.launch.execute", refuse)
    plan = create_plan(root, ["-m", "seed=1,2", f"results_dir={root}"], None)
    plan = plan.with_jobs([["seed=1"], ["seed=2"]], complete=True)
    for number, state in ((0, BAD), (1, GOOD)):
        perform_job(plan.folder, number, RunRequest("bench run"),
                    lambda run=state: RunResult(whole_record(run), reused=False))  # fmt: skip
    return root


def refuse(*_):
    """Stand in for a run: a plan that is admitted would run its jobs for minutes."""
    raise UserError("nothing is run here")


def places(node, path=()):
    """Return the path of every node below one, the node itself included."""
    found = [path]
    children = enumerate(node) if isinstance(node, list) else ()
    if isinstance(node, dict):
        children = node.items()
    for key, inner in children:
        found += places(inner, (*path, key))
    return found


def mutated(rng, content):
    """Change one to three places of some JSON."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(places(content)[1:])
        node = content
        try:
            for key in path[:-1]:
                node = node[key]
            how = rng.random()
            if how < 0.15:
                del node[path[-1]]
            elif how < 0.3 and isinstance(node, dict):
                node[rng.choice(NAMES)] = node[path[-1]]
            else:
                node[path[-1]] = rng.choice(VALUES)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change removed it
    return content


def damaged(rng, raw):
    """Change the bytes of a file: flipped, cut, repeated, or something else altogether."""
    how, raw = rng.randrange(4), bytearray(raw)
    place = rng.randrange(len(raw))
    if how == 0:
        for _ in range(rng.randint(1, 20)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    elif how == 1:
        del raw[place:]
    elif how == 2:
        raw[place:place] = raw[: rng.randrange(len(raw))]
    else:
        shapes = (b"", b"\x00" * 99, b"[" * 10**5, b'{"a":' * 5000, b"9" * 5000, b"\xff")
        return rng.choice(shapes)
    return bytes(raw)


def answer(capsys, *command, code=None):
    """Run a command; it ends in time, in one of its codes, with no traceback and no raw control."""
    wanted = (0, 1, 2) if code is None else (code,)
    capsys.readouterr()
    with time_limit():
        code = main(list(command))
    said = capsys.readouterr()
    assert code in wanted, (command, said.err)
    assert "Traceback" not in said.out + said.err, said
    assert "details:" not in said.err, said.err
    assert not set("\x1b\x9b\u202e\x07\x00") & set(said.out + said.err), said
    return said


def rewrite(store, content):
    text = json.dumps(content)
    (store.folder(BAD) / "record.json").write_text(text, "utf-8", "surrogatepass")


def look(capsys, root, commands):
    for command in commands:
        said = answer(capsys, *command.split(), "--results-dir", str(root))
        if command == "ls runs --json":
            assert GOOD in said.out
    assert not list(root.parent.rglob(CANARY))


READERS = (
    "ls runs --json", "ls runs", f"show {BAD}", f"show {BAD} --why {GOOD}", "report",
    f"compare {GOOD} {BAD}", f"show {BAD} --json", "plot front --json", "plot curves --json",
    "plot training --json", "plot allocation --json", "plot calibration --json", "status", "gc",
    "plot breakdown --json", f"show {BAD} --command",
)  # fmt: skip


PLOTS = ("plot front --json", "plot curves --json")


def fuzz_records(capsys, root, rng, count, readers):
    store = Store(root)
    sound = json.loads((store.folder(BAD) / "record.json").read_text())
    del sound["checksum"], sound["text_checksum"]
    for turn in range(count):
        if rng.random() < 0.8:
            changed = mutated(rng, sound)
            careful = rng.random()
            if careful < 0.35:  # a stranger who knows how records are written
                (store.folder(BAD) / "record.json").write_text(with_checksum(changed))
            elif careful < 0.7:
                rewrite(store, {**changed, "checksum": checksum(changed)})
            else:
                rewrite(store, changed)
        else:
            raw = damaged(rng, json.dumps(sound).encode())
            (store.folder(BAD) / "record.json").write_bytes(raw)
        (root / "index.parquet").unlink(missing_ok=True)
        look(capsys, root, rng.sample(READERS, readers) if turn else READERS)


LEAVES = [
    *(("config", "model", key) for key in ("name", "source", "path", "kind", "dtype", "seed")),
    *(("config", "model", key) for key in ("max_length", "trust_remote_code")),
    *(("config", "benchmark", key) for key in ("name", "harness", "tasks", "perplexity", "limit")),
    *(("config", "benchmark", key) for key in ("num_fewshot", "data", "metrics", "images")),
    ("config", "tracker", "samples"), ("config", "packages"), ("config", "offline"),
    ("config", "calibration"), ("config", "method", "wgsef"), ("methods", 0, "config", "ratio"),
    ("provenance", "data"), ("provenance", "data", "t"), ("provenance", "data", "t", "origin"),
    ("provenance", "data", "t", "location"), ("provenance", "data", "t", "fingerprint"),
    ("provenance", "calibration"), ("provenance", "prompts"), ("provenance", "identity"),
    ("provenance", "identity", "files"), ("environment", "threads"), ("environment", "versions"),
    ("environment", "versions", "lm-eval"),
]  # fmt: skip
"""Values of the free parts of a record that reports read."""


def fuzz_plans(capsys, root, rng, count):
    (file,) = (root / "sweeps").glob("*/plan.json")
    status = file.parent / "jobs" / "00000.json"
    sound, job = json.loads(file.read_text()), json.loads(status.read_text())
    for _ in range(count):
        changed = mutated(rng, sound)
        if isinstance(changed, dict) and rng.random() < 0.5:
            changed["complete"] = False
        if rng.random() < 0.8:
            file.write_text(json.dumps(changed), "utf-8", "surrogatepass")
        else:
            file.write_bytes(damaged(rng, json.dumps(sound).encode()))
        status.write_text(json.dumps(mutated(rng, job)), "utf-8", "surrogatepass")
        commands = ["status", "status latest", "gc"]
        look(capsys, root, [*commands, "resume latest"] if rng.random() < 0.3 else commands)


def fuzz_samples(capsys, root, rng, count):
    file = Store(root).folder(BAD) / "samples.parquet"
    sound, table = file.read_bytes(), pq.read_table(file)
    for _ in range(count):
        if rng.random() < 0.5:
            file.write_bytes(damaged(rng, sound))
        else:
            pq.write_table(other_columns(rng, table), file)
        look(capsys, root, ["report", f"compare {GOOD} {BAD}", f"compare {GOOD} {BAD} --flips 2",
                            "plot calibration --json"])  # fmt: skip


def other_columns(rng, table):
    name = rng.choice(table.column_names)
    place = table.column_names.index(name)
    if rng.random() < 0.3:
        return table.drop_columns([name])
    kinds = [pa.string(), pa.int64(), pa.float64(), pa.list_(pa.float64()), pa.list_(pa.string()),
             pa.bool_(), pa.binary(), pa.timestamp("s"), pa.struct([("a", pa.int8())])]  # fmt: skip
    return table.set_column(place, name, pa.nulls(table.num_rows, rng.choice(kinds)))


def test_a_foreign_record_is_read_or_left_out(results, capsys):
    fuzz_records(capsys, results, random.Random(1), 5, readers=1)


def test_a_record_is_the_same_however_it_is_parsed(results):
    """As it was written, a file is parsed at once; with a blank at its end, step by step."""
    rng = random.Random(5)
    sound = json.loads((Store(results).folder(BAD) / "record.json").read_text())
    del sound["checksum"], sound["text_checksum"]
    contents = [mutated(rng, sound) for _ in range(400)]
    contents += [{key: sound[key] for key in sound.keys() - {left}} for left in sound]
    accepted = 0
    for content in contents:
        text = with_checksum(content).encode()
        at_once, in_steps = outcome(text), outcome(text + b" ")
        assert at_once == in_steps
        accepted += not at_once.startswith("refused")
    assert accepted > 20


def outcome(text):
    try:
        # All fields, of which the representation of a record shows only some.
        return repr(dict(parse_record(text)))
    except ValueError as error:
        return f"refused: {error}"


@pytest.mark.broad
def test_no_value_of_what_reports_read_stops_a_command(results, capsys):
    """All of them in one folder, so that each command has to get past every one."""
    store = Store(results)
    sound = json.loads((store.folder(BAD) / "record.json").read_text())
    del sound["checksum"], sound["text_checksum"]
    task = next(iter(sound["provenance"]["data"]))
    sound["provenance"]["data"][task] |= {"origin": "file", "location": "x.csv"}
    values = [5, [], {}, None, "x", 2**62, float("nan")]
    for number, ((*above, last), value) in enumerate(itertools.product(LEAVES, values)):
        changed = copy.deepcopy({**sound, "id": f"{number:012x}"})
        node = changed
        for name in above:
            key = task if name == "t" else name
            node = node[key] if isinstance(node, list) else node.setdefault(key, {})
        node[task if last == "t" else last] = value
        folder = store.folder(changed["id"])
        shutil.copytree(store.folder(BAD), folder)
        (folder / "record.json").write_text(with_checksum(changed))
    for command in ("ls runs --json", "ls runs", "report", *PLOTS):
        said = answer(capsys, *command.split(), "--results-dir", str(results), code=0)
        assert GOOD in said.out or command != "ls runs --json"
    left = [record.id for record in store.all()]
    assert len(left) < number / 2
    for run in random.Random(0).sample(left, 8):
        answer(capsys, "show", run, "--results-dir", str(results), code=0)
        answer(capsys, "compare", GOOD, run, "--results-dir", str(results))


def test_a_foreign_plan_is_read_or_left_out(results, capsys):
    fuzz_plans(capsys, results, random.Random(3), 6)


def test_foreign_samples_are_read_or_left_out(results, capsys):
    fuzz_samples(capsys, results, random.Random(4), 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", ["record", "plan", "samples"])
def test_a_thousand_foreign_files_of_each_kind(results, capsys, kind, seed):
    rng = random.Random(f"{kind} {seed}")
    if kind == "record":
        fuzz_records(capsys, results, rng, 100, readers=4)
    elif kind == "plan":
        fuzz_plans(capsys, results, rng, 100)
    else:
        fuzz_samples(capsys, results, rng, 100)


COMMAND_OF = {
    "record.json": "plot front --json", "samples.parquet": f"compare {GOOD} {BAD}",
    "plan.json": "status", "00000.json": "status latest",
}  # fmt: skip


@pytest.mark.parametrize("name", COMMAND_OF)
@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "device"])
def test_what_is_no_file_is_named_and_never_waited_for(results, capsys, name, kind):
    (file,) = [f for f in results.rglob(name) if GOOD not in f.parts]
    secret = results.parent / "secret"
    secret.write_bytes(file.read_bytes())
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "device" else secret)
    look(capsys, results, ["ls runs --json", COMMAND_OF[name]])
    # As JSON: a table of 80 columns breaks the note into lines.
    said = answer(capsys, "ls", "runs", "--json", "--results-dir", str(results))
    if name == "record.json":
        kinds = {"pipe": "a pipe", "folder": "a folder", "link": "a link", "device": "a link"}
        assert f"record.json is {kinds[kind]}" in said.out


def test_a_record_under_another_name_is_left_out(results, capsys):
    store = Store(results)
    store.folder(BAD).rename(store.folder("d" * 12))
    assert [record.id for record in store.all()] == [GOOD]
    assert f"record of run '{BAD}'" in store.unreadable["d" * 12]
    assert "is left out" in capsys.readouterr().err


def whole_record(run):
    """A record with everything that the commands read."""
    record = synthetic_records.record(1)
    if run == GOOD:
        return record.model_copy(update={"id": run})
    method = AppliedMethod(
        name="wgsef", config={"ratio": 0.5}, effect="removed", seconds=1.0,
        report={"history": [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.4}]},
        layers=({"layer": 0, "removed": 1},),
    )  # fmt: skip
    config = {**record.config, "method": {"wgsef": {"ratio": 0.5}}}
    return record.model_copy(update={"id": run, "methods": (method,), "config": config})
