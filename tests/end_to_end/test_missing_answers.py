"""A model that cannot compute some rows has no number, but a gap with the reason."""

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bench.data.synthetic.world import documents_by_split
from bench.models import embedded
from bench.records import Store

MICRO_MOE = Path(next(iter(embedded.__path__))) / "micro_moe"


@pytest.fixture
def holed(tmp_path):
    """micro_moe with NaN in the embedding of the rarest token of some questions, and these."""
    from transformers import AutoTokenizer

    folder = tmp_path / "holed"
    shutil.copytree(MICRO_MOE, folder)
    rows = documents_by_split("arc_easy")["test"][:10]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sets = [set(tokenizer(json.dumps(row))["input_ids"]) for row in rows]
    counted = {token: sum(token in each for each in sets) for each in sets for token in each}
    token = min(counted, key=counted.get)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "embed_tokens" in name)
    weights[name][token] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    file = tmp_path / "arc.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return folder, file


def test_a_gap_with_its_reason_or_a_number_with_its_count(bench, holed):
    folder, file = holed
    asked = (
        "model=local", f"model.path={folder}", "benchmark=nine_tasks", "benchmark.tasks=[arc_easy]",
        f"benchmark.data.arc_easy={file}", "benchmark.limit=10",
    )  # fmt: skip
    code, out, err = bench("run", *asked)
    assert code == 0, err
    (record,) = Store(bench.results).all()
    (metric,) = (metric for metric in record.metrics if metric.headline)
    assert metric.value is None and 0 < metric.missing < 10 == metric.n + metric.missing
    assert f"- (n {metric.n}, {metric.missing} missing)" in out
    sentence = f"{metric.missing} of 10 rows have no answer: a log-likelihood is not finite (row"
    assert f"no acc norm for arc_easy: {sentence}" in out and f"arc_easy: {sentence}" in err
    assert sentence in record.missing[0].reason
    code, out, err = bench("run", *asked, "benchmark.allow_missing=0.9")
    assert code == 0, err
    assert f" (n {metric.n}, {metric.missing} missing)" in out and "no acc norm" not in out
