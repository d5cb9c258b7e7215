"""`bench table` and `bench verify` from the command line, with a small share of the questions."""

import json
import re
import shlex

import pandas as pd
import pytest

from bench.cli.commands.table import TableRequest
from bench.cli.commands.verify import _compare
from bench.cli.main import main
from bench.config.composition import compose_run_config
from bench.config.overrides import quoted_text
from bench.errors import UserError
from bench.records import Store
from bench.runner.inputs import resolve_run
from bench.runner.session import Session

SMALL = ["benchmark.limit=3", "calibration.rows=4", "costs.length=32", "tracker=none"]
FAST = ["benchmark.tasks=[arc_easy,boolq]", *SMALL]


@pytest.fixture
def call(tmp_path, capsys):
    def run(*arguments):
        code = main([*arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    run.results = tmp_path / "results"
    return run


@pytest.mark.broad
def test_a_stand_in_table_runs_what_is_missing_and_nothing_twice(call):
    given = ["camera_main", "scale=micro", "rows=[dense,Camera-P]", "variants=[40%]", *FAST]
    given += [f"results_dir={call.results}"]
    code, out, err = call("table", *given)
    assert (code, err) == (0, "")
    assert "STAND-IN" in out
    records = Store(call.results).all()
    assert sorted(record.label for record in records) == ["camera_p 0.4", "dense"]
    assert all(record.id[:8] in out for record in records)
    files = {path.name for path in (call.results / "tables").iterdir()}
    assert files == {f"camera_main_micro.{form}" for form in ("csv", "md", "tex", "html")}
    pruned = next(record for record in records if record.methods)
    assert pruned.command.startswith("bench run benchmark=camera_micro threads=1 model=micro_moe")
    assert pruned.sweep is not None

    before = {p: p.stat().st_mtime_ns for p in (call.results / "runs").rglob("*.json")}
    code, again, _ = call("table", *given, "-m", "hydra/launcher=basic", "--json")
    assert code == 0
    cells = json.loads(again)
    assert {cell["runs"] for cell in cells} == {record.id for record in records}
    assert all(cell["theirs"] is None for cell in cells)
    assert {p: p.stat().st_mtime_ns for p in (call.results / "runs").rglob("*.json")} == before

    # The command that a record names is the same run.
    repeated = compose_run_config(shlex.split(pruned.command)[2:])
    assert resolve_run(repeated, Session()).id == pruned.id


@pytest.mark.broad
def test_seeds_can_be_swept_and_a_cell_is_their_mean(call):
    code, _, _ = call(
        "table", "wgsef_grid", "scale=micro", "rows=[dense]", "-m", "seed=1,2,3",
        "benchmark.limit=5", "tracker=none", f"results_dir={call.results}",
    )  # fmt: skip
    assert code == 0
    assert len(Store(call.results).all()) == 3
    table = pd.read_csv(call.results / "tables" / "wgsef_grid_micro.csv")
    accuracies = table[table.column.str.startswith("accuracy, embedded")]
    assert len(accuracies.runs.iloc[0].split()) == 3


@pytest.mark.broad
def test_a_failed_run_leaves_its_cell_empty_and_the_others_whole(call, monkeypatch):
    from methods.wgsef.competitors import MagnitudePruning

    def failing(self, model, context):
        raise RuntimeError("the disk caught fire")

    monkeypatch.setattr(MagnitudePruning, "apply", failing)
    code, out, err = call(
        "table", "wgsef_grid", "scale=micro", "rows=[dense,group magnitude]", "variants=[70%]",
        "-m", "seed=1", "benchmark.limit=5", "tracker=none", f"results_dir={call.results}",
    )  # fmt: skip
    assert code == 1
    assert "the disk caught fire" in err
    assert "dense" in out
    assert len(Store(call.results).all()) == 1


@pytest.mark.broad
def test_without_a_network_every_model_and_data_set_is_named_and_nothing_runs(call):
    code, out, err = call(
        "table", "camera_main", "offline=true", "tracker=none", f"results_dir={call.results}"
    )
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert all(line.startswith("bench: ") for line in lines)
    for repository in ("deepseek-ai/deepseek-moe-16b-base", "Qwen/Qwen2-57B-A14B",
                       "Qwen/Qwen3-30B-A3B", "aps/super_glue", "regisss/math_qa",
                       "Salesforce/wikitext", "allenai/c4"):  # fmt: skip
        assert sum(repository in line for line in lines) == 1, repository
    assert sum("calibration" in line for line in lines) == 1
    assert len(lines) == 3 + 9 + 2 + 1
    assert not (call.results / "runs").exists()


@pytest.mark.broad
def test_folders_of_images_are_named_as_well(call):
    code, _, err = call(
        "table", "wgsef_grid", "tracker=none", f"results_dir={call.results}", "rows=[dense]"
    )
    assert code == 2
    assert len(err.splitlines()) == 2
    assert "cifar10" in err
    assert "fashion_mnist" in err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["camera_man"], "did you mean 'camera_main'"),
        (["camera_main", "model=micro_moe"], "a table sets its own model"),
        (["camera_main", "scale=micro", "benchmark.limit=1,2"], "can only sweep the seed"),
        (["camera_main", "scale=micro", "-m", "seed=a,b"], "whole numbers"),
        (["camera_main", "scale=micro", "-m", "seed=1,01"], "give each seed once"),
        (["camera_main", "scale=micro", "rows=[Camera]"], "unknown name in rows"),
        (["camera_main", "scale=micro", "benchmark.limt=3"], "benchmark.limt"),
        ([], "takes one name"),
    ],
)
def test_wrong_input_is_one_sentence(call, given, said):
    code, out, err = call("table", *given)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_keys_of_the_table_and_of_its_runs_are_told_apart():
    asked = TableRequest.parse(
        [
            "scale=micro", "rows=[a,b]", "to_dense=[avg]", "-m", "seed=1,2", "tracker=none",
            "hydra/launcher=joblib",
        ]
    )  # fmt: skip
    assert (asked.scale, asked.seeds) == ("micro", (1, 2))
    assert asked.selections == {"rows": ["a", "b"], "to_dense": ["avg"]}
    assert asked.run_overrides == ("tracker=none",)
    assert asked.launcher_overrides == ("hydra/launcher=joblib",)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ('[a,"b, c"]', ["a", "b, c"]),
        ("['b, c' , d e]", ["b, c", "d e"]),
        ('"b, c"', ["b, c"]),
        ("[Anna's,50 %]", ["Anna's", "50 %"]),
        ("[]", [""]),
    ],
)
def test_a_name_with_a_comma_is_selected_in_quotes(value, names):
    assert TableRequest.parse([f"rows={value}"]).selections == {"rows": names}


def test_two_selections_of_one_part_are_refused():
    assert TableRequest.parse(["scale=micro", "scale=micro"]).scale == "micro"
    for given in (
        ["scale=micro", "scale=full"],
        ["rows=a", "rows=b"],
        ["costs=[FLOPs]", "costs=[bytes]"],
        ["to_dense=[avg]", "to_dense=[FLOPs]"],
    ):
        with pytest.raises(UserError, match=re.escape(f"{given[0]} and {given[1]} both set")):
            TableRequest.parse(given)


@pytest.mark.parametrize(
    "run", [["a='x, y'"], [r"a=back\slash", r"b=\'", "c=\\"], ["method=[a,b]", "c={}"]]
)
def test_listed_runs_survive_hydras_grammar(run):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    listed = f"hydra.sweeper.runs=[[{','.join(map(quoted_text, run))}]]"
    parsed = OverridesParser.create().parse_override(listed)
    assert [[str(o) for o in one] for one in parsed.value()] == [run]


def test_tables_are_listed_with_what_they_are(call):
    code, out, _ = call("ls", "tables", "--json")
    rows = {row["table"]: row["about"] for row in json.loads(out)}
    assert code == 0
    assert {"camera_main", "visual_table2", "wgsef_grid"} <= set(rows)
    assert not any(name.startswith("_") for name in rows)
    assert all(rows.values())


@pytest.mark.slow
def test_a_run_with_a_method_is_verified(call):
    fast = ["benchmark=nine_tasks_micro", "benchmark.tasks=[arc_easy,boolq]", *SMALL]
    call("run", "method=camera_p", "ratio=0.4", *fast, f"results_dir={call.results}")
    (record,) = Store(call.results).all()
    code, out, _ = call(
        "verify", record.id[:6], "--samples", "2", "--json", "--results-dir", str(call.results)
    )
    verdict = json.loads(out)
    assert code == 0
    assert verdict["agrees"]
    assert verdict["tasks"] == {"arc_easy": 2, "boolq": 2}
    assert verdict["worst"] <= verdict["tolerance"]


@pytest.mark.broad
def test_a_changed_sample_is_found(call):
    call(
        "run", "model=micro_resnet", "benchmark=images", "benchmark.limit=6", "tracker=none",
        f"results_dir={call.results}",
    )  # fmt: skip
    (record,) = Store(call.results).all()
    where = ["--results-dir", str(call.results)]
    code, out, _ = call("verify", record.id, *where)
    assert code == 0
    assert "digits 6" in out

    path = call.results / "runs" / record.id / "samples.parquet"
    samples = pd.read_parquet(path)
    samples.loc[1, "probability"] -= 0.01
    samples.to_parquet(path)
    code, out, _ = call("verify", record.id, "--samples", "2", *where)
    assert code == 1
    assert "does not agree" in out
    assert "digits sample 1: probability was" in out
    code, out, _ = call("verify", record.id, "--samples", "1", *where)
    assert code == 0
    code, out, _ = call("verify", record.id, "--samples", "2", "--tolerance", "0.5", *where)
    assert code == 0
    code, _, err = call("verify", record.id, "--samples", "0", *where)
    assert code == 2
    assert "must be at least 1" in err


def row(**changes):
    return {
        "task": "t", "filter": None, "doc_id": 0, "response": "a", "acc": 1.0,
        "loglikelihoods": [-1.0, -2.0], **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "said"),
    [
        (row(filter=float("nan")), None),
        (row(acc=1.0 + 1e-5), None),
        (row(acc=0.0), "acc was 0 and is 1"),
        (row(acc=None), "acc was nan"),
        (row(response="b"), "different response"),
        (row(doc_id=5), "not in the run's samples"),
        (row(loglikelihoods=[-1.0]), "(count)"),
        (row(loglikelihoods=[-1.0, -2.1]), "loglikelihoods[1] was -2.1 and is -2"),
    ],
)
def test_what_counts_as_another_sample(old, said, monkeypatch):
    monkeypatch.setattr("bench.cli.commands.verify.environment_changes", lambda record: [])
    record = type("R", (), {"id": "x"})()
    verdict = _compare(record, [old], [row()], tolerance=1e-4)
    assert verdict.agrees == (said is None)
    assert said is None or any(said in fault for fault in verdict.faults)


def test_nothing_to_compare_is_no_agreement(monkeypatch):
    monkeypatch.setattr("bench.cli.commands.verify.environment_changes", lambda record: [])
    assert not _compare(type("R", (), {"id": "x"})(), [], [], 1e-4).agrees


def test_an_override_that_deletes_is_no_second_name(call):
    code, _, err = call("table", "camera_main", "scale=micro", "~benchmark.perplexity.nope")
    assert code == 2
    assert "benchmark.perplexity.nope" in err
