"""A model that cannot compute its answers has no number, but a gap with the reason."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bench.data.synthetic.world import documents_by_split
from bench.models import embedded
from bench.records import Store

MICRO_MOE = Path(next(iter(embedded.__path__))) / "micro_moe"


@pytest.mark.broad
def test_activations_that_overflow_give_a_gap_with_its_reason(bench, tmp_path):
    folder, file = tmp_path / "overflowing", tmp_path / "arc.jsonl"
    shutil.copytree(MICRO_MOE, folder)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith("layernorm.weight"):
            # Finite in float16, but not what it is multiplied with.
            weights[name] = weights[name].clamp(-1, 1) * 6e4
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    rows = documents_by_split("arc_easy")["test"][:6]
    file.write_text("\n".join(map(json.dumps, rows)))
    code, out, err = bench(
        "run", "model=local", f"model.path={folder}", "model.dtype=float16", "benchmark=nine_tasks",
        "benchmark.tasks=[arc_easy]", f"benchmark.data.arc_easy={file}",
    )  # fmt: skip
    assert code == 0, err
    (record,) = Store(bench.results).all()
    (metric,) = (metric for metric in record.metrics if metric.headline)
    assert (metric.value, metric.n, metric.missing) == (None, 0, 6)
    sentence = "6 of 6 rows have no answer: a log-likelihood is not finite (rows 0, 1, 2, 3, 4"
    assert record.missing[0].reason.startswith(sentence)
    assert "- (n 0, 6 missing)" in out and f"no acc norm for arc_easy: {sentence}" in out
    assert f"arc_easy: {sentence}" in err
