"""Long prompts from a command to the record, and scored again without the model."""

import json
import shutil
from pathlib import Path

import pandas as pd

from bench.models import embedded
from bench.records import Store

MICRO_MOE = Path(next(iter(embedded.__path__))) / "micro_moe"


def test_a_run_keeps_what_was_seen_and_is_scored_again(bench, tmp_path):
    rows = [
        {"question": "is it so " * length, "passage": "It is so.", "idx": n, "label": n % 2}
        for n, length in enumerate((1, 200, 2, 300))
    ]
    data = tmp_path / "boolq.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = bench(
        "run", "model=micro_moe", "model.max_length=256", "benchmark=nine_tasks",
        "benchmark.tasks=[boolq]", "benchmark.metrics={boolq:acc}",
        f"benchmark.data={{boolq:{data}}}", "tracker=none",
        "offline=true",
    )  # fmt: skip
    assert code == 0, err
    (warning,) = (line for line in err.splitlines() if "were cut on the left" in line)
    assert "boolq 2 of 4" in warning
    (record,) = Store(bench.results).all()
    (evidence,) = record.evidence
    assert (evidence.documents, evidence.truncated) == (4, 2)
    assert record.metric("boolq").truncated == 2

    code, out, err = bench("rescore", record.id, "--json")
    assert code == 0, err
    again = json.loads(out)
    assert all(row["stored"] == row["rescored"] for row in again["metrics"])
    assert again["samples"] == []
    # Another answer in the samples is another score.
    file = bench.results / "runs" / record.id / "samples.parquet"
    frame = pd.read_parquet(file)
    frame.at[0, "loglikelihoods"] = list(reversed(frame.at[0, "loglikelihoods"]))
    frame.to_parquet(file)
    code, out, err = bench("rescore", record.id)
    assert code == 0, err
    assert "differs: boolq sample 0 (none): acc was" in out


def test_a_tokenizer_that_does_not_fit_is_refused_before_weights(bench, tmp_path):
    folder = Path(shutil.copytree(MICRO_MOE, tmp_path / "m"))
    content = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    content["added_tokens"].append({"id": size, "content": " number", **flags})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    # No weights that could be read.
    code, out, err = bench("run", "model=local", f"model.path={folder}", "tracker=none")
    assert (code, out) == (2, "")
    assert f"has ids up to {size}" in err
    assert err.count("\n") == 1
