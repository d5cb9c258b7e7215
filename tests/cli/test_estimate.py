"""`bench estimate` and `--budget`: figures before a run, refusals in one sentence, nothing run."""

import json

import pytest

import bench
from bench.cli.main import main
from bench.estimation import boards, estimator, network
from bench.estimation.boards import load_hardware
from bench.records import Store
from bench.runner.estimate import estimate_runs
from bench.runner.session import Session
from methods.baselines.micro_expert_controls import RandomMicroExperts

# A session keeps the estimator of its machine.
pytestmark = pytest.mark.own_session
QUICK = (
    "benchmark=perplexity_micro", "benchmark.limit=2", "tracker=none", "offline=true", "threads=1",
)  # fmt: skip


@pytest.fixture
def known(monkeypatch):
    """Let this machine's rates be those of a board, so that no test measures them."""
    board = load_hardware("h200").model_copy(
        update={"name": "here", "device": "cpu", "peak": {"float32": 1e11, "bfloat16": 1e11}}
    )
    monkeypatch.setattr(boards, "known_here", lambda: board)
    monkeypatch.setattr(boards, "measured_here", lambda: board)
    monkeypatch.setattr(network, "measured_once", lambda *_: None)
    return board


def test_an_estimate_is_printed_and_a_record_keeps_its_own(known, tmp_path, capsys):
    results = f"results_dir={tmp_path}/results"
    words = [*QUICK, results, "method=camera_p", "calibration.rows=2"]
    assert main(["estimate", *words, "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert not (tmp_path / "results").exists()
    assert (run["fits"], run["state"], run["missing"]) == (True, "new", [])

    assert main(["run", *words, "--budget", "2h"]) == 0
    (record,) = Store(tmp_path / "results").all()
    named = [phase.phase for phase in record.estimate]
    assert named == [phase["name"] for phase in run["phases"]]
    measured = {c.scope.removeprefix("phase ") for c in record.costs if c.quantity == "wall"}
    assert set(named) <= measured

    capsys.readouterr()
    assert main(["estimate", *words]) == 0
    assert "recorded already" in capsys.readouterr().out
    assert main(["estimate", "--check", results, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(row["phases"] >= 1 for row in rows)


def test_a_sweep_says_its_estimate_and_a_budget_refuses_it(known, tmp_path, capsys):
    results = f"results_dir={tmp_path}/results"
    words = ["-m", *QUICK, results, "method=random_micro_experts", "ratio=0.1,0.2"]
    assert main(["run", *words, "--budget=0.001s"]) == 2
    error = capsys.readouterr().err
    assert "estimate: 2 runs on this machine" in error
    assert "--budget 0.001 s is too low: 2 runs take" in error
    assert not Store(tmp_path / "results").all()


def test_loading_and_counting_are_as_fast_as_building_and_counting_without_weights(
    known, monkeypatch
):
    """No assumption of seconds to start: this machine has just done the same without weights."""
    timed = estimator._timed
    monkeypatch.setattr(boards, "collecting_seconds", lambda: 0.0)
    monkeypatch.setattr(estimator, "_timed", lambda call, warm: (timed(call, warm=warm)[0], 0.01))
    (run,) = bench.estimate([*QUICK, "method=camera_p"]).runs
    phases = {phase.name: phase for phase in run.phases}
    loading, counting = phases["loading the model"], phases["counting costs"]
    assert 0.4 * 0.01 < loading.low < 6.5 * 0.01 < loading.high < 0.1
    layers = 4  # of one form, of which one was counted
    assert counting.low == pytest.approx(0.8 * 0.6 * 0.01 * layers)
    assert counting.high == pytest.approx(1.5 * 2 * 0.01 * layers)


@pytest.mark.parametrize("freezes", [True, False])
def test_only_sessions_that_do_not_freeze_wait_for_garbage_collections(known, monkeypatch, freezes):
    monkeypatch.setattr(boards, "collecting_seconds", lambda: 100.0)
    with Session(freezes=freezes) as session:
        (run,) = estimate_runs([*QUICK, "costs.measure=[memory]"], None, session).runs
    phases = {phase.name: phase for phase in run.phases}
    assert (phases["loading the model"].low > 80) is not freezes
    assert (phases["measuring costs"].low > 160) is not freezes


@pytest.mark.broad
def test_a_budget_is_for_what_is_left_of_a_sweep(known, tmp_path, capsys, monkeypatch):
    results = f"results_dir={tmp_path}/results"
    words = ["-m", *QUICK, results, "method=random_micro_experts", "ratio=0.1,0.2"]
    with monkeypatch.context() as patch:
        apply = RandomMicroExperts.apply

        def failing(self, model, context):
            if self.ratio > 0.15:
                raise RuntimeError("no luck")
            return apply(self, model, context)

        patch.setattr(RandomMicroExperts, "apply", failing)
        main(["run", *words])
    assert len(Store(tmp_path / "results").all()) == 1
    capsys.readouterr()
    assert main(["run", *words, "--budget=0.001s"]) == 2
    assert "--budget 0.001 s is too low: 1 runs take" in capsys.readouterr().err
    assert main(["run", *words, "--budget=2h"]) == 0
    assert len(Store(tmp_path / "results").all()) == 2
    # Nothing is left to do, so any budget is enough.
    assert main(["run", *words, "--budget=0.001s"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hardware=a100_40g"], "did you mean 'a100_40gb'"),
        (["hardware=h100", "--budget", "-6h"], "--budget"),
        (["hardware=h100", "--budget=6"], "give a number and a unit"),
        (["hardware=h100", "hardware=h200"], "name one board"),
        (["hardware=mi300x", "model.dtype=float32", *QUICK], "no rate for model.dtype=float32"),
        (["--check", "model=micro_moe"], "takes results_dir=FOLDER"),
    ],
)
def test_wrong_input_is_one_sentence(words, said, capsys):
    assert main(["estimate", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("\n") == 1
