"""A run's model leaves as a folder and comes back as a model with the same numbers."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import bench as slimbench
from bench.models.loading import open_folder
from bench.records import Store
from bench.runner.replay import rebuild_model, recorded_config
from bench.runner.session import Session

QUICK = ("benchmark.tasks=[arc_easy]", "~benchmark.perplexity")
ROWS = torch.arange(5, 69).view(2, 32)


@pytest.mark.broad
def test_an_exported_run_loads_in_one_call_and_in_a_run(bench, tmp_path):
    bench("run", "method=camera_p", "ratio=0.4", *QUICK)
    store = Store(bench.results)
    (record,) = store.all()
    code, out, _ = bench("export", record.id[:6], str(tmp_path / "out"))
    assert code == 0
    assert "slimbench" in out

    model = open_folder(tmp_path / "out")
    expected = rebuild_model(record, store, Session()).network(ROWS).logits
    torch.testing.assert_close(model.network(ROWS).logits, expected, rtol=1e-5, atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (record.id, record.model.fingerprint, "open_folder", '"ratio": 0.4', "removed"):
        assert said in card
    suffixes = {file.suffix for file in (tmp_path / "out").iterdir()}
    assert suffixes <= {".json", ".safetensors", ".md", ".jinja"}

    code, _, _ = bench("run", "model=local", f"model.path={tmp_path / 'out'}", *QUICK)
    assert code == 0
    again = next(r for r in Store(bench.results).all() if not r.methods)
    assert again.metric("arc_easy").value == record.metric("arc_easy").value
    assert again.model.parameters == record.cost("parameters").value


@pytest.mark.broad
def test_a_record_says_enough_to_build_its_config_again(bench):
    bench("run", "method=[random_micro_experts,camera_p]", "ratio=0.2", "seed=7", *QUICK,
          "method.camera_p.alpha=0.05")  # fmt: skip
    (record,) = Store(bench.results).all()
    config = recorded_config(record)
    assert list(config.method) == ["random_micro_experts", "camera_p"]
    assert config.method["camera_p"].alpha == 0.05
    assert config.seed == 7
    assert config.model.name == record.model.name


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    """A results folder with one pruned run, for tests that copy it."""
    results = tmp_path_factory.mktemp("one_run") / "results"
    asked = [*QUICK, "benchmark.limit=6", "calibration.rows=4", "costs.length=32", "tracker=none"]
    slimbench.run(["method=camera_p", *asked, f"results_dir={results}"])
    return results


@pytest.mark.broad
def test_a_folder_for_an_engine_says_what_it_saves_and_loads_in_transformers(
    one_run, bench, tmp_path
):
    shutil.copytree(one_run, bench.results)
    store = Store(bench.results)
    (record,) = store.all()
    code, out, _ = bench("export", record.id, str(tmp_path / "out"), "--for", "vllm")
    assert code == 0
    # The widest expert of a ranking over layers is whole, so that padding is all that is left.
    saved = "stored 64 wide: the folder omits 0.0% of the expert weights"
    assert saved in " ".join(out.split())
    stock, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    expected = rebuild_model(record, store, Session()).network(ROWS).logits
    torch.testing.assert_close(stock.eval()(ROWS).logits, expected, rtol=1e-5, atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    weights = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    for said in ("vllm serve", "from_pretrained", saved, record.id, f"{weights:,} bytes"):
        assert said in card


WRONG_ENGINES = {
    "engine": ["--for", "tgi"],
    "align": ["--for", "vllm", "--align", "96"],
    "align alone": ["--align", "64"],
    "too wide": ["--for", "vllm", "--align", "128"],
    "grid": ["--for", "vllm"],
}


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "what", ["run", "folder", "weights", "calibration", "method", *WRONG_ENGINES]
)
def test_what_cannot_be_exported_is_one_sentence_and_nothing_is_written(
    what, one_run, bench, tmp_path
):
    shutil.copytree(one_run, bench.results)
    store = Store(bench.results)
    (record,) = store.all()
    run, folder = record.id, tmp_path / "out"
    file = store.folder(run) / "record.json"
    content = json.loads(file.read_text())
    if what == "run":
        run = "zzz"
    if what == "folder":
        folder.mkdir()
        (folder / "mine.txt").touch()
    if what == "weights":
        content["model"]["fingerprint"] = "0" * 64
    if what == "calibration":
        content["provenance"]["calibration"] = "0" * 64
    if what == "method":
        content["config"]["method"]["camera_p"]["old_knob"] = 1
    if what == "grid":
        content["config"]["method"] = {"gptq": {"grid": "offset"}}
    file.write_text(json.dumps(content))
    before = sorted(tmp_path.rglob("*"))
    code, out, said = bench("export", run, str(folder), *WRONG_ENGINES.get(what, []))
    assert code == 2
    assert out == ""
    assert len(said.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
