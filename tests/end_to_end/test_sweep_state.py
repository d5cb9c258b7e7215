"""A sweep whose job fails: seen in its status, gone on with alone, answered at once when done."""

import json
import time
from pathlib import Path

import pytest

from bench.cli.main import main
from bench.records import Store
from methods.baselines.micro_expert_controls import RandomExperts

SWEEP = [
    "run", "-m", "method=random_experts", "ratio=0.2,0.4,0.6", "benchmark.tasks=[arc_easy]",
    "~benchmark.perplexity", "benchmark.limit=2", "costs.length=32", "threads=1", "tracker=none",
]  # fmt: skip


@pytest.mark.broad
def test_only_what_failed_is_run_again(tmp_path, capsys, monkeypatch):
    where = ["--results-dir", str(tmp_path)]
    sweep = [*SWEEP, f"results_dir={tmp_path}"]

    def status():
        capsys.readouterr()
        assert main(["status", "latest", "--json", *where]) == 0
        return json.loads(capsys.readouterr().out)

    with monkeypatch.context() as patched:
        apply = RandomExperts.apply

        def failing(self, model, context):
            if self.ratio == 0.4:
                raise RuntimeError("the disk caught fire")
            return apply(self, model, context)

        patched.setattr(RandomExperts, "apply", failing)
        assert main(sweep) == 1
    rows = status()
    assert [row["state"] for row in rows] == ["done", "failed", "done"]
    assert [row["overrides"] for row in rows] == ["ratio=0.2", "ratio=0.4", "ratio=0.6"]
    assert rows[1]["reason"] == (
        "RuntimeError: the disk caught fire, while applying method random_experts"
    )
    assert "Traceback" in Path(rows[1]["log"]).read_text()

    started = {record.id: record.started for record in Store(tmp_path).all()}
    assert main(["resume", "latest", *where]) == 0
    assert [row["state"] for row in status()] == ["done"] * 3
    after = {record.id: record.started for record in Store(tmp_path).all()}
    assert len(after) == 3
    assert started.items() <= after.items()
    assert len({record.sweep for record in Store(tmp_path).all()}) == 1

    began = time.perf_counter()
    assert main(sweep) == 0
    assert "3 of them already recorded" in capsys.readouterr().out
    assert time.perf_counter() - began < 5
    assert len(list((tmp_path / "sweeps").iterdir())) == 1
    assert main(["status", "--json", *where]) == 0
    (summary,) = json.loads(capsys.readouterr().out)
    assert (summary["done"], summary["failed"]) == (3, 0)


@pytest.mark.broad
def test_asking_by_force_is_a_new_sweep(tmp_path):
    sweep = [*SWEEP, f"results_dir={tmp_path}"]
    sweep[3] = "ratio=0.2"
    assert main(sweep) == 0
    (first,) = Store(tmp_path).all()
    assert main([*sweep, "force=true"]) == 0
    (second,) = Store(tmp_path).all()
    assert second.started > first.started
    assert len(list((tmp_path / "sweeps").iterdir())) == 2


@pytest.mark.sample(1)
@pytest.mark.parametrize("force", ["force=True", "++force='true'"])
def test_any_spelling_of_force_runs_a_repeated_sweep_again(tmp_path, force):
    sweep = [
        "run", "-m", "model=micro_lenet", "benchmark=images", "benchmark.limit=1", "seed=1,2",
        "threads=1", "tracker=none", f"results_dir={tmp_path}", force,
    ]  # fmt: skip
    assert main(sweep) == 0
    first = {record.id: record.started for record in Store(tmp_path).all()}
    assert main(sweep) == 0
    second = {record.id: record.started for record in Store(tmp_path).all()}
    assert first.keys() == second.keys()
    assert all(second[run] > first[run] for run in first)
