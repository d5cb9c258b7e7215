"""Real searches: trials end early when hopeless, a killed study goes on, the front is right."""

import csv
import json
from types import SimpleNamespace

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from bench.cli.main import main
from bench.errors import RunsFailed, UserError
from bench.records import Store
from bench.reporting.study import pareto_trials
from bench.runner import launch
from bench.sweeps.optuna_sweeper import OptunaSweeper, _asked, _requeue_interrupted

TINY = [
    "method=random_experts", "benchmark.tasks=[arc_easy,boolq]", "~benchmark.perplexity",
    "benchmark.limit=8", "costs.length=32", "threads=1", "tracker=none",
]  # fmt: skip
SEARCH = [
    *TINY, "-m", "hydra/sweeper=optuna", "hydra.sweeper.study=tiny",
    "hydra.sweeper.objectives=[maximize average, minimize nonzero_parameters]",
    "ratio=interval(0.1,0.7)",
]  # fmt: skip


def study(results):
    (file,) = results.glob("sweeps/*/study.json")
    return json.loads(file.read_text())


@pytest.mark.broad
def test_a_search_prunes_goes_on_and_keeps_the_front(tmp_path, capsys):
    results = tmp_path / "results"
    asked = [
        "run", *SEARCH, f"results_dir={results}", "hydra.sweeper.early_tasks=[arc_easy]",
        "hydra.sweeper.early_margin=0", "hydra.sweeper.parallel=2", "hydra.sweeper.seed=3",
    ]  # fmt: skip
    assert main([*asked, "hydra.sweeper.trials=4"]) == 0
    assert "Pareto-optimal trials" in capsys.readouterr().out
    found = study(results)["trials"]
    assert len(found) == 4
    complete = [trial for trial in found if trial["state"] == "complete"]
    assert {trial["state"] for trial in found} <= {"complete", "pruned"}
    records = {record.id: record for record in Store(results).all()}
    for trial in complete:
        record = records[trial["run"]]
        parameters = record.cost("nonzero_parameters").value
        assert trial["values"] == [record.metric("average").value, parameters]
        assert record.methods[0].config["ratio"] == pytest.approx(trial["params"]["ratio"])
        beaten = any(
            other["values"] != trial["values"]
            and other["values"][0] >= trial["values"][0]
            and other["values"][1] <= trial["values"][1]
            for other in complete
        )
        assert trial["front"] == (not beaten)
    # Every trial was scored on the early task, and only promising ones on both.
    short = [r for r in records.values() if {m.task for m in r.metrics} == {"arc_easy"}]
    assert len(short) == 4
    assert len(records) == 4 + len(complete)
    (table,) = results.glob("sweeps/*/pareto.csv")
    with table.open() as file:
        assert len(list(csv.DictReader(file))) == len(pareto_trials(study(results)))
    assert list(results.glob("sweeps/*/pareto.svg"))

    # What is asked again is answered at once, without a trial more.
    before = len(records)
    assert main([*asked, "hydra.sweeper.trials=4"]) == 0
    assert len(Store(results).all()) == before
    # The study of another sweep goes on from the same journal.
    assert main([*asked, "hydra.sweeper.trials=5"]) == 0
    assert (
        len(json.loads(sorted(results.glob("sweeps/*/study.json"))[-1].read_text())["trials"]) == 5
    )


@pytest.mark.parametrize(("wrong", "said"), [
    ("hydra.sweeper.objectives=[up average]", "allowed: `maximize NAME`"),
    ("ratio=interval(0.1,1.5)", "ratio=1.5"),
    ("hydra.sweeper.spaces={}", "spaces"),
    pytest.param(
        "hydra.sweeper.early_tasks=[arc_eazy]", "hydra.sweeper.early_tasks: unknown task",
        marks=pytest.mark.broad,
    ),
])  # fmt: skip
def test_a_wrong_search_is_refused_before_its_first_trial(tmp_path, capsys, wrong, said):
    asked = [word for word in SEARCH if word.split("=")[0] != wrong.split("=")[0]]
    assert main(["run", *asked, wrong, f"results_dir={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not list(tmp_path.rglob("record.json"))


def opened(journal, shared=(), space=None):
    search = OptunaSweeper("s", 3, 1, 7, ["maximize average", "minimize flops"], {}, [], 2.0)
    return search._study(journal, list(shared), space or {})


def test_a_killed_search_asks_again_for_what_it_left_and_for_what_failed(tmp_path):
    space = {"ratio": FloatDistribution(0, 1)}
    study = opened(tmp_path / "s.log")
    done, failed, left = (study.ask(space) for _ in range(3))
    study.tell(done, [0.5, 1.0])
    study.tell(failed, state=TrialState.FAIL)
    again = opened(tmp_path / "s.log")  # by another process, after the first was killed
    asked = [again.ask(space).params for _ in range(2)]
    assert sorted(p["ratio"] for p in asked) == sorted(t.params["ratio"] for t in (failed, left))
    # A third process finds the two running again, and nothing is asked for twice.
    third = opened(tmp_path / "s.log")
    waiting = third.get_trials(states=(TrialState.WAITING,))
    assert len(waiting) == 2
    _requeue_interrupted(third, space)
    assert len(third.get_trials(states=(TrialState.WAITING,))) == 2


def test_a_failed_trial_outside_a_narrower_range_is_not_repeated(tmp_path):
    wide = {"ratio": FloatDistribution(0, 1), "k": CategoricalDistribution(("a", "b"))}
    study = opened(tmp_path / "s.log")
    for ratio, k in ((0.1, "a"), (0.9, "a"), (0.2, "b")):
        study.enqueue_trial({"ratio": ratio, "k": k})
        study.tell(study.ask(wide), state=TrialState.FAIL)
    narrow = {"ratio": FloatDistribution(0, 0.5), "k": CategoricalDistribution(("a", "c"))}
    again = opened(tmp_path / "s.log", space=narrow)
    waiting = again.get_trials(states=(TrialState.WAITING,))
    assert [t.system_attrs["fixed_params"] for t in waiting] == [{"ratio": 0.1, "k": "a"}]


def test_a_trial_whose_run_lacks_an_objective_is_a_failure(tmp_path):
    trials = [
        {"state": "complete", "run": "a", "reason": None},
        {"state": "fail", "run": "b", "reason": "run b has no average"},
        {"state": "fail", "run": None, "reason": "boom"},
        {"state": "fail", "run": "c", "reason": "run c has no average"},
    ]
    file = tmp_path / "study.json"
    file.write_text(json.dumps({"trials": [*trials, trials[1]]}))
    assert launch._unscored(launch._trials(file), {"a", "b"}) == ["run b has no average"]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"trials": 5}', '{"trials": [5]}', '{"trials": [{}]}']
)
def test_a_damaged_study_has_no_trials(tmp_path, text):
    (tmp_path / "study.json").write_text(text)
    assert launch._trials(tmp_path / "study.json") == []


def test_a_search_whose_new_trials_fail_keeps_what_it_found_before(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "job_results", lambda plan: ["job 2: boom"])
    trials = [
        {"state": "complete", "run": "a", "reason": None},
        {"state": "fail", "run": None, "reason": "boom"},
    ]
    (tmp_path / "study.json").write_text(json.dumps({"trials": trials}))
    outcome = launch._sweep_outcome(SimpleNamespace(folder=tmp_path))
    assert (outcome.study_folder, outcome.failures) == (tmp_path, ["job 2: boom"])

    (tmp_path / "study.json").write_text(json.dumps({"trials": trials[1:]}))
    with pytest.raises(RunsFailed):
        launch._sweep_outcome(SimpleNamespace(folder=tmp_path))


def test_a_search_that_is_resumed_draws_new_values(tmp_path):
    space = {"ratio": FloatDistribution(0, 1), "k": CategoricalDistribution((1, 2))}
    drawn = []
    for _ in range(3):  # each in a process of its own
        study = opened(tmp_path / "s.log")
        for trial in (study.ask(space) for _ in range(2)):
            drawn.append(trial.params["ratio"])
            study.tell(trial, [0.5, 1.0])
    assert len(set(drawn)) == len(drawn)


def test_a_study_with_other_objectives_is_not_mixed_in(tmp_path):
    opened(tmp_path / "s.log")
    other = OptunaSweeper("s", 3, 1, 7, ["maximize average", "minimize bytes"], {}, [], 2.0)
    with pytest.raises(UserError, match="different objectives"):
        other._study(tmp_path / "s.log", [], {})


def test_a_study_of_other_questions_or_ranges_is_not_mixed_in(tmp_path):
    journal, shared = tmp_path / "s.log", ["model=micro_moe", "benchmark.limit=10"]
    _asked(opened(journal, shared), {"ratio": FloatDistribution(0, 1)})
    _asked(opened(journal, ["tracker=none", *shared]), {"ratio": FloatDistribution(0, 0.5)})
    with pytest.raises(UserError, match=r"different: benchmark\.limit=10 benchmark\.limit=20\)"):
        opened(journal, ["model=micro_moe", "benchmark.limit=20"])
    with pytest.raises(UserError, match=r"another kind of range for one of ratio .*choose another"):
        _asked(opened(journal, shared), {"ratio": CategoricalDistribution((0.1, 0.2))})
