"""A results page says what its numbers rest on, tests them in pairs, and lists what was not run."""

import math

import pandas as pd
import pytest

from bench.cli.commands.table import runs_of_table, write_page
from bench.cli.main import main
from bench.config.composition import compose_run_config
from bench.errors import UserError
from bench.records import AppliedMethod, Cost, DenseModel, Metric, Record, Store
from bench.reporting.comparison import ComparedRun, compare
from bench.reporting.comparison.printer import difference_text, signed_text
from bench.reporting.tables import TableConfig, numbers, table_slots
from bench.reporting.tables.page import results_page

CONFIG = TableConfig.model_validate(
    {
        "name": "mine",
        "title": "One model, two methods",
        "about": "A share is of the weights.\n",
        "sections": {"m": {}},
        "variants": {"20 %": {"ratio": 0.2}, "50 %": {"ratio": 0.5}},
        "rows": {
            "dense": {"run": ["method=dense"], "variants": False},
            "first": {"run": ["method=first", "ratio=$ratio"]},
            "second|best": {"run": ["method=second", "ratio=$ratio"]},
        },
        "against": {"first": ["second|best"]},
        "columns": {
            "exam": {"task": "exam", "metric": "acc"},
            "mean": {"task": "average", "metric": "mean", "of": 2},
            "text": {"task": "wiki", "metric": "perplexity", "unit": "perplexity"},
            "bytes": {"quantity": "bytes", "unit": "count"},
            "prefill": {"quantity": "speedup", "scope": "prefill", "unit": "ratio"},
        },
    }
)
RIGHT = {
    "dense": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0],
    "first": [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
    "second": [1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
}
LOSSES = {"dense": [2.0, 2.2], "first": [3.0, 3.3], "second": [2.5, 2.4]}


def number(task, value, name, n, *, better=True):
    return Metric(
        benchmark="exams", task=task, metric=name, filter="none", shots=0, split="test",
        value=value, stderr=0.1, n=n, higher_is_better=better, headline=True,
    )  # fmt: skip


def record(method, started):
    score = sum(RIGHT[method]) / 10
    metrics = (
        number("exam", score, "acc", 10),
        number("quiz", score, "acc", 10),
        number("average", score, "mean", 2),
        number("wiki", math.exp(sum(LOSSES[method]) / 2), "perplexity", 2, better=False),
    )
    note = "the machine was loaded; its clock changed"
    costs = [Cost(scope="model", quantity="bytes", unit="B", value=2.5e6, how="counted")]
    applied = ()
    if method != "dense":
        costs.append(
            Cost(scope="prefill 1x8", quantity="speedup", unit="x", value=1.25, how="measured",
                 note=note)
        )  # fmt: skip
        applied = (AppliedMethod(name=method, config={}, effect="removed", report={}, seconds=1.0),)
    benchmark = {"name": "exams", "limit": 10, "perplexity": {"wiki": {"window": 64}}}
    return Record(
        id=method.ljust(12, "0"), started=started, finished="", sweep=None, command="",
        config={
            "model": {"dtype": "float32"},
            "benchmark": benchmark,
            "calibration": {"name": "prose", "rows": 4, "length": 32},
        },
        environment={
            "cpu": "a processor", "cores": 2, "threads": 1, "memory_bytes": 8e9, "gpus": [],
            "versions": {"torch": "2.9", "lm-eval": "0.4.13"},
        },
        model=DenseModel(
            name="m", source="x", revision=None, fingerprint="0", architecture="a", parameters=1,
            bytes=4,
        ),
        methods=applied, metrics=metrics, costs=tuple(costs),
        provenance={
            "git_commit": "abc-dirty", "calibration": "0" if method == "first" else None,
        },
    )  # fmt: skip


def sample_rows(method):
    exams = [
        {"task": task, "filter": "none", "doc_id": i, "doc_hash": f"{i}", "acc": float(right)}
        for task in ("exam", "quiz")
        for i, right in enumerate(RIGHT[method])
    ]
    wiki = [
        {"task": "wiki", "filter": "none", "doc_id": i, "doc_hash": f"w{i}",
         "loglikelihoods": [-63 * loss], "n_tokens": 63}
        for i, loss in enumerate(LOSSES[method])
    ]  # fmt: skip
    return [*exams, *wiki]


def samples(run):
    return pd.DataFrame(sample_rows(run.rstrip("0")))


@pytest.fixture
def found():
    return recorded_slots()


def recorded_slots():
    """Return records of all lines but those of 50 %."""
    records = {
        "dense": record("dense", "2031-01-02T03:04:05+00:00"),
        "first": record("first", "2031-01-02T04:04:05+01:00"),
        "second|best": record("second", "2031-01-02T06:04:05+00:00"),
    }
    return {
        slot: [records[slot.row]] for slot in table_slots(CONFIG) if slot.variant in ("", "20 %")
    }


def rows_of(page, heading):
    """Return the rows of the table below a heading, by their first cell."""
    lines = page.split(f"{heading}\n", 1)[1].lstrip().splitlines()
    table = lines[: lines.index("")] if "" in lines else lines
    cells = [line.strip("| ").replace(r"\|", "!").split(" | ") for line in table[2:]]
    return {row[0]: row[1:] for row in cells}


def test_the_page_states_what_its_numbers_rest_on(found):
    page = results_page(CONFIG, found, samples, "bench table mine --page mine.md")
    basis = rows_of(page, "from 3 records; manual edits will be lost.")
    assert basis["runs"] == ["2031-01-02 03:04 to 2031-01-02 06:04 UTC"]
    assert basis["commit"] == ["abc-dirty"]
    assert basis["machine"] == ["a processor, cores: 2, threads: 1, 8.00 GB"]
    assert basis["model"] == ["m, float32"]
    assert basis["benchmark"] == ["exams (0-shot, limit 10)"]
    assert basis["wiki"] == ["2 windows of 64 tokens"]
    assert basis["calibration"] == ["4 rows of 32 tokens of prose"]
    assert basis["libraries"] == ["torch 2.9, lm-eval 0.4.13"]
    start, rest = page.split("A share is of the weights.\n\n")
    assert start.startswith("# One model, two methods\n\nThis page is based on ")
    assert rest.startswith("Written by `bench table mine --page mine.md`")


def test_the_page_begins_with_what_chance_does_not_explain(found, monkeypatch):
    page = results_page(CONFIG, found, samples, "")
    dense, *others = (ComparedRun(r, samples(r.id)) for (r,) in found.values())
    contrasts = compare(dense, others).contrasts
    (first,) = (c for c in contrasts if c.task == "average" and c.run.startswith("first"))
    assert first.p_holm < 0.05
    said = page.split("A share is")[0].split("\n\n")[1:]
    assert said[0] == (
        "This page is based on 20 documents and 2 windows of wiki. Of 6 paired differences, "
        f"{said[1].count('(')} are significant (p below 0.05 after Holm's correction):"
    )
    group = "mean of the tasks, % against dense"
    assert said[1].startswith(f"- {group}: worse: first 20 % ({signed_text(first, -0.7)})")
    # Two windows are no test.
    assert "perplexity" not in said[1]
    page = results_page(CONFIG, found, lambda run: samples("dense"), "")
    assert "Of 6 paired differences, none is significant (p below 0.05" in page
    monkeypatch.setitem(RIGHT, "first", RIGHT["dense"])
    monkeypatch.setitem(RIGHT, "dense", [1, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    page = results_page(CONFIG, recorded_slots(), samples, "")
    assert f"- {group}: better: first 20 % ({signed_text(first, 0.7)})" in page


def test_the_page_shows_every_number_and_the_caveats_of_costs(found):
    page = results_page(CONFIG, found, samples, "")
    shown = rows_of(page, "## Numbers")
    assert shown["dense"] == [
        "90.00 ±10.00", "90.00 ±10.00", "8.17 ±0.10", "2.50 M", "-", "`dense000`",
    ]  # fmt: skip
    assert shown["first 20 %"][-2:] == ["1.25", "`first000`"]
    assert set(shown) == {"dense", "first 20 %", "second!best 20 %"}
    assert "- `first000`, `second00`: the machine was loaded\n" in page
    assert "- `first000`, `second00`: its clock changed\n" in page
    assert page.split("## Not run\n\n")[1] == "- first 50 %\n- second|best 50 %\n"


def test_every_difference_is_one_of_the_paired_comparison(found):
    page = results_page(CONFIG, found, samples, "")
    runs = {s.row: ComparedRun(r, samples(r.id)) for s, (r,) in found.items()}
    dense = compare(runs["dense"], [runs["first"], runs["second|best"]])
    expected = {
        (c.run, c.task): difference_text(c)
        for c in dense.contrasts
        if c.task in ("average", "wiki")
    }
    assert len(expected) == 4
    table = page.split("### Against dense")[1].split("###")[0]
    assert all(text in table for text in expected.values())
    assert table.count("first 20 %") == 2
    rivals = page.split("### Against first 20 %")[1]
    (contrast,) = (
        c for c in compare(runs["first"], [runs["second|best"]]).contrasts if c.task == "average"
    )
    assert difference_text(contrast) in rivals
    assert contrast.difference == pytest.approx(0.5)
    # Two windows are no test, however far apart the runs are.
    wiki = [line for line in table.splitlines() if "wiki" in line]
    assert all(line.endswith("| 1.000 | - |") for line in wiki)


def test_a_table_that_was_run_whole_says_so(found):
    config = CONFIG.model_copy(update={"variants": {"20 %": {"ratio": 0.2}}})
    assert results_page(config, found, samples, "").endswith("Every line of the table was run.\n")


def test_a_single_task_is_tested_for_itself(found):
    """It has no average, and a page without tests would look as if nothing was significant."""
    alone = {
        slot: [each.model_copy(update={"metrics": each.metrics[:1]}) for each in records]
        for slot, records in found.items()
    }

    def exams(run):
        rows = samples(run)
        return rows[rows["task"] == "exam"]

    text = results_page(CONFIG, alone, exams, "")
    assert "This page is based on 10 samples of exam." in text
    assert "| first 20 % | exam acc | 10 | -70.0 " in text


def test_a_page_takes_keys_that_only_the_tables_benchmark_has(tmp_path):
    chosen = ["scale=micro", "benchmark.images.split=test", f"results_dir={tmp_path / 'r'}"]
    with pytest.raises(UserError, match="has no record here"):
        write_page("wgsef_cifar10", chosen, tmp_path / "page.md")


def test_there_is_no_page_without_a_record():
    with pytest.raises(UserError, match="has no record here"):
        results_page(CONFIG, {}, samples, "")


def test_the_command_writes_the_page_and_runs_nothing(tmp_path, monkeypatch):
    chosen = ["scale=micro", "rows=[dense]", "benchmark.limit=3", f"results_dir={tmp_path / 'r'}"]
    (run,) = runs_of_table("camera_main", chosen)
    composed = compose_run_config(run)
    stored = record("dense", "2031-01-02T03:04:05+00:00")
    stored = stored.model_copy(update={"id": "0" * 12, "config": composed.plain()})
    store = Store(tmp_path / "r")
    store.write(stored, sample_rows("dense"), "")
    monkeypatch.setattr("bench.cli.commands.table.launch", None)
    page = write_page("camera_main", chosen, tmp_path / "page.md").read_text()
    assert "STAND-IN on the embedded models" in page.splitlines()[0]
    assert "benchmark.limit=3" in page.splitlines()[2] and "--page" in page.splitlines()[2]
    assert "| `00000000` |" in page


@pytest.mark.parametrize("given", [[], ["page.txt"], ["--json"]])
def test_a_page_needs_the_name_of_a_file(given, capsys):
    assert main(["table", "camera_main", "--page", *given]) == 2
    assert "give a file, as in --page results.md" in capsys.readouterr().err


def test_windows_of_a_text_are_its_limit():
    text, exam = CONFIG.columns["text"], CONFIG.columns["exam"]
    benchmark = {"name": "exams", "limit": 10, "perplexity": {"wiki": {"windows": 3}}}
    limited = record("dense", "2031-01-02T03:04:05+00:00")
    limited = limited.model_copy(update={"config": {**limited.config, "benchmark": benchmark}})
    assert list(numbers.scored_on(text, [limited])) == ["wiki, limit 3"]
    assert list(numbers.scored_on(exam, [limited])) == ["exam, limit 10"]


def seeded(method, seed, score):
    """A record whose mean over the tasks is `score`."""
    base = record(method, f"2031-01-02T0{seed}:04:05+00:00")
    metrics = tuple(
        m.model_copy(update={"value": score}) if m.task == "average" else m for m in base.metrics
    )
    run = method.ljust(11, "0") + str(seed)
    config = {**base.config, "seed": seed}
    return base.model_copy(update={"id": run, "metrics": metrics, "config": config})


def test_a_page_of_several_seeds_begins_with_what_holds_over_them():
    scores = {
        "dense": [0.9] * 3, "first": [0.2, 0.3, 0.4], "second|best": [0.7, 0.2, 0.8],
    }  # fmt: skip
    config = CONFIG.model_copy(update={"seeds": (1, 2, 3)})
    found = {
        slot: [
            seeded(slot.row.split("|")[0], seed, score)
            for seed, score in enumerate(scores[slot.row], 1)
        ]
        for slot in table_slots(config)
        if slot.variant in ("", "20 %")
    }
    page = results_page(config, found, lambda run: samples(run[:11]), "bench table mine")
    start, rest = page.split("A share is of the weights.")
    assert start.startswith(
        "# One model, two methods\n\nThis page is based on 3 seeds. Of 3 differences in pairs of "
        "seeds, none is significant (p below 0.05 after Holm's correction). With 3 pairs, p is at "
        "least 0.25 before the correction. These have the same sign with every seed:\n\n"
        "- worse than dense: first 20 % (-60.0 ± 10.0), "
    )
    assert "of the first seed alone: of 6 paired differences, " in start
    assert "or of the mean over seeds" in rest
    assert "than first 20 %" not in start  # It is better with two of three seeds.
    against_first = rows_of(rest, "### Over seeds, against first 20 %\n")
    assert against_first == {"second!best 20 %": ["mean %", "3", "56.7", "+26.7 ± 32.1", "0.500"]}


def test_a_page_of_one_seed_says_nothing_over_seeds(found):
    page = results_page(CONFIG, found, samples, "bench table mine --page mine.md")
    assert "seed" not in page


@pytest.mark.parametrize(
    ("row", "seeds"), [("first", {1, 2}), ("first", {2}), ("dense", {1, 2}), ("dense", {2})]
)
def test_seeds_of_other_questions_are_not_paired(row, seeds):
    config = CONFIG.model_copy(update={"seeds": (1, 2)})
    other = {"benchmark": {"name": "exams", "limit": 9, "perplexity": {"wiki": {"window": 64}}}}

    def of(slot, seed):
        made = seeded(slot.row.split("|")[0], seed, 0.5)
        changed = other if slot.row == row and seed in seeds else {}
        return made.model_copy(update={"config": {**made.config, **changed}})

    found = {
        slot: [of(slot, seed) for seed in (1, 2)]
        for slot in table_slots(config)
        if slot.row != "second|best" and slot.variant in ("", "20 %")
    }
    page = results_page(config, found, lambda run: samples(run[:11]), "bench table mine")
    assert "pairs of seeds" not in page
